"""Checks of constructor arguments, given by name so that messages name them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from torch import Tensor


def check_sizes(**sizes: Any) -> None:
    """Check that each argument is an integer, numpy's included, of at least 1.

    Raises:
        ValueError: an argument is not; the message names it.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not (isinstance(value, Integral) and int(value) >= 1):
            raise ValueError(f"{name}: must be an integer of at least 1, got {value!r}")


def check_tensors(**tensors: Any) -> None:
    """Check that each argument is a tensor.

    Raises:
        TypeError: an argument is not; the message names it.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: must be a tensor, got {type(value).__name__}")


def check_not_negative(**values: Any) -> None:
    """Check that no argument is negative or NaN.

    Raises:
        ValueError: an argument is; the message names it.
    """
    for name, value in values.items():
        if not _holds(lambda value: value >= 0, value):
            raise ValueError(f"{name}: must not be negative, got {value!r}")


def check_positive(**values: Any) -> None:
    """Check that each argument is a positive, finite number.

    Raises:
        ValueError: an argument is not; the message names it.
    """
    for name, value in values.items():
        if not _holds(lambda value: 0 < value < math.inf, value):
            raise ValueError(f"{name}: must be positive and finite, got {value!r}")


def check_fractions(**values: Any) -> None:
    """Check that each argument lies in [0, 1].

    Raises:
        ValueError: an argument does not; the message names it.
    """
    for name, value in values.items():
        if not _holds(lambda value: 0 <= value <= 1, value):
            raise ValueError(f"{name}: must lie in [0, 1], got {value!r}")


def check_callables(**values: Any) -> None:
    """Check that each argument that is given, not None, can be called, as modules can.

    Raises:
        ValueError: an argument cannot; the message names it.
    """
    for name, value in values.items():
        if not (value is None or callable(value)):
            raise ValueError(f"{name}: must be a module or a function, got {value!r}")


def _holds(condition: Callable[[Any], Any], value: Any) -> bool:
    """Return whether a condition holds for a value, which may be no number."""
    try:
        return bool(condition(value))
    except (TypeError, ValueError, RuntimeError):
        return False


@contextmanager
def in_the_name_of(layer: object) -> Iterator[None]:
    """Let a layer construct its stages from arguments of its own: one that they lack is an error in its name.

    Raises:
        TypeError: an argument is unknown; the message names the class of the layer instead of that of a stage.
    """
    try:
        yield
    except TypeError as error:
        message, count = re.subn(r"^\w+(?=\.__init__\(\) got an unexpected)", type(layer).__name__, str(error))
        if not count:
            raise
        raise TypeError(message) from None
