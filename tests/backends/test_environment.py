"""The environment variables: parsed once, strictly, and listed in one table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvq.backends import environment

ROOT = Path(__file__).parents[2]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize("name", environment.VARIABLES)
def test_only_listed_values_are_taken(name):
    variable = environment.VARIABLES[name]
    for value in variable.values:
        assert environment.read({name: value}, when_built=variable.when_built)[name] == value
    assert environment.read({name: ""}, when_built=variable.when_built)[name] is None
    assert environment.read({}, when_built=variable.when_built)[name] is None
    for value in ("junk", "false", "true", "2", " ", variable.values[0] + " ", variable.values[0].upper() + "X"):
        with pytest.raises(ValueError, match=rf"^{name}: must be one of {variable.values[0]}, .*, got '{value}'$"):
            environment.read({name: value}, when_built=variable.when_built)
    assert name not in environment.read({name: "junk"}, when_built=not variable.when_built)


def test_a_wrong_value_is_an_error_of_the_import():
    run = python("import fastvq", FASTVQ_AUTOTUNE="false")
    assert run.returncode == 1
    assert run.stderr.endswith("ValueError: FASTVQ_AUTOTUNE: must be one of 0, 1, got 'false'\n")


def test_a_wrong_value_is_one_line_of_a_command():
    code = "import sys, fastvq_command; sys.argv = ['fastvq', 'info']; sys.exit(fastvq_command.main())"
    run = python(code, FASTVQ_TIER="junk")
    assert run.returncode == 2
    assert run.stderr == "fastvq: FASTVQ_TIER: must be one of direct, float32, int16, int8, projected, got 'junk'\n"


def test_it_is_read_once_and_an_unknown_name_is_a_warning():
    code = "import os, fastvq; os.environ['FASTVQ_BACKEND'] = 'junk'; from fastvq.backends import select;"
    run = python(code + "print(select.requested())", FASTVQ_BACKEND="torch", FASTVQ_BACKENDS="native")
    assert run.stdout == "torch\n"
    assert "UserWarning: FASTVQ_BACKENDS: fastvq has no such environment variable; did you mean FASTVQ_BACKEND?" in (
        run.stderr
    )


def test_unknown_names():
    (sentence,) = environment.unknown_names({"FASTVQ_XYZZY": "", "PATH": "", "FASTVQ_BACKEND": ""})
    assert sentence.startswith("FASTVQ_XYZZY: fastvq has no such environment variable; there are FASTVQ_BACKEND, ")


def test_nothing_else_reads_them():
    """Python code asks `fastvq.backends.environment`; the compiled libraries read what that has accepted."""
    readers = [ROOT / "setup.py", *(ROOT / "fastvq").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    asked = re.compile(r"(environ\[|environ\.get\(|getenv\()[^\n]*FASTVQ_")
    assert not [str(path) for path in readers if asked.search(path.read_text())]
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.c*"))
    assert set(re.findall(r'getenv\("(FASTVQ_\w+)"\)', sources)) <= set(environment.VARIABLES)


def test_the_table_of_the_documentation():
    lines = (ROOT / "docs" / "environment.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| `FASTVQ_")]
    listed = {row[0].strip(" `"): tuple(re.findall(r"`([^`]+)`", row[1])) for row in rows}
    assert listed == {name: variable.values for name, variable in environment.VARIABLES.items()}
