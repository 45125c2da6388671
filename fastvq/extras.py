"""Imports on demand: of optional dependencies, and of the names of a package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fastvq.errors import MissingExtraError


def require(module: str, extra: str = "train") -> Any:
    """Import and return a module that `pip install "fastvq-torch[EXTRA]"` installs.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'{module.partition(".")[0]} is missing: pip install "fastvq-torch[{extra}]"', name=error.name
        ) from error


def lazy_attributes(
    package: str, homes: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose names are imported when they are first used.

    Args:
        package: the package's `__name__`.
        homes: for each of its modules, the names that the package exports from it. The modules are attributes as well.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in homes:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *home_of})

    return __getattr__, __dir__
