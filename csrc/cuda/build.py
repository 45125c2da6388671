"""Builds the native backend's CUDA library: csrc/cuda compiled by nvcc through ninja.

    python csrc/cuda/build.py OUT      builds into the directory OUT and prints what ptxas says of each kernel

Every build is also a check: warnings are errors, those of ptxas about spills and local memory among them. No GPU is
needed, and no torch with CUDA: the library stands on the LibTorch stable ABI. setup.py calls `build`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = ("search.cu", "residual_search.cu", "accumulate.cu", "ema_update.cu", "min_distance.cu", "driver.cu")
BINDINGS = "bindings.cpp"
LIBRARY = "_native_cuda.so"
STABLE_ABI = "0x020a000000000000"  # torch 2.10
# A100 and what runs its code (8.6, 8.9); H100 and H200; B200. Later devices compile the PTX when they load it.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
PTX = "compute_100"
STRICT = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
HOST = "-Wall,-Wextra,-fPIC,-fvisibility=hidden"


def find_nvcc() -> str | None:
    """Return the nvcc of CUDA_HOME or CUDA_PATH, or of PATH; None if there is none."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if (root := os.environ.get(name)) and (found := shutil.which("nvcc", path=str(Path(root) / "bin"))):
            return found
    return shutil.which("nvcc")


def toolkit(nvcc: str) -> Path:
    """Return the directory with lib/libcudart_static.a; nvcc may be a link or a wrapper elsewhere."""
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], text=True, capture_output=True)
    found = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    return Path(found[1] if found else Path(nvcc).resolve().parent.parent).resolve()


def version(nvcc: str) -> str:
    """Return name and version of the compiler."""
    text = subprocess.run([nvcc, "--version"], check=True, text=True, capture_output=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return f"nvcc {found[1]}" if found else "nvcc"


def write_ninja(path: Path, nvcc: str, cxx: str, torch: Path, library: Path) -> None:
    """Write the ninja file that builds `library` against the torch at `torch`."""
    from ninja.ninja_syntax import Writer, escape_path

    def quoted(path: Path) -> str:
        return escape_path(str(path))

    code = [f"-gencode arch=compute_{arch[3:]},code={arch}" for arch in ARCHITECTURES]
    code.append(f"-gencode arch={PTX},code={PTX}")
    device = ["-O3", "-std=c++17", "-ccbin", cxx, "-Xcompiler", HOST, *STRICT, *code]
    names = " ".join([*ARCHITECTURES, PTX])
    host = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    host += [f"-isystem {quoted(torch / 'include')}", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
    host.append(f"'-DFASTVQ_ARCHITECTURES=\"{names}\"'")
    root = toolkit(nvcc)
    runtime = next((p for p in (root / "lib64", root / "lib") if (p / "libcudart_static.a").exists()), root / "lib64")
    link = ["-Wl,--no-as-needed", f"-L{quoted(torch / 'lib')}", "-ltorch", "-ltorch_cpu", "-lc10"]
    link += [f"-L{quoted(runtime)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    with path.open("w") as stream:
        ninja = Writer(stream)
        # What ptxas says is kept beside the object.
        logged = (
            f"{nvcc} -MD -MF $out.d {' '.join(device)} -c $in -o $out > $out.log 2>&1 || {{ cat $out.log; exit 1; }}"
        )
        ninja.rule("nvcc", logged, depfile="$out.d", deps="gcc")
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(host)} -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{cxx} -shared $in -o $out {' '.join(link)}")
        objects = [out for name in KERNELS for out in ninja.build(name + ".o", "nvcc", quoted(HERE / name))]
        objects += ninja.build(BINDINGS + ".o", "cxx", quoted(HERE / BINDINGS))
        ninja.build(quoted(library), "link", objects)


def build(out: Path, torch: Path, cxx: str) -> dict[str, object]:
    """Build `out`/_native_cuda.so against the torch at `torch`, and return what setup.py records about it.

    Raises:
        RuntimeError: there is no nvcc.
        subprocess.CalledProcessError: a source does not compile.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc found in CUDA_HOME, CUDA_PATH or PATH")
    out.mkdir(parents=True, exist_ok=True)
    write_ninja(out / "build.ninja", nvcc, cxx, torch, out / LIBRARY)
    from ninja import BIN_DIR

    command = [str(Path(BIN_DIR) / "ninja"), "-C", str(out), "-j", str(os.cpu_count() or 1)]
    try:
        subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.CalledProcessError as error:
        print(error.stdout, file=sys.stderr)
        raise
    return {"compiler": version(nvcc), "architectures": [*ARCHITECTURES, PTX]}


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def resources(out: Path) -> list[dict[str, str]]:
    """Return ptxas's report on each kernel in the last build into `out`.

    A record has the mangled name, device, registers, stack and spills.
    """
    logs = [(out / f"{name}.o.log").read_text() for name in KERNELS]
    return [found.groupdict() for log in logs for found in ENTRY.finditer(log)]


def main() -> int:
    """Build into the directory of the command line, and print the resources of each kernel."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch: needed to build against, and not installed")
    out = Path(sys.argv[1])
    print(build(out, Path(spec.origin).parent, os.environ.get("CXX") or "g++"))
    for entry in resources(out):
        print("{arch:8} {registers:>4} registers {stack:>3} stack {stores:>3} spilled  {name}".format(**entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
