"""Every kernel compiled for every GPU that it is shipped for, without one: `python -m fastvq.kernels.aot`.

    compile    aot_cases() of the modules beside this one, in two worker processes, none of which may interpret
    measure    registers, shared memory, spills, matrix instructions; arithmetic of the loops that scan codes
    check      a spill in a hot kernel, too much shared memory, no matrix instruction, a fused definition: all fail
    compare    with counts.json, which `--write` brings up to date, and from which `fastvq bench --model` predicts

The counts describe the compiled code, not its speed. A module's `aot_cases()` returns tuples of kernel, types
by argument ("*fp32", "i32", "i32:16" for a multiple of 16; pointers are aligned to 16 bytes), constants and options.
The options are Triton's and:

    hot      no spills and no stack, which elsewhere are only listed
    matrix   a matrix instruction must be there; with constants BLOCK_N and BLOCK_K, the loop around it scans codes
    exact    float64 products and sums must stay apart
    arch     names of TARGETS that it is shipped for, if not all
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

from fastvq.files import write_whole

from .assembly import TARGETS, Record, is_scan, measure_amd, measure_sass, occupancy

COUNTS = Path(__file__).with_name("counts.json")
NO_KERNELS = {"aot", "assembly", "certify", "copies", "launch", "numbers", "rotation", "scan", "signatures"}
"""Modules without a kernel of their own: device functions, and the parameters of launches."""
OWN_OPTIONS = ("hot", "matrix", "exact", "arch")
TOLERANCE = 0.1
WORKERS = 2

Task = tuple[str, int, str]
"""A module or a file, the place in its cases, and a target."""


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, and return 1 where anything fails."""
    parser = argparse.ArgumentParser(prog="python -m fastvq.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this; may be repeated")
    parser.add_argument("--cases", type=Path, metavar="FILE", help="aot_cases() of this file in place of the package's")
    parser.add_argument("--write", action="store_true", help=f"store the counts in {COUNTS.name}")
    options = parser.parse_args(arguments)
    if options.write and (options.target or options.cases):
        parser.error("--write stores the counts of all cases on all targets")
    # The workers inherit it. Triton reads both when it is imported, which has not happened yet in this process.
    if "triton" in sys.modules:
        raise RuntimeError("triton is imported already, maybe as an interpreter: run this in a process of its own")
    if os.environ.pop("TRITON_INTERPRET", None) == "1":
        print("TRITON_INTERPRET=1 is ignored here: nothing runs, all is compiled", file=sys.stderr)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

    sources = [str(options.cases)] if options.cases else modules()
    targets = options.target or list(TARGETS)
    version = importlib.metadata.version("triton")
    tasks, failures = list_tasks(sources, targets)
    print(f"{len(tasks)} compilations by {WORKERS} workers: minutes, where few are in Triton's cache", file=sys.stderr)
    records = compile_all(tasks)
    for record in records:
        failures += faults(record)
    print(table(records))
    if options.write:
        write_whole(COUNTS, dump(records, version))
        print(f"written: {COUNTS}")
    elif not options.cases:
        stored = json.loads(COUNTS.read_text()) if COUNTS.exists() else {"triton": None, "records": []}
        failures += differences([r for r in stored["records"] if r["target"] in targets], records, stored["triton"])
    optional = [f for f in failures if any(f.startswith(f"{t}: ") for t, spec in TARGETS.items() if spec.optional)]
    for failure in failures:
        print(f"note: {failure}" if failure in optional else f"FAILED {failure}")
    found = len(failures) - len(optional)
    print(f"{len(records)} compilations, {found} failures, {len(optional)} notes about optional targets")
    return 1 if found else 0


def modules() -> list[str]:
    """Return the modules of this package that launch kernels."""
    package = importlib.import_module(__package__)
    return sorted(
        f"{__package__}.{found.name}"
        for found in pkgutil.iter_modules(package.__path__)
        if found.name not in NO_KERNELS
    )


def list_tasks(sources: Iterable[str], targets: Iterable[str]) -> tuple[list[Task], list[str]]:
    """Return the compilations to make, found by a worker, and the cases that are missing."""
    tasks: list[Task] = []
    failures: list[str] = []
    listed: set[str] = set()
    launches: dict[str, set[str]] = {}
    with _workers(1) as pool:
        for source in sources:
            try:
                shipped, launches[source] = pool.submit(contents, source).result()
            except BrokenProcessPool:
                raise
            except Exception as error:
                failures.append(f"{source}: {error}")
                continue
            listed |= {name for name, _ in shipped}
            for place, (name, chosen) in enumerate(shipped):
                unknown = [target for target in chosen or [] if target not in TARGETS]
                failures += [f"{source}: {name}: no target is named {u!r}, only {', '.join(TARGETS)}" for u in unknown]
                tasks += [
                    (source, place, target)
                    for target in targets
                    if (not TARGETS[target].named_only if chosen is None else target in chosen)
                ]
    for source, names in launches.items():
        missing = sorted(names - listed)
        failures += [f"{source}: {name} is launched, but no aot_cases() have a case of it" for name in missing]
    return tasks, failures


def contents(source: str) -> tuple[list[tuple[str, list[str] | None]], set[str]]:
    """(kernel and targets of each case of a module, names of the kernels that it launches). In a worker."""
    module = load(source)
    if not hasattr(module, "aot_cases"):
        raise LookupError("has no aot_cases(): which kernels does it ship? [] says none")
    cases = [(kernel.__name__, options.get("arch")) for kernel, *_, options in module.aot_cases()]
    return cases, launched(inspect.getsource(module))


def launched(text: str) -> set[str]:
    """Names that a module calls as kernels: name[grid](...)."""
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}


@functools.cache
def load(source: str) -> ModuleType:
    """Import a module by its name, or from a file."""
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _workers(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def compile_all(tasks: list[Task]) -> list[Record]:
    """Return a record for each distinct task.

    Where the compiler crashes its process, a single worker continues, so that the task at fault is known.
    """
    done: dict[Task, Record] = {}
    with _workers(WORKERS) as pool:
        futures = {task: pool.submit(compile_case, *task) for task in tasks}
        for task, future in futures.items():
            try:
                done[task] = future.result()
            except BrokenProcessPool:
                break
    while left := [task for task in tasks if task not in done]:
        with _workers(1) as pool:
            futures = {task: pool.submit(compile_case, *task) for task in left}
            for task, future in futures.items():
                try:
                    done[task] = future.result()
                except BrokenProcessPool:
                    source, place, target = task
                    kernel = f"case {place} of {source}"
                    done[task] = {"kernel": kernel, "config": {}, "target": target, "error": "the compiler crashed"}
                    break
    told = {_key(record): record for record in done.values()}
    return sorted(told.values(), key=lambda r: (r["kernel"], list(TARGETS).index(r["target"]), _key(r)))


def compile_case(source: str, place: int, target: str) -> Record:
    """Compile one case and measure the result. In a worker."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, options = load(source).aot_cases()[place]
    own = {name: options[name] for name in OWN_OPTIONS if name in options}
    passed = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    constants = {name: getattr(value, "value", value) for name, value in constants.items()}
    types = {name: str(signature.get(name, "constexpr")) for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(types.values()) if kind.startswith("*") or kind.endswith(":16")]
    record: Record = {
        "kernel": kernel.__name__,
        "config": constants | passed | {"types": " ".join(t.lstrip("*") for t in types.values() if t != "constexpr")},
        "target": target,
        **{name: bool(own.get(name)) for name in ("hot", "matrix", "exact")},
    }
    spec = TARGETS[target]
    try:
        made = triton.compile(
            ASTSource(
                fn=kernel,
                signature={name: kind.split(":")[0] for name, kind in types.items()},
                constexprs=constants,
                attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
            ),
            target=GPUTarget(spec.backend, spec.arch, spec.lanes),
            options=passed,
        )
    except Exception as error:
        return record | {"error": _said(error)}
    record |= {"threads": spec.lanes * made.metadata.num_warps, "shared": made.metadata.shared}
    if spec.backend == "cuda":
        usage, sass = _cuobjdump(made.asm["cubin"])
        record["tensor_memory"] = getattr(made.metadata, "tmem_size", None) or 0
        record["declared"] = sum(map(int, re.findall(r"__local_depot\d+\[(\d+)\]", made.asm["ptx"])))
        return record | measure_sass(usage, sass, record)
    return record | measure_amd(made.asm["amdgcn"], record)


def _said(error: BaseException) -> str:
    """Return the message of the first cause, which Triton wraps in others and puts behind the code."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path]
        return (
            subprocess.run([*command, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout,
            subprocess.run([*command, "-sass", file.name], check=True, capture_output=True, text=True).stdout,
        )


def name_of(record: Record) -> str:
    """Target, kernel and configuration, as failures name them."""
    return " ".join([f"{record['target']}: {record['kernel']}", *(_pair(*item) for item in record["config"].items())])


def _pair(key: str, value: Any) -> str:
    # The first type says which dtype the case is for.
    if key == "types":
        return f"types={value.split(' ')[0]}"
    return f"{key}={int(value) if isinstance(value, bool) else value}"


def faults(record: Record) -> list[str]:
    """Return the faults of one compiled kernel."""
    if "error" in record:
        return [f"{name_of(record)}: doesn't compile: {record['error']}"]
    spec = TARGETS[record["target"]]
    found = []
    if record["hot"] and (record["spills"] or record["stack"]):
        inside = f", {record['loop_spills']} of them in the loop" if "loop_spills" in record else ""
        declared = f", {record['declared']} declared by the code" if record.get("declared") else ""
        found.append(f"spills: {record['spills']} moves{inside}, {record['stack']} bytes of stack{declared}")
    if record["shared"] > spec.block_shared:
        found.append(f"takes {record['shared']} bytes of shared memory, a block has {spec.block_shared}")
    elif not occupancy(record)[0]:
        found.append(f"{record['registers']} registers for {record['threads']} threads: no block fits")
    if record["matrix"] and not record["matrix_instructions"]:
        found.append(f"has no matrix instruction ({spec.matrix})")
    elif is_scan(record) and "alu" not in record:
        found.append("has no loop with a matrix instruction in it")
    if record["exact"] and record["fused"]:
        found.append(f"has {record['fused']} fused float64 operations; the definition rounds each by itself")
    return [f"{name_of(record)}: {what}" for what in found]


def _key(record: Record) -> str:
    return json.dumps([record["kernel"], record["target"], record["config"]], sort_keys=True)


COMPARED = ("registers", "shared", "stack", "spills", "alu", "half_rate", "columns")


def differences(stored: list[Record], records: list[Record], version: str | None) -> list[str]:
    """Return the counts that differ from the stored ones by more than a tenth, and new or missing records."""
    hint = f"{COUNTS.name}, stored with triton {version}; python -m fastvq.kernels.aot --write brings it up to date"
    before, now = {_key(r): r for r in stored}, {_key(r): r for r in records if "error" not in r}
    found = [f"{name_of(now[k])}: isn't in {hint}" for k in now.keys() - before.keys()]
    found += [f"{name_of(before[k])}: is only in {hint}" for k in before.keys() - now.keys()]
    for k in before.keys() & now.keys():
        for what in COMPARED:
            old, new = before[k].get(what, 0), now[k].get(what, 0)
            if abs(new - old) > TOLERANCE * abs(old):
                found.append(f"{name_of(now[k])}: {what} is {new}, but {old} in {hint}")
    return sorted(found)


def dump(records: list[Record], version: str) -> str:
    """Return the content of counts.json: one line for each record."""
    kept = ("kernel", "target", "config", "threads", *COMPARED)
    lines = [json.dumps({name: r[name] for name in kept if name in r}) for r in records if "error" not in r]
    return f'{{"triton": "{version}", "records": [\n' + ",\n".join(lines) + "\n]}\n"


def table(records: list[Record]) -> str:
    """Everything, a line for each record; of the constants those that differ among a kernel's cases."""
    rows = [HEADERS]
    for r in records:
        if "error" in r:
            rows.append((r["kernel"], _label(r, records), r["target"], *[""] * (len(HEADERS) - 4), r["error"]))
            continue
        blocks, warps = occupancy(r)
        matrix = " ".join(f"{n} {name.split('::')[0]}" for name, n in r["matrix_instructions"].items())
        flags = " ".join(flag for flag in ("hot", "exact") if r[flag])
        spilled = f"{r['spills']}+{r['stack']}B" if r["spills"] or r["stack"] else "0"
        counts = [f"{r[what]:.2f}" if what in r else "" for what in ("alu", "half_rate", "columns")]
        numbers = [str(r["registers"]), str(r["shared"]), spilled, f"{blocks} x {r['threads']}", str(warps)]
        rows.append((r["kernel"], _label(r, records), r["target"], *numbers, *counts, flags, matrix))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


HEADERS = (
    "kernel", "configuration", "target", "registers", "shared", "spills", "blocks", "warps", "ALU/distance",
    "half rate", "columns", "", "matrix instructions",
)  # fmt: skip


def _label(record: Record, records: list[Record]) -> str:
    configs = [r["config"] for r in records if r["kernel"] == record["kernel"]]
    told = [key for key in record["config"] if any(c.get(key) != record["config"][key] for c in configs)]
    return " ".join(_pair(key, record["config"][key]) for key in told) or "-"


if __name__ == "__main__":
    sys.exit(main())
