"""What is imported when: no torch before it is needed, and no layer, model or trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastvq
from fastvq import quantizers
from fastvq.cli.main import COMMANDS
from fastvq.compat import aliases

PATIENCE_S = 120
IDLE = ("clients", "models", "coding", "data", "training", "runs", "demo", "bench")
"""Packages that neither fastvq's functions nor a command without need of them imports."""


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(code: str) -> list[str]:
    """Return the modules that code imports in a process of its own."""
    return json.loads(printed(f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))").splitlines()[-1])


def command(*arguments: str) -> str:
    """Return code that does what the console script `fastvq` does."""
    return (
        f"import fastvq_command; sys.argv[1:] = {list(arguments)}\ntry: fastvq_command.main()\nexcept SystemExit: pass"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], ["wrong"], ["train"]),
        *([name, "--help"] for name in COMMANDS),
    ],
    ids=" ".join,
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    assert not {"torch", "numpy"} & set(modules(command(*arguments)))


@pytest.mark.parametrize("how", [["-m", "fastvq"], ["-mfastvq"], ["-I", "-m", "fastvq"]], ids=" ".join)
def test_help_of_the_module_imports_no_torch(how: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *how, "--help"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fastvq.cli.main" in loaded
    assert not {"torch", "numpy"} & loaded


@pytest.mark.parametrize("name", ["other", "fastvq.errors"])
def test_other_modules_that_are_run_find_the_ops(name: str, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("import fastvq")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", name],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
        cwd=tmp_path,
    )
    assert "fastvq.ops" in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("code", ["import fastvq", command("info")], ids=["import", "info"])
def test_other_rooms_wait_until_they_are_needed(code: str) -> None:
    loaded = [name for name in modules(code) if name.startswith("fastvq.")]
    assert "fastvq.ops" in loaded
    assert not [name for name in loaded if name.split(".")[1] in (*IDLE, *aliases.MODULES)]


@pytest.mark.parametrize(
    "before", ["import torch, fastvq", "import fastvq, torch", "import fastvq_command, fastvq.ops, torch"]
)
def test_the_package_registers_the_ops(before: str) -> None:
    assert printed(f"{before}; print(torch.ops.fastvq.search.default)") == "fastvq.search.default\n"


def test_every_public_name_is_there() -> None:
    assert not [name for name in fastvq.__all__ if not hasattr(fastvq, name)]
    assert set(fastvq.__all__) <= set(dir(fastvq))
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        fastvq.serach  # noqa: B018


def test_functions_and_layers_are_all_that_is_public() -> None:
    functions = {name for names in fastvq._FUNCTIONS.values() for name in names}
    assert functions | set(fastvq._LATER) | set(quantizers.__all__) == set(fastvq.__all__)
