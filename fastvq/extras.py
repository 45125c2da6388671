"""Import of optional dependencies where they are used."""

from __future__ import annotations

import importlib
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
