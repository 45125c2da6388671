"""Arrays from .npy files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvq.errors import DataError, first_line

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastvq.files import StrPath


def read_array(path: StrPath, kind: type[np.generic] | None = None) -> npt.NDArray[Any]:
    """Return the array of an .npy file, mapped from disk.

    Args:
        path: the file.
        kind: `np.floating` or `np.integer`: what the elements must be; anything but Python objects by default.

    Raises:
        DataError: no such file, one of another format, or of other elements; the message says which.
    """
    import numpy as np

    path = Path(path)
    if path.suffix.lower() != ".npy":
        raise DataError(f"{path} must be an .npy file, as numpy.save writes one")
    if not path.is_file():
        raise DataError(f"{path} is not a file" if path.exists() else f"{path} doesn't exist")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as .npy: {_reason(path, error)}") from error
    if not isinstance(values, np.ndarray):
        raise DataError(f"{path} cannot be read as .npy: it is an archive of several arrays (.npz)")
    if kind is not None and not np.issubdtype(values.dtype, kind):
        raise DataError(f"{path} must hold {_ELEMENTS[kind.__name__]}, got {values.dtype}")
    return values


_ELEMENTS = {"floating": "floats", "integer": "integers"}


def _reason(path: Path, error: Exception) -> str:
    """Say why NumPy cannot read a file, in other words than its own where these are about pickles."""
    with path.open("rb") as file:
        start = file.read(6)
    if not start:
        return "it is empty"
    if start != b"\x93NUMPY":
        return "it has another format"
    if "pickle" in str(error) or "Python objects" in str(error):
        return "it holds Python objects, not numbers"
    return first_line(error)
