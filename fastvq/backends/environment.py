"""The environment variables of fastvq: their names, their values, and the one place that reads them.

This module imports nothing of fastvq: setup.py runs it as a file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable; unset and empty mean the same."""

    values: tuple[str, ...]
    meaning: str
    when_built: bool = False  # read by setup.py, not by the package


VARIABLES = {
    "FASTVQ_BACKEND": Variable(("native", "triton", "torch", "reference"), "serve every op by this backend"),
    "FASTVQ_ISA": Variable(("portable", "avx2", "avx512", "avx512_vnni"), "instruction set of the native CPU kernels"),
    "FASTVQ_TIER": Variable(
        ("direct", "float32", "int16", "int8", "projected"), "precision that a native CPU search begins with"
    ),
    "FASTVQ_AUTOTUNE": Variable(("0", "1"), "1 times launch configurations of Triton kernels and keeps the fastest"),
    "FASTVQ_CUDA_PATH": Variable(
        ("automatic", "few", "cores", "matrix", "three_products", "define"), "kernels of a native CUDA search"
    ),
    "FASTVQ_NATIVE": Variable(
        ("0", "1"), "0 builds without the native CPU library, 1 fails where it can't be built", True
    ),
    "FASTVQ_CUDA": Variable(("0", "1"), "0 builds without the CUDA kernels, 1 fails where they can't be built", True),
}


_PREFIX = "FASTVQ_"


def read(environment: Mapping[str, str], *, when_built: bool = False) -> dict[str, str | None]:
    """Return the values of the variables that are read now, or else when fastvq is built; None if unset.

    Raises:
        ValueError: a variable has a value that it may not have.
    """
    values: dict[str, str | None] = {}
    for name, variable in VARIABLES.items():
        if variable.when_built != when_built:
            continue
        value = values[name] = environment.get(name) or None
        if value is not None and value not in variable.values:
            raise ValueError(f"{name}: must be one of {', '.join(variable.values)}, got {value!r}")
    return values


def unknown_names(environment: Mapping[str, str]) -> list[str]:
    """Return, for each variable that begins with FASTVQ_ and is none of ours, a sentence that says so."""
    found = []
    for name in sorted(environment):
        if name.startswith(_PREFIX) and name not in VARIABLES:
            near = difflib.get_close_matches(name[len(_PREFIX) :], [other[len(_PREFIX) :] for other in VARIABLES], 1)
            hint = f"did you mean {_PREFIX}{near[0]}?" if near else f"there are {', '.join(VARIABLES)}"
            found.append(f"{name}: fastvq has no such environment variable; {hint}")
    return found


_settings: dict[str, str | None] | None = None


def setting(name: str) -> str | None:
    """Return the value of a variable, read when fastvq is imported: later changes of the environment have no effect.

    Raises:
        ValueError: some variable has a value that it may not have.
    """
    global _settings
    if _settings is None:
        _settings = read(os.environ)
    return _settings[name]
