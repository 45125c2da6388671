"""Web pages of sections with texts, pictures and tables: index.html of a run or of the demo.

Titles and captions of pictures are text of the page, from the metadata of their files: on a narrow screen text stays
readable, while a picture keeps the width that its labels need and scrolls.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

from fastvq.files import StrPath, write_whole

from .figures import texts_of

PAGE = "index.html"
"""Name of the file in the folder of a run."""
_MOVING = '<img class="moving" src="{name}" alt="{text}">'
_SOUND = '<audio controls preload="none" src="{name}"></audio>'
_PLAYERS = {
    ".gif": _MOVING,
    ".webp": _MOVING,
    ".mp4": '<video controls loop muted src="{name}"></video>',
    ".flac": _SOUND,
    ".mp3": _SOUND,
    ".ogg": _SOUND,
    ".wav": _SOUND,
}
"""HTML element that plays a file, by its ending."""
_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h1, p, td, figcaption { overflow-wrap: anywhere; }
figure { margin: 1rem 0; overflow-x: auto; }
img { width: 100%; min-width: 40rem; height: auto; display: block; }
img.moving { image-rendering: pixelated; }
figure:has(audio) { display: inline-block; width: 18rem; margin: .3rem .8rem .3rem 0; } audio { width: 100%; }
figcaption { color: #444; font-size: .9rem; margin-top: .4rem; position: sticky; left: 0; }
figcaption b { color: #222; display: block; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } code { background: #f3f3f3; }
summary { cursor: pointer; }
"""


class Picture(NamedTuple):
    """A picture: its file within the folder of the page, and what it shows in words. Without a file it is left out."""

    name: str
    description: str


class TextTable(NamedTuple):
    """A table: texts above the columns, rows of texts, and, where it is folded away, the text that unfolds it."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""


class Media(NamedTuple):
    """Files to play: those within the folder of the page whose path begins with `start`, and what they are in words.

    Without a file it is left out.
    """

    start: str
    description: str


Part: TypeAlias = "str | Picture | Media | TextTable"
"""Part of a section; a text is a paragraph, in which words between backticks are code."""


class Section(NamedTuple):
    """Title and parts of a section."""

    title: str
    parts: Sequence[Part]


def write_page(
    folder: StrPath, title: str, introduction: str, sections: Sequence[Section], *, kind: str = "fastvq"
) -> Path:
    """Write `PAGE` beside the pictures that it shows, with its kind as the generator, and return its path."""
    folder = Path(folder)
    body = [f"<h1>{_text(title)}</h1>", f"<p>{_text(introduction)}</p>"]
    for section in sections:
        shown = [_shown(folder, part) for part in section.parts]
        body += [f"<h2>{_text(section.title)}</h2>", *(part for part in shown if part)]
    path = folder / PAGE
    head = (
        f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<meta name="generator" content="{html.escape(kind)}">'
    )
    lines = "\n".join(body)
    content = f'<!doctype html>\n<html lang="en">\n{head}\n<style>{_STYLE}</style>\n{lines}\n</html>\n'
    write_whole(path, content.encode(errors="replace"))
    return path


def _shown(folder: Path, part: Part) -> str:
    """Return a part as HTML, or an empty text for a picture without a file."""
    if isinstance(part, str):
        return f"<p>{_text(part)}</p>"
    if isinstance(part, TextTable):
        return _table(part)
    if isinstance(part, Media):
        files = sorted(path for path in folder.glob(f"{part.start}*") if path.suffix in _PLAYERS)
        return "".join(_player(path.relative_to(folder).as_posix(), path, part) for path in files)
    if not (folder / part.name).exists():
        return ""
    title, caption = texts_of(folder / part.name)
    bold = f"<b>{html.escape(title)}</b>" if title else ""
    below = f"<figcaption>{bold}{html.escape(caption)}</figcaption>" if title or caption else ""
    return f'<figure><img src="{quote(part.name)}" alt="{html.escape(part.description)}">{below}</figure>'


def _player(name: str, path: Path, part: Media) -> str:
    """Return a file that is played as HTML, with what its name adds to that of the others above it."""
    more = path.stem.removeprefix(Path(part.start).name).strip("-").replace("-", " ")
    text = html.escape(part.description + (f": {more}" if more else ""))
    content = _PLAYERS[path.suffix].format(name=quote(name), text=text)
    return f"<figure>{content}<figcaption>{text}</figcaption></figure>"


def _table(table: TextTable) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    content = "<table>" + line("th", table.heads) + "".join(line("td", row) for row in table.rows) + "</table>"
    return f"<details><summary>{_text(table.folded)}</summary>{content}</details>" if table.folded else content


def _text(text: str) -> str:
    """Return a text as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
