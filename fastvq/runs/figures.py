"""Figures in the layout and the text styles that all pictures share.

Figures are made without pyplot and so touch neither a display nor matplotlib's global state. Title and caption stand
above and below a figure; they are also in the metadata of PNG, PDF and SVG files, where `texts_of` finds them.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvq.errors import ConfigError
from fastvq.extras import require
from fastvq.files import StrPath, whole

BLUE, ORANGE, GRAY = "#2166ac", "#d6604d", "#777777"
SERIES = (BLUE, ORANGE, "#4d9221", GRAY, "#762a83", "#8c6d31")
"""Colors of lines and bars, one for each series."""
FORMATS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
"""Endings of the files that a figure can be written to."""
DPI = 130
"""Dots an inch of a file."""
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Properties of texts that hold names of files and data sets, in which "$" and "\\" are ordinary characters."""
POINTS = 72
"""Points an inch."""
LETTER, DIGIT = 0.58, 0.64
"""Mean width of a letter of matplotlib's font, and width of a digit, in units of its size."""
LINE = 1.35
"""Height of a line, in units of the font's size."""
CAPTION_SIZE, LABEL_SIZE = 9, 8
"""Sizes of fonts, in points."""
_TITLE_SIZE, _BOLD_LETTER = 12, 0.7
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MISSING = re.compile(r"Glyph (\d+) .* missing from")
_NAMED: set[str] = set()
"""Letters without a glyph that a warning has named."""


def check_format(path: StrPath) -> None:
    """Raise a ConfigError unless a figure can be written to `path`: its ending decides the format."""
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigError(f"out must end in {', '.join(FORMATS)}, got {path}")


def empty_figure(width: float, height: float, title: str, caption: str = "") -> Any:
    """Return an empty figure with a wrapped title above and a wrapped caption below, of those that are given.

    Width and height, in inches, are those of the panels with their labels; the texts add to the height.
    """
    title = _wrapped(title, width, _TITLE_SIZE * _BOLD_LETTER)
    caption = _wrapped(caption, width, CAPTION_SIZE * LETTER)
    lines = sum(size * (text.count("\n") + 1) for size, text in ((_TITLE_SIZE, title), (CAPTION_SIZE, caption)) if text)
    size = (width, height + 0.15 + lines * LINE / POINTS)
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=_TITLE_SIZE, fontweight="bold", **LITERAL)
    if caption:
        figure.supxlabel(caption, fontsize=CAPTION_SIZE, color="#444444", **LITERAL)
    return figure


def _wrapped(text: str, width: float, letter: float) -> str:
    """Wrap a text to a width in inches; a letter takes `letter` points."""
    return textwrap.fill(_printable(text), max(10, int((width - 0.3) * POINTS / letter)))


def _printable(text: str) -> str:
    """Return a text without the surrogates that stand for bytes of a file's name which are not UTF-8."""
    return text.encode(errors="replace").decode()


def label(name: str, letters: int) -> str:
    """Return a name in lines of at most `letters` letters: a path as its folder above its file.

    A longer line keeps its beginning and its end. A replacement character stands for a line break or the like.
    """
    folder, _, file = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _printable(name)).rpartition("/")
    return "\n".join(_elided(line, letters) for line in (folder, file) if line)


def _elided(text: str, letters: int) -> str:
    if len(text) <= letters:
        return text
    tail = (letters - 1) // 2
    return f"{text[: letters - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{text[-tail:] if tail else ''}"


def figure_with(width: float, height: float, title: str, caption: str, *, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure in the common layout, and its axes or row of axes."""
    figure = empty_figure(width, height, title, caption)
    return figure, figure.subplots(1, columns)


def save_figure(figure: Any, path: StrPath, caption: str = "", title: str = "") -> None:
    """Write a figure in the format of the path's ending, with its texts as metadata; the file is replaced as a whole.

    Raises:
        ConfigError: an ending that is not in `FORMATS`.
    """
    check_format(path)
    kind = Path(path).suffix.lower().lstrip(".")
    names = {"png": "Description", "svg": "Description", "pdf": "Subject"}
    texts = {names[kind]: _printable(caption), "Title": _printable(title)} if kind in names else {}
    metadata = {name: text for name, text in texts.items() if text} or None
    with whole(path) as file, _missing_letters_in_one_warning():
        figure.savefig(file, dpi=DPI, format=kind, metadata=metadata)


@contextlib.contextmanager
def _missing_letters_in_one_warning() -> Iterator[None]:
    """Warn of letters without a glyph, of each once, in place of matplotlib's warning for each at every drawing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing: set[str] = set()
    for one in caught:
        found = _MISSING.match(str(one.message))
        if found:
            missing.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing - _NAMED:
        letters = "".join(sorted(missing - _NAMED))
        _NAMED.update(missing)
        warnings.warn(f"the font of pictures has no glyphs for {letters}: boxes stand for them", stacklevel=1)


def texts_of(path: StrPath) -> tuple[str, str]:
    """Return title and caption in the metadata of a PNG file, empty where there are none."""
    with require("PIL.Image").open(path) as picture:
        return picture.info.get("Title", ""), picture.info.get("Description", "")
