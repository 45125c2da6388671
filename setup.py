"""Builds the native library: csrc/ compiled by ninja, once for each instruction set where it says so.

The library has no Python in it and stands on the LibTorch stable ABI, so one build serves every Python and every torch
from 2.10 on. Metadata is in pyproject.toml.

    FASTVQ_NATIVE=0   leave it out          FASTVQ_NATIVE=1   fail where it can't be built
    (unset)           build it where a C++ compiler and ninja are, go without it where they are not

The CUDA kernels are a library of their own, built by csrc/cuda/build.py.

    FASTVQ_CUDA=0     leave it out          FASTVQ_CUDA=1     fail where it can't be built
    (unset)           build it where nvcc is and torch is a CUDA build

fastvq/backends/environment.py reads these variables.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA = ROOT / "csrc" / "cuda"
LIBRARY = "_native.so"
BUILD_RECORD = "native_build.json"
ENVIRONMENT = runpy.run_path(str(ROOT / "fastvq" / "backends" / "environment.py"))
NINJA = runpy.run_path(str(ROOT / "csrc" / "ninja_build.py"))
BuildError = NINJA["BuildError"]
try:
    WANTED = ENVIRONMENT["read"](os.environ, when_built=True)
except ValueError as error:
    raise SystemExit(f"fastvq: {error}") from None
for line in ENVIRONMENT["unknown_names"](os.environ):
    print(f"fastvq: {line}", file=sys.stderr)
STABLE_ABI = "0x020a000000000000"  # torch 2.10

# No contraction: the float64 tier rounds each operation by definition. The cheap tiers are free to fuse.
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
SOURCES = [
    "search.cpp",
    "code_forms.cpp",
    "residual_search.cpp",
    "topk_search.cpp",
    "sample.cpp",
    "soft_assign.cpp",
    "frame.cpp",
    "packed.cpp",
    "row_block.cpp",
    "tier_pass.cpp",
    "projection.cpp",
    "projected_pass.cpp",
    "direct_pass.cpp",
    "int8_codes.cpp",
    "int8_pass.cpp",
    "definition.cpp",
    "quantize.cpp",
    "residual_quantize.cpp",
    "accumulate.cpp",
    "min_distance.cpp",
    "peak.cpp",
    "bindings/serve.cpp",
    "bindings/search.cpp",
    "bindings/packed.cpp",
    "bindings/quantize.cpp",
    "bindings/soft_assign.cpp",
    "bindings/learning.cpp",
]
ISA_FLAGS: dict[str, list[str]] = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx512f", "-mprefer-vector-width=512"]
    ISA_FLAGS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
    }


def torch_root() -> Path | None:
    """Return the torch to build against: that of the build environment, or that of the environment to install into.

    With build isolation the second cannot be imported, but its headers are all that the build needs, so nothing is
    downloaded where torch is installed already.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("platlib", "purelib")]
    for root in candidates:
        if (root / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return root
    return None


def has_cuda(torch: Path) -> bool:
    """Return whether `torch` is a CUDA build."""
    version = torch / "version.py"
    return version.exists() and re.search(r"^cuda\b[^=]*= *['\"]", version.read_text(), re.M) is not None


class BuildNative(build_ext):
    """Builds the native library, or records why the package goes without it."""

    def run(self) -> None:
        record: dict[str, object]
        try:
            if WANTED["FASTVQ_NATIVE"] == "0":
                raise BuildError("left out by FASTVQ_NATIVE=0 at build time", "unset FASTVQ_NATIVE")
            record = {"built": True} | self.build_native()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if WANTED["FASTVQ_NATIVE"] == "1":
                raise SystemExit(f"fastvq: FASTVQ_NATIVE=1, but the native library can't be built: {error}") from error
            record = not_built(error)
            print(f"fastvq: going without the native backend: {record['reason']}", file=sys.stderr)
            for stale in self.package_dir().glob("_native.*"):
                stale.unlink()
        record["cuda"] = self.cuda_record()
        target = self.package_dir() / BUILD_RECORD
        target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def cuda_record(self) -> dict[str, object]:
        wanted = WANTED["FASTVQ_CUDA"]
        library = self.package_dir() / "_native_cuda.so"
        library.unlink(missing_ok=True)
        if wanted == "0":
            return {"built": False, "reason": "left out by FASTVQ_CUDA=0 at build time"}
        torch = torch_root()
        if wanted is None and not (torch and has_cuda(torch)):
            return {"built": False, "reason": "torch was no CUDA build at build time; FASTVQ_CUDA=1 builds it anyway"}
        cuda = runpy.run_path(str(CUDA / "build.py"))
        objects = Path(self.build_temp).resolve() / "cuda"
        try:
            if torch is None:
                raise BuildError("no torch 2.10 or newer found to build against", "install torch")
            built = cuda["build"](objects, torch, os.environ.get("CXX"))
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise SystemExit(f"fastvq: FASTVQ_CUDA=1, but the CUDA kernels can't be built: {error}") from error
            return not_built(error)
        self.copy_file(str(objects / cuda["LIBRARY"]), str(library))
        return {"built": True, **built}

    def package_dir(self) -> Path:
        path = ROOT / "fastvq" if self.inplace or self.editable_mode else Path(self.build_lib) / "fastvq"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def get_outputs(self) -> list[str]:
        return [str(p) for p in self.package_dir().glob("_native*.so")] + [str(self.package_dir() / BUILD_RECORD)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def build_native(self) -> dict[str, object]:
        compiler = NINJA["compiler_command"](os.environ.get("CXX"), ("c++", "g++", "clang++"))
        torch = torch_root()
        if torch is None:
            raise BuildError("no torch 2.10 or newer found to build against", "install torch")
        objects = Path(self.build_temp).resolve()
        NINJA["prepare"](objects, {"csrc": ROOT / "csrc", "torch": torch})
        NINJA["run"](objects, ninja_lines(compiler))
        # By a new name: a process that runs has the old file mapped.
        partial = self.package_dir() / f".{LIBRARY}.{os.getpid()}"
        self.copy_file(str(objects / LIBRARY), str(partial))
        partial.replace(self.package_dir() / LIBRARY)
        version = subprocess.run([*compiler, "--version"], check=True, text=True, stdout=subprocess.PIPE).stdout
        return {"compiler": version.splitlines()[0], "instruction_sets": list(ISA_FLAGS)}


def not_built(error: Exception) -> dict[str, object]:
    """Return the record of a library that is not built: the reason, and what to do about it."""
    reason = getattr(error, "stdout", None) or str(error)
    remedy = getattr(error, "remedy", "mend what stopped the build")
    return {"built": False, "reason": reason.strip()[-2000:], "remedy": remedy}


def ninja_lines(compiler: list[str]) -> list[str]:
    """Return the ninja file that builds the library in a folder with links to csrc and to torch."""
    cxx = NINJA["quoted"](*compiler)
    include = ["-isystem torch/include", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    link = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
    link += ["-Ltorch/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    lines = NINJA["rule"]("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out")
    lines += NINJA["rule"]("link", f"{cxx} -shared $in -o $out {' '.join(link)}", headers=False)
    objects = []
    for source in SOURCES:
        objects.append(f"{source}.o")
        flags = [*COMMON, "-ffp-contract=off", *include]
        lines += [f"build {source}.o: cxx csrc/cpu/{source}", f"  flags = {' '.join(flags)}"]
    for isa, isa_flags in ISA_FLAGS.items():
        objects.append(f"isa_{isa}.o")
        flags = [*COMMON, "-ffp-contract=fast", f"-DFASTVQ_ISA={isa}", *isa_flags]
        lines += [f"build isa_{isa}.o: cxx csrc/cpu/isa.cpp", f"  flags = {' '.join(flags)}"]
    return [*lines, f"build {LIBRARY}: link {' '.join(objects)}"]


class PlatformWheel(bdist_wheel):
    """Tags the wheel by platform alone: the library has no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, plat = super().get_tag()
        return "py3", "none", plat


setup(
    packages=[*find_packages(include=["fastvq*"]), "fastvq.kernels"],
    py_modules=["fastvq_command"],
    package_dir={"fastvq.kernels": "kernels"},
    ext_modules=[Extension("fastvq._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    # Read by pip as a build requirement; only where there is no torch to build against.
    setup_requires=[] if WANTED["FASTVQ_NATIVE"] == "0" or torch_root() else ["torch>=2.10"],
)
