"""Implementations of the ops, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Ops = dict[str, Callable[..., Any]]
"""A backend's implementations, by the name of the op."""
