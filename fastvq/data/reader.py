"""Files of one kind of data, and how they are read; importing it imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from fastvq.files import StrPath


class Format(Protocol):
    """The form that examples are brought to: a frozen dataclass, so that a cache entry is named by its fields."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels and size (C, *size) of a stored example."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class Reader:
    """Files of images, audio or video.

    Attributes:
        noun: the word for an example in messages, and its plural.
        suffixes: the endings of its files, in lower case with a dot.
        read: `read(path, format, content=None)` returns the examples of a file, (n, *format.shape) in the stored dtype:
            one for an image, one for each clip of a longer file. `content` is the file's bytes where it stands in an
            archive; `path` then only names it. Raises a DataError that names the file if it cannot be read.
        dtype: NumPy's name of the stored dtype.
        written: endings of the files that are written.
    """

    noun: tuple[str, str]
    suffixes: frozenset[str]
    read: Callable[[StrPath, Any, bytes | None], Tensor]
    dtype: str
    written: frozenset[str]

    def described(self) -> str:
        """Return the files as a message lists them."""
        return f"{self.noun[1]} (files that end in {', '.join(sorted(self.suffixes))})"
