"""Wording of messages: numbers of things, and lists of files."""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 20


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return "1 image" or "3 images"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(lines: Sequence[str]) -> str:
    """Return lines below each other, indented; all but the first twenty as a number."""
    rest = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "".join(f"\n  {line}" for line in [*lines[:_LISTED], *rest])
