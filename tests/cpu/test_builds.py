"""The native sources built in other ways than the package builds them, and run outside Python."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cpu"
ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f"],
    "avx512_vnni": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
}
X86 = platform.machine() == "x86_64"
CHECKS = ("check_search", "check_bound", "check_quantize", "check_ranking", "check_soft_assign")
# Most of the time is the compiler's: -Og takes a third of what -O1 does, and -g1 has the lines that a report names.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-Og"]


def compiler(*names: str) -> str:
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"needs one of {', '.join(names)}")


def compile_all(cxx: str, out: Path, sources: list[tuple[Path, str, list[str]]], *flags: str) -> list[str]:
    """Objects of (source, name, own options), two at a time."""

    def build(source: Path, name: str, own: list[str]) -> str:
        command = [cxx, "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", *own, *flags]
        subprocess.run([*command, "-c", str(source), "-o", str(out / name)], check=True)
        return str(out / name)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, *zip(*sources, strict=True)))


def isa_sources(isas: list[str]) -> list[tuple[Path, str, list[str]]]:
    source = CSRC / "isa.cpp"
    return [(source, f"isa_{isa}.o", ["-ffp-contract=fast", f"-DFASTVQ_ISA={isa}", *ISAS[isa]]) for isa in isas]


def run_checks(cxx: str, out: Path, isas: list[str], *flags: str, runner: tuple[str, ...] = ()) -> None:
    """Build the torch-free sources with `flags` and run the programs of tests/cpu on them."""
    exact = ["-ffp-contract=off"]
    kernels = [path for path in sorted(CSRC.glob("*.cpp")) if path.name not in ("isa.cpp", "bindings.cpp")]
    sources = isa_sources(isas) + [(path, path.stem + ".o", exact) for path in kernels]
    objects = compile_all(cxx, out, sources, *flags)
    programs = [(ROOT / "tests" / "cpu" / f"{name}.cpp", name + ".o", exact) for name in CHECKS]
    for name, main in zip(CHECKS, compile_all(cxx, out, programs, *flags), strict=True):
        subprocess.run([cxx, *flags, main, *objects, "-o", str(out / name)], check=True)
        done = subprocess.run([*runner, out / name], text=True, capture_output=True)
        print(done.stdout, done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"^\d+ cases, 0 wrong$|^0 broken$", done.stdout, re.M)


def test_exact_and_clean_under_sanitizers(tmp_path):
    run_checks(compiler("g++", "clang++"), tmp_path, list(ISAS) if X86 else ["portable"], *SANITIZE)


def test_exact_on_aarch64(tmp_path):
    """By the cross compiler and the user-mode emulator of Debian's g++-aarch64-linux-gnu and qemu-user."""
    if platform.machine() == "aarch64":
        run_checks(compiler("g++", "clang++"), tmp_path, ["portable"], "-O2")
    else:
        cxx, emulator = compiler("aarch64-linux-gnu-g++"), compiler("qemu-aarch64", "qemu-aarch64-static")
        run_checks(cxx, tmp_path, ["portable"], "-O2", "-static", runner=(emulator,))


@pytest.mark.skipif(not X86, reason="one instruction set on this processor: nothing can be mixed up")
def test_instruction_sets_define_no_symbol_that_another_file_could_pick_up(tmp_path):
    """A weak or common symbol compiled for AVX-512 could replace the portable one at link time."""
    nm = compiler("nm")
    for built in compile_all(compiler("g++", "clang++"), tmp_path, isa_sources(list(ISAS)), "-O3"):
        lines = subprocess.run([nm, "-C", built], check=True, text=True, capture_output=True).stdout.splitlines()
        defined = [line for line in lines if " T " in line]
        assert not [line for line in lines if any(f" {kind} " in line for kind in "WVuC")]
        assert len(defined) == 1
        assert "_isa()" in defined[0]


# Without optimization, and each source once for all builds of the test: what is tested are the paths.
CACHING = """#!/bin/sh
for word; do [ "$last" = -o ] && out=$word; last=$word; done
case "$out" in
  *.o)
    kept=$(dirname "$0")/$(echo "$out" | tr / _)
    if [ -f "$kept" ]; then cp "$kept" "$out"; echo "$out:" > "$out.d"; exit; fi
    {cxx} "$@" -O0 && cp "$out" "$kept" ;;
  *) {cxx} "$@" ;;
esac
"""
USE = """
import json, pathlib, sys, fastvq, torch
from fastvq.backends import native
folder = pathlib.Path(fastvq.__file__).parent
assert folder == pathlib.Path(sys.argv[1]) / "fastvq", folder
record = json.loads((folder / "native_build.json").read_text())
assert record["built"], record
assert native.instruction_set()
x = torch.eye(3)
with fastvq.use_backend("native"):
    assert fastvq.search(x, x).tolist() == [0, 1, 2]
"""


def test_builds_in_a_folder_of_any_name(tmp_path):
    """From an sdist and in place, built, installed and imported in such folders, temporary files included."""
    odd = tmp_path / "a b'c\"d$HOME $e%41;f(g)#h~ü雪"
    clone, temporary, site = odd / "clone", odd / "tmp dir", odd / "site packages"
    clone.mkdir(parents=True)
    temporary.mkdir()
    cxx = tmp_path / "c++"
    cxx.write_text(CACHING.replace("{cxx}", str(compiler("g++", "clang++"))))
    cxx.chmod(0o755)
    for name in ("setup.py", "fastvq_command.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, clone)
    for name in ("fastvq", "kernels", "csrc"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("*.so", "native_build.json"))
    environment = os.environ | {"CXX": str(cxx), "FASTVQ_CUDA": "0", "FASTVQ_NATIVE": "", "TMPDIR": str(temporary)}

    def python(folder: Path, *arguments: str, **more: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    install = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-build-isolation", "--no-deps")
    python(clone, "setup.py", "-q", "sdist", "--dist-dir", str(odd / "dist"))
    (archive,) = (odd / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, odd / "unpacked")
    (unpacked,) = (odd / "unpacked").iterdir()
    python(unpacked, *install, "--target", str(site), ".")
    python(odd, "-c", USE, str(site), PYTHONPATH=str(site))
    python(clone, "setup.py", "-q", "build_ext", "--inplace")
    python(odd, "-c", USE, str(clone), PYTHONPATH=str(clone))
