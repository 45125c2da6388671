"""Instruction counts of the CUDA scans: `python csrc/cuda/counts.py [--write]`.

    build      csrc/cuda by nvcc into build/cuda, as csrc/cuda/build.py does
    count      the innermost loop that multiplies of each scan, in the machine code that cuobjdump shows
    compare    with fastvq/bench/cuda_counts.json, which `--write` brings up to date
    predict    is what `fastvq bench --model` does with that file

No GPU is needed; nvcc is, and cuobjdump, which stands beside nvcc, in PATH, or comes with Triton.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvq.bench.devices import SHARED_CLOCK
from fastvq.kernels.assembly import ALU, HALF_RATE, natural_loops, read_sass

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COUNTS = ROOT / "fastvq" / "bench" / "cuda_counts.json"
BUILT = ROOT / "build" / "cuda"
TOLERANCE = 0.1
# Where the model needs a number of the source, it is read there.
LIMITS = {"few_rows": ("few.cuh", "SEARCH_FEW"), "few_at_once": ("few.cuh", "FEW_AT_ONCE")}
LIMITS |= {"cores_dim": ("search.cuh", "CORES_DIM")}
WHERE = ("registers", "shared memory", "streamed")
Record = dict[str, Any]


def build() -> Any:
    """Return the module csrc/cuda/build.py."""
    return runpy.run_path(str(HERE / "build.py"))


def find_cuobjdump(nvcc: str | None) -> str | None:
    """Return the cuobjdump of nvcc's toolkit, of PATH, or of Triton; None if there is none."""
    places = [build()["toolkit"](nvcc) / "bin"] if nvcc else []
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = (shutil.which("cuobjdump", path=str(place)) for place in places)
    return next(filter(None, found), None) or shutil.which("cuobjdump")


def plain(mangled: str) -> str:
    """Return the name of a kernel as in the source, such as scan_cores<8>, for its mangled name."""
    found = re.match(r"_ZN6fastvq4cuda(\d+)", mangled)
    if found is None:
        raise ValueError(f"{mangled!r} is no kernel of fastvq::cuda")
    name = mangled[found.end() :]
    kernel, rest = name[: int(found[1])], name[int(found[1]) :]
    numbers = re.match(r"I((?:Li\d+E)+)E", rest)
    return kernel + ("<" + ", ".join(re.findall(r"Li(\d+)E", numbers[1])) + ">" if numbers else "")


def inner_loops(cuobjdump: str, device: str, objects: Path = BUILT) -> Iterator[tuple[str, collections.Counter[str]]]:
    """Yield each scan with the instruction counts of its innermost loop that multiplies."""
    command = [cuobjdump, "-sass", "-arch", device, str(objects / "search.cu.o")]
    listing = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    for part in re.split(r"\n\s+Function : ", listing)[1:]:
        kernel = plain(part.split("\n", 1)[0].strip())
        if not kernel.startswith("scan_"):
            continue
        program = read_sass(part, calls_leave=True)
        multiplies = re.compile("FFMA" if kernel.startswith("scan_cores") else "HMMA")
        for loop in sorted(natural_loops(program), key=len):
            if any(multiplies.match(program[place].name) for place in loop):
                yield kernel, collections.Counter(program[place].name.split(".")[0] for place in loop)
                break


def record_of(kernel: str, device: str, counts: collections.Counter[str]) -> Record:
    """Return the numbers of a scan that the model needs.

    Per distance: ALU instructions, those at half rate, float32 products and sums, bytes of shared memory. `products`
    is the number of products of float16 parts, 0 on CUDA cores; a turn of the loop takes `step` columns. The `rows` of
    a block, the codes of a `group` and `where` its rows are come from the source, with which tests/cuda/test_build.py
    compares them.
    """
    numbers = [int(number) for number in re.findall(r"\d+", kernel.partition("<")[2])]
    if kernel.startswith("scan_cores"):
        (columns,) = numbers
        # A distance takes `columns` multiply-adds: their number gives the distances of a turn.
        distances = (counts["FFMA"] + 2 * counts["FFMA2"]) / columns
        shape = {"products": 0, "step": columns, "rows": 512 if columns <= 8 else 256, "group": 32}
    else:
        parts, blocks, chunk, where, across = numbers
        distances = 32 * blocks  # a warp's 16 rows a block by 64 codes, of 32 lanes
        shape = {"products": 2 * parts - 1, "step": chunk, "rows": 64 * blocks // across, "group": 16}
        shape |= {"where": WHERE[where], "across": across}
    single, double = ("FFMA", "FMUL", "FADD"), ("FFMA2", "FMUL2", "FADD2")
    # Reads of one address by all lanes take a clock, four matrices four, and so does what a warp brings of 16 bytes.
    clocks = counts["LDS"] + 4 * counts["LDSM"] + 4 * counts["LDGSTS"]
    sums = {
        "alu": sum(count for name, count in counts.items() if name in ALU),
        "half_rate": sum(count for name, count in counts.items() if name in HALF_RATE),
        "float32": sum(counts[name] for name in single) + 2 * sum(counts[name] for name in double),
        "shared": SHARED_CLOCK * clocks / 32,
    }
    per_distance = {name: round(count / distances, 3) for name, count in sums.items()}
    return {"kernel": kernel, "target": device.rstrip("a"), **shape, **per_distance}


def limit(name: str) -> int:
    """Return a constant of the source."""
    file, constant = LIMITS[name]
    found = re.search(rf"\b{constant} = (\d+)\b", (HERE / file).read_text())
    if found is None:
        raise ValueError(f"{file}: no longer says {constant} = ...")
    return int(found[1])


def document(objects: Path = BUILT) -> dict[str, Any]:
    """Return the content that cuda_counts.json should have.

    Raises:
        RuntimeError: there is no nvcc, or no cuobjdump.
    """
    module = build()
    nvcc = module["find_nvcc"]()
    cuobjdump = find_cuobjdump(nvcc)
    if nvcc is None or cuobjdump is None:
        raise RuntimeError(f"needs {'nvcc' if nvcc is None else 'cuobjdump'}: CUDA_HOME, CUDA_PATH or PATH")
    records = [
        record_of(kernel, device, counts)
        for device in module["ARCHITECTURES"]
        for kernel, counts in inner_loops(cuobjdump, device, objects)
    ]
    records.sort(key=lambda r: (r["kernel"].partition("<")[0], [int(n) for n in re.findall(r"\d+", r["kernel"])]))
    return {"compiler": module["version"](nvcc), "limits": {name: limit(name) for name in LIMITS}, "records": records}


def differences(stored: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Describe where stored counts differ from the code: by more than a tenth, or by a scan that is new or gone."""
    hint = f"{COUNTS.name}, stored with {stored['compiler']}; python csrc/cuda/counts.py --write brings it up to date"
    before, now = ({(r["kernel"], r["target"]): r for r in d["records"]} for d in (stored, found))
    result = [f"{' '.join(key)}: isn't in {hint}" for key in now.keys() - before.keys()]
    result += [f"{' '.join(key)}: is only in {hint}" for key in before.keys() - now.keys()]
    result += [
        f"{name}: is {now_limit}, but {stored['limits'].get(name)} in {hint}"
        for name, now_limit in found["limits"].items()
        if stored["limits"].get(name) != now_limit
    ]
    for key in before.keys() & now.keys():
        for what, new in now[key].items():
            old = before[key].get(what)
            if old != new and not (isinstance(old, float) and abs(new - old) <= TOLERANCE * old):
                result.append(f"{' '.join(key)}: {what} is {new}, but {old} in {hint}")
    return sorted(result)


def main(arguments: list[str] | None = None) -> int:
    """Build, count, print, and return 1 where the stored counts differ."""
    parser = argparse.ArgumentParser(prog="python csrc/cuda/counts.py", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"store the counts in {COUNTS.name}")
    options = parser.parse_args(arguments)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch: needed to build against, and not installed")
    build()["build"](BUILT, Path(spec.origin).parent, os.environ.get("CXX") or "g++")
    found = document()
    for r in found["records"]:
        print(
            f"{r['kernel']:24} {r['target']:7} {r['alu']:6.2f} ALU instructions a distance,"
            f" {r['half_rate']:4.2f} of them at half rate, {r['shared']:5.2f} bytes of shared memory"
        )
    if options.write:
        lines = ",\n".join(json.dumps(r) for r in found["records"])
        head = f'{{"compiler": {json.dumps(found["compiler"])}, "limits": {json.dumps(found["limits"])}, "records": [\n'
        COUNTS.write_text(head + lines + "\n]}\n")
        print(f"written: {COUNTS}")
        return 0
    failures = differences(json.loads(COUNTS.read_text()), found)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
