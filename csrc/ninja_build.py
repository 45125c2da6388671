"""The builds of csrc/ by ninja, for setup.py and csrc/cuda/build.py, which run this module as a file.

Shells, ninja and the lists of headers that compilers write have different rules for spaces, quotes, dollar signs and
the like. Ninja therefore runs in the folder of the objects, where links with plain names lead to the sources and to
torch: no path of the user is ever part of a command, except those of the compilers, which are quoted.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class BuildError(RuntimeError):
    """Reason why a library is not built, with what to do about it as `remedy`."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def compiler_command(named: str | None, candidates: Sequence[str]) -> list[str]:
    """Return the compiler that CXX names, which may have arguments, or the first of the candidates that is installed.

    Raises:
        BuildError: there is none.
    """
    remedy = "install a C++17 compiler (Debian: apt install g++)"
    if named:
        command = [named] if shutil.which(named) else shlex.split(named)
        if command and shutil.which(command[0]):
            return command
        raise BuildError(f"no C++ compiler found: CXX={named}", f"set CXX to a compiler, or {remedy}")
    for name in candidates:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler found ({', '.join(candidates)})", remedy)


def find_ninja() -> str:
    """Return the path of ninja.

    Raises:
        BuildError: it is not installed.
    """
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise BuildError("ninja isn't installed", "pip install ninja, or install without --no-build-isolation")
    return found


def quoted(*words: str | Path) -> str:
    """Return the words as part of a command in a ninja file: quoted for the shell, with ninja's escape of "$"."""
    return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")


def prepare(objects: Path, links: Mapping[str, Path]) -> None:
    """Create the folder of the objects with links to folders elsewhere; objects of other folders are deleted."""
    for name, target in links.items():
        link = objects / name
        if link.is_symlink() and link.resolve() != target.resolve():
            shutil.rmtree(objects)
    objects.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        if not (objects / name).is_symlink():
            (objects / name).symlink_to(target.resolve(), target_is_directory=True)


def rule(name: str, command: str, *, headers: bool = True) -> list[str]:
    """Return the lines of a rule; with `headers`, its command lists those of each object in $out.d."""
    return [f"rule {name}", f"  command = {command}", *(["  depfile = $out.d", "  deps = gcc"] if headers else [])]


def run(objects: Path, lines: Sequence[str], *arguments: str) -> None:
    """Write build.ninja and run it.

    Raises:
        BuildError: ninja isn't installed. subprocess.CalledProcessError: a source does not compile.
    """
    ninja = find_ninja()
    (objects / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [ninja, "-C", str(objects), *arguments]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    try:
        subprocess.run(command, check=True, **piped)
    except subprocess.CalledProcessError as error:
        print(error.stdout, file=sys.stderr)
        raise
