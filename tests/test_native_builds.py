"""The native sources built in other ways than the package builds them, and run outside Python."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc" / "cpu"
ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f"],
    "avx512_vnni": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
}
X86 = platform.machine() == "x86_64"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]


def compiler(*names: str) -> str:
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"needs one of {', '.join(names)}")


def build_isas(cxx: str, out: Path, isas: list[str], *flags: str) -> list[str]:
    objects = []
    for isa in isas:
        objects.append(str(out / f"isa_{isa}.o"))
        options = ["-std=c++17", "-fPIC", "-ffp-contract=fast", f"-DFASTVQ_ISA={isa}", *ISAS[isa], *flags]
        subprocess.run([cxx, *options, "-c", str(CSRC / "isa.cpp"), "-o", objects[-1]], check=True)
    return objects


def build_check(cxx: str, out: Path, isas: list[str], *flags: str) -> Path:
    program = out / "check_search"
    sources = [
        str(ROOT / "tests" / "native" / "check_search.cpp"),
        *(str(path) for path in sorted(CSRC.glob("*.cpp")) if path.name not in ("isa.cpp", "bindings.cpp")),
    ]
    options = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", *flags]
    objects = build_isas(cxx, out, isas, "-Wall", "-Wextra", "-Werror", *flags)
    subprocess.run([cxx, *options, *sources, *objects, "-o", str(program)], check=True)
    return program


def test_exact_and_clean_under_sanitizers(tmp_path):
    cxx = compiler("g++", "clang++")
    program = build_check(cxx, tmp_path, list(ISAS) if X86 else ["portable"], *SANITIZE)
    done = subprocess.run([program], text=True, capture_output=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout


def test_exact_on_aarch64(tmp_path):
    """By the cross compiler and the user-mode emulator of Debian's g++-aarch64-linux-gnu and qemu-user."""
    cxx = compiler("g++") if platform.machine() == "aarch64" else compiler("aarch64-linux-gnu-g++")
    runner = [] if platform.machine() == "aarch64" else [compiler("qemu-aarch64", "qemu-aarch64-static")]
    program = build_check(cxx, tmp_path, ["portable"], "-O2", "-static")
    done = subprocess.run([*runner, program], text=True, capture_output=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout


@pytest.mark.skipif(not X86, reason="one instruction set on this processor: nothing can be mixed up")
def test_instruction_sets_define_no_symbol_that_another_file_could_pick_up(tmp_path):
    """A weak or common symbol compiled for AVX-512 could replace the portable one at link time."""
    nm = compiler("nm")
    for built in build_isas(compiler("g++", "clang++"), tmp_path, list(ISAS), "-O3"):
        lines = subprocess.run([nm, "-C", built], check=True, text=True, capture_output=True).stdout.splitlines()
        defined = [line for line in lines if " T " in line]
        assert not [line for line in lines if any(f" {kind} " in line for kind in "WVuC")]
        assert len(defined) == 1
        assert "_isa()" in defined[0]
