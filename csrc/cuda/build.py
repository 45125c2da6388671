"""Build of the native backend's CUDA library: csrc/cuda compiled by nvcc through ninja.

    python csrc/cuda/build.py OUT      builds into the directory OUT and prints what ptxas says of each kernel

Every build is also a check: warnings are errors, those of ptxas about spills and local memory among them. No GPU is
needed, and no torch with CUDA: the library stands on the LibTorch stable ABI. setup.py calls `build`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NINJA = runpy.run_path(str(HERE.parent / "ninja_build.py"))
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


def ninja_lines(nvcc: str, cxx: list[str], code: dict[str, str]) -> list[str]:
    """Return the ninja file that builds the library in a folder with links to csrc, to torch and to the runtime.

    `code` maps the name of each piece of code, an architecture or PTX, to nvcc's virtual architecture.
    """
    quoted = NINJA["quoted"]
    targets = [f"-gencode arch={virtual},code={name}" for name, virtual in code.items()]
    device = ["-O3", "-std=c++17", "-ccbin", quoted(cxx[0]), "-Xcompiler", HOST, *STRICT, *targets]
    names = " ".join(code)
    host = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    host += ["-isystem torch/include", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
    host.append(f"'-DFASTVQ_ARCHITECTURES=\"{names}\"'")
    link = ["-Wl,--no-as-needed", "-Ltorch/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    link += ["-Lruntime", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # What ptxas says is kept beside the object.
    compiled = f"{quoted(nvcc)} -MD -MF $out.d {' '.join(device)} -c $in -o $out"
    lines = NINJA["rule"]("nvcc", f"{compiled} > $out.log 2>&1 || {{ cat $out.log; exit 1; }}")
    lines += NINJA["rule"]("cxx", f"{quoted(*cxx)} -MMD -MF $out.d {' '.join(host)} -c $in -o $out")
    lines += NINJA["rule"]("link", f"{quoted(*cxx)} -shared $in -o $out {' '.join(link)}", headers=False)
    lines += [f"build {name}.o: nvcc csrc/cuda/{name}" for name in KERNELS]
    lines.append(f"build {BINDINGS}.o: cxx csrc/cuda/{BINDINGS}")
    return [*lines, f"build {LIBRARY}: link {' '.join(f'{name}.o' for name in (*KERNELS, BINDINGS))}"]


def build(
    out: Path, torch: Path, cxx: str | None = None, architectures: tuple[str, ...] = (*ARCHITECTURES, PTX)
) -> dict[str, object]:
    """Build `out`/_native_cuda.so against the torch at `torch`, and return what setup.py records about it.

    Args:
        out: the folder of the objects.
        torch: the folder of the package.
        cxx: the C++ compiler, or None for g++.
        architectures: what the library has code for, by names of ARCHITECTURES and PTX.

    Raises:
        RuntimeError: there is no nvcc, no C++ compiler or no ninja.
        subprocess.CalledProcessError: a source does not compile.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise NINJA["BuildError"]("no nvcc found in CUDA_HOME, CUDA_PATH or PATH", "install the CUDA toolkit")
    compiler = NINJA["compiler_command"](cxx, ("g++", "c++"))
    root = toolkit(nvcc)
    runtime = next((p for p in (root / "lib64", root / "lib") if (p / "libcudart_static.a").exists()), root / "lib64")
    NINJA["prepare"](out, {"csrc": HERE.parent, "torch": torch, "runtime": runtime})
    code = {name: name if name == PTX else f"compute_{name.removeprefix('sm_')}" for name in architectures}
    NINJA["run"](out, ninja_lines(nvcc, compiler, code), "-j", str(os.cpu_count() or 1))
    return {"compiler": version(nvcc), "architectures": list(architectures)}


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
    print(build(out, Path(spec.origin).parent, os.environ.get("CXX")))
    for entry in resources(out):
        print("{arch:8} {registers:>4} registers {stack:>3} stack {stores:>3} spilled  {name}".format(**entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
