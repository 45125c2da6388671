"""`fastvq.errors`: one base class, the built-in exceptions kept, and no import but the standard library's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastvq import errors

BUILT_IN = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "CheckpointError": RuntimeError,
    "CodebookError": ValueError,
    "CodingError": ValueError,
    "MissingExtraError": ImportError,
    "BackendError": RuntimeError,
    "BenchError": ValueError,
    "UnknownQuantizerError": ValueError,
    "WrongResultError": RuntimeError,
    "RanksError": RuntimeError,
    "MeasureError": RuntimeError,
}


@pytest.mark.parametrize(("name", "base"), BUILT_IN.items())
def test_each_error_is_a_fastvq_error_and_the_built_in_one(name: str, base: type[Exception]) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.FastvqError)
    assert issubclass(error, base)
    assert str(error("what to do")) == "what to do"


def test_no_exception_class_is_defined_elsewhere() -> None:
    package = Path(errors.__file__).parent
    found = {
        (path.name, node.name)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Exception"))
    }
    assert found == {("errors.py", name) for name in [*BUILT_IN, "FastvqError"]}


def test_the_module_needs_no_torch() -> None:
    code = (
        "import runpy, sys; names = runpy.run_path(sys.argv[1]); assert 'FastvqError' in names;"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(errors.__file__)], check=True)
