"""The build: in folders of any name, without ninja or a compiler, and what the record says then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvq.backends import native

ROOT = Path(__file__).parents[1]
ODD = "a b'c\"d$HOME $e%41#f;g&h(i)*j\\k~ü雪"
"""A name that a shell, ninja and the lists of headers each read in their own way."""

# It takes every argument for what it must be, and notes what it was called with.
COMPILER = """#!/bin/sh
sources=0
while [ $# -gt 0 ]; do
  case "$1" in
    --version) echo "fake 1.0"; exit 0 ;;
    -o) out=$2; shift ;;
    -MF) headers=$2; shift ;;
    -isystem) [ -d "$2/torch" ] || { echo "no include folder $2" >&2; exit 1; }; shift ;;
    -L*) [ -d "${1#-L}" ] || { echo "no library folder $1" >&2; exit 1; } ;;
    -*) ;;
    *) [ -s "$1" ] || { echo "no file $1" >&2; exit 1; }; sources=$((sources + 1)) ;;
  esac
  shift
done
[ $sources -gt 0 ] || exit 1
echo object > "$out"
[ -z "$headers" ] || echo "$out: " > "$headers"
"""


@pytest.fixture
def clone(tmp_path):
    """Return a copy of the sources in a folder with an odd name."""
    folder = tmp_path / ODD / "fastvq"
    folder.mkdir(parents=True)
    for name in ("setup.py", "fastvq_command.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    built = shutil.ignore_patterns("*.so", "native_build.json", "__pycache__", "*.xz", "*.zip")
    for name in ("fastvq", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    return folder


def build(clone: Path, *options: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run build_ext in the clone and return what it printed and the record that it wrote."""
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={clone.parent / 'temp dir'}", *options]
    cleared = {"CXX": "", "FASTVQ_NATIVE": "", "FASTVQ_CUDA": "0"}
    done = subprocess.run(command, cwd=clone, env=os.environ | cleared | variables, capture_output=True, text=True)
    record = clone / "build lib" / "fastvq" / "native_build.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def fake_compiler(folder: Path) -> str:
    compiler = folder / "c ++$x'"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize("named", ["by its path", "with an argument"])
def test_a_folder_of_any_name(clone, named):
    compiler = fake_compiler(clone.parent)
    if named == "with an argument":
        link = clone.parent.parent / "c++"
        link.symlink_to(compiler)
        compiler = f"{link} -O0"
    done, record = build(clone, "--build-lib=build lib", CXX=compiler)
    assert record.get("built") is True, done.stderr
    assert record["compiler"] == "fake 1.0"
    assert (clone / "build lib" / "fastvq" / "_native.so").read_text() == "object\n"
    done, _ = build(clone, "--build-lib=build lib", CXX=compiler)  # again, in the folder with objects
    assert done.returncode == 0, done.stderr


def test_without_ninja(clone):
    hidden = clone / "hidden"
    hidden.mkdir()
    (hidden / "ninja.py").write_text("raise ImportError")
    compiler = fake_compiler(clone.parent)
    done, record = build(clone, "--build-lib=build lib", CXX=compiler, PYTHONPATH=str(hidden), PATH=str(hidden))
    assert done.returncode == 0
    assert (record["built"], record["reason"]) == (False, "ninja isn't installed")
    assert "pip install ninja" in record["remedy"]
    assert len(done.stderr.strip().splitlines()) < 5, done.stderr


@pytest.mark.parametrize(
    ("variables", "reason", "remedy"),
    [
        ({"FASTVQ_NATIVE": "0"}, "left out by FASTVQ_NATIVE=0", "unset FASTVQ_NATIVE, then install fastvq again"),
        ({"CXX": "no-such-c++"}, "no C++ compiler found: CXX=no-such-c++", "set CXX to a compiler, or install a C++17"),
    ],
)
def test_the_advice_fits_the_reason_and_pip_takes_it(clone, variables, reason, remedy, monkeypatch, tmp_path):
    done, record = build(clone, "--build-lib=build lib", **variables)
    assert done.returncode == 0
    assert not record["built"]
    monkeypatch.setattr(native, "build_record", lambda: record)
    _, said = native._load.__wrapped__()
    assert f"not built: {reason}" in said
    assert remedy in said
    assert said.endswith("in its clone: pip install --force-reinstall --no-deps .")
    assert ("compiler" in said) == ("CXX" in variables)


def test_what_is_asked_for_and_cannot_be_built_ends_the_build(clone):
    done, record = build(clone, "--build-lib=build lib", FASTVQ_NATIVE="1", CXX="no-such-c++")
    assert done.returncode == 1
    assert "fastvq: FASTVQ_NATIVE=1, but the native library can't be built: no C++ compiler found" in done.stderr
    assert not record


@pytest.mark.parametrize("name", ["FASTVQ_NATIVE", "FASTVQ_CUDA"])
def test_a_wrong_value_ends_the_build_in_one_line(clone, name):
    done, record = build(clone, **{name: "false"})
    assert done.returncode == 1
    assert done.stderr.strip() == f"fastvq: {name}: must be one of 0, 1, got 'false'"
    assert not record


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"built": 1}', "[" * 100_000, "\xff"])
def test_a_damaged_record_is_a_reason(content, monkeypatch, tmp_path):
    (tmp_path / "native_build.json").write_text(content, encoding="latin-1")
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    record = native.build_record.__wrapped__()
    assert not record["built"]
    assert str(tmp_path) in record["reason"]


def test_import_from_the_folder_around_a_clone(tmp_path):
    """A clone named fastvq is no empty namespace there, and does not hide an installed package."""
    (tmp_path / "fastvq").symlink_to(ROOT)
    installed = tmp_path / "site" / "fastvq"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("from fastvq.inner import VALUE")
    (installed / "inner.py").write_text("VALUE = 'the installed one'")
    code = (
        "import os, fastvq; print(getattr(fastvq, 'VALUE', os.path.realpath(fastvq.__file__))); fastvq.search;"
        "import fastvq.parts.beam"
    )
    for path, found in (
        ("", str(ROOT / "fastvq" / "__init__.py")),
        (str(installed.parent), "the insta"),
    ):
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.stdout.startswith(found), done.stderr
        assert (done.returncode == 0) == (path == "")


FINDER = """
import importlib.util, sys

class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, FILE) if name == "fastvq" else None

sys.meta_path.append(Finder)
"""


def test_an_editable_installation_is_found_from_the_folder_around_another_clone(tmp_path):
    """It has a finder of its own, which also serves fastvq.kernels: of two clones each would give a part."""
    (tmp_path / "fastvq").symlink_to(ROOT)
    (tmp_path / "other.py").write_text("VALUE = 'the installed one'")
    code = f"FILE = {str(tmp_path / 'other.py')!r}\n{FINDER}\nimport fastvq; print(fastvq.VALUE)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "the installed one\n", done.stderr


def test_threads_that_import_from_the_folder_around_a_clone_get_one_module(tmp_path):
    (tmp_path / "fastvq").mkdir()
    shutil.copy(ROOT / "__init__.py", tmp_path / "fastvq")
    (tmp_path / "fastvq" / "fastvq").mkdir()
    (tmp_path / "fastvq" / "fastvq" / "__init__.py").write_text("import time\ntime.sleep(0.3)\nVALUE = 1")
    code = """
import threading
found = []

def load():
    import fastvq
    found.append(fastvq.VALUE)

threads = [threading.Thread(target=load) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(found)
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[1, 1, 1]\n", done.stderr
