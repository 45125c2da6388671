"""Modules of client packages, imported without the rest of their package and what that requires."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings

import pytest

UNUSED = {"encodec": ("torchaudio",), "vocos": ("torchaudio",)}
"""Packages that a package imports and that the tests don't need: empty modules stand for those that are absent."""


@functools.cache
def module(name: str):
    """Import a module, or skip the test. What the rest of its package requires need not be installed.

    If the package fails to import, empty packages with the same path stand for it while the module is imported.
    """
    parts = name.split(".")
    if importlib.util.find_spec(parts[0]) is None:
        pytest.skip(f"{parts[0]} isn't installed")
    absent = {one: types.ModuleType(one) for one in UNUSED.get(parts[0], ()) if importlib.util.find_spec(one) is None}
    sys.modules.update(absent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _import(name, parts)
    finally:
        for one in absent:
            del sys.modules[one]


def _import(name: str, parts: list[str]):
    before = set(sys.modules)
    try:
        return importlib.import_module(name)
    except ImportError:
        _forget(parts[0], before)
    try:
        for end in range(1, len(parts)):
            package = ".".join(parts[:end])
            found = importlib.util.find_spec(package)
            sys.modules[package] = importlib.util.module_from_spec(found)
        return importlib.import_module(name)
    finally:
        _forget(parts[0], before)


def _forget(package: str, before: set[str]) -> None:
    for loaded in [name for name in sys.modules if name.split(".")[0] == package and name not in before]:
        del sys.modules[loaded]
