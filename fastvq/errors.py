"""Exceptions that fastvq raises for bad requests, files and data, and the wording of its messages and tables.

All exceptions derive from `FastvqError`. They stand in one module without imports of fastvq, so that any module may
raise and catch them. Each keeps the built-in exception it specializes as a second base. Arguments of layers and
functions raise plain ValueError and TypeError.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

_LISTED = 20


class FastvqError(Exception):
    """Base class of fastvq's own exceptions; the command line prints its message without a traceback."""


class ConfigError(FastvqError, ValueError):
    """Invalid setting; the message names it."""


class DataError(FastvqError, ValueError):
    """Unusable data set; the message says what to change."""


class SkippedFilesWarning(RuntimeWarning):
    """Warning that files were left out, as requested; the message names them."""


class CheckpointError(FastvqError, RuntimeError):
    """Missing or damaged checkpoint, or one of another run; the message says what to do."""


class CodebookError(FastvqError, ValueError):
    """Codebook without a finite code, so that no vector has a nearest one; the message names it."""


class CodingError(FastvqError, ValueError):
    """Indices that cannot be coded, or a file that cannot be decoded; the message says why."""


class MissingExtraError(FastvqError, ImportError):
    """Optional dependency that is not installed; the message says how to install it."""


class BackendError(FastvqError, RuntimeError):
    """Call that no backend can serve, or not the requested one; the message has the reasons."""


class RanksError(FastvqError, RuntimeError):
    """Loss of another process that works on the same task; the message says how to go on."""


class MeasureError(FastvqError, RuntimeError):
    """Measure that cannot be taken of these images or on this machine; the message is the reason."""


class BenchError(FastvqError, ValueError):
    """Request that cannot be benchmarked; the message names the argument."""


class UnknownQuantizerError(FastvqError, ValueError):
    """Model without a quantizer that `accelerate` knows; the message names what looks like one."""


class WrongResultError(FastvqError, RuntimeError):
    """Index returned by fastvq that differs from the specification's."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return "1 image" or "3 images"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def with_article(noun: str) -> str:
    """Return "an image" or "a video clip"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(lines: Sequence[str]) -> str:
    """Return lines below each other, indented; all but the first twenty as a number."""
    rest = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "".join(f"\n  {line}" for line in [*lines[:_LISTED], *rest])


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Return rows of texts as lines in columns, those numbered in `right` aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:>{width}}" if column in right else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
