"""Pictures of a VQ-VAE, each with a title, labels, and a caption that explains it.

All drawing with matplotlib is here and in `figures`; `pictures` and `sample_pictures` compute what is drawn. Title and
caption are left out where `captioned` is False, as on a web page that has them as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvq.errors import counted
from fastvq.files import StrPath

from .figures import (
    BLUE,
    CAPTION_SIZE,
    DIGIT,
    GRAY,
    LABEL_SIZE,
    LETTER,
    LINE,
    LITERAL,
    ORANGE,
    POINTS,
    SERIES,
    empty_figure,
    label,
    save_figure,
)

_SMALLEST_NUMBER = 5.0  # points, below which digits cannot be read
_FEW_POINTS = 30
_PAIR = ("original", "decoded")
_GAP = 14
"""Sides of an image divided by the gap between images."""
_WIDE = 2
"""Width over height beyond which pictures, such as the frames of a clip, get wider panels."""
_IN_LEGEND, _DRAWN_CODEBOOKS = 8, 4
"""Largest numbers of codebooks with a line in the legend, and with a grid in the picture of indices."""


def _show(axes: Any, image: Tensor, **options: Any) -> None:
    """Draw an image (C, H, W) in [0, 1] without ticks."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1, **options)
    axes.set_xticks([])
    axes.set_yticks([])


def _show_table(axes: Any, rows: Sequence[Sequence[Tensor]], below: float = 0.0) -> tuple[list[float], list[float]]:
    """Draw rows of images (C, H, W) in [0, 1], with room below each row in units of an image's width.

    Axes for each image would take seconds to lay out: all images are on one canvas.

    Returns:
        centers of the columns and upper edges of the rows, in pixels.
    """
    channels, height, width = rows[0][0].shape
    columns = max(map(len, rows))
    gap = max(1, min(height, width) // _GAP)
    right, down = width + gap, height + max(gap, math.ceil(below * width))
    canvas = torch.ones(channels, (len(rows) - 1) * down + height, columns * right - gap)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            canvas[:, row * down : row * down + height, column * right : column * right + width] = image.cpu()
        frames = [(column * right - 0.5, width) for column in range(len(images))]
        style = {"facecolor": "none", "edgecolor": "black", "linewidth": 0.8, "clip_on": False}
        axes.broken_barh(frames, (row * down - 0.5, height), **style)
    _show(axes, canvas)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return [column * right + (width - 1) / 2 for column in range(columns)], [
        row * down - 0.5 for row in range(len(rows))
    ]


def save_reconstructions(
    path: StrPath,
    originals: Tensor,
    restored: Tensor,
    names: Sequence[str],
    notes: Sequence[str],
    *,
    title: str,
    caption: str,
    captioned: bool = True,
) -> None:
    """Draw pairs of original and reconstruction, each with a note.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        originals, restored: (N, C, H, W), float in [0, 1].
        names: one for each image; paths have their folder above their file.
        notes: a text below each pair, such as its PSNR.
        title, caption: texts above and below the figure.
        captioned: whether title and caption stand in the figure.
    """
    height, width = originals.shape[2:]
    wide = width > _WIDE * height
    columns = min(max(1, 16 * height // width) if wide else 8, len(originals))
    rows = math.ceil(len(originals) / columns)
    panel = 3.2 if wide else 1.2 if columns > 4 else 1.7
    labels = [label(name, int(panel * POINTS / (LABEL_SIZE * LETTER)) - 1) for name in names]
    lines = 1 + max(text.count("\n") for text in labels)
    gap = max(1, height // 28)
    pairs = [
        torch.cat([original, torch.ones_like(original[:, :gap]), output], dim=1)
        for original, output in zip(originals, restored, strict=True)
    ]
    below = (lines + 2) * LABEL_SIZE * LINE / POINTS / panel
    tall = panel * (pairs[0].shape[1] / width + below)
    figure = empty_figure(max(6.0, panel * columns + 0.6), tall * rows, *((title, caption) if captioned else ("", "")))
    axes = figure.subplots()
    table = [pairs[first : first + columns] for first in range(0, len(pairs), columns)]
    centers, tops = _show_table(axes, table, below)
    style = {"ha": "center", "fontsize": LABEL_SIZE, "linespacing": LINE, **LITERAL}
    for number, (text, note) in enumerate(zip(labels, notes, strict=True)):
        x, y = centers[number % columns], tops[number // columns]
        axes.annotate(text, (x, y), (0, 3), textcoords="offset points", va="bottom", **style)
        axes.annotate(note, (x, y + pairs[0].shape[1]), (0, -3), textcoords="offset points", va="top", **style)
    halves = [(top + height / 2 + part * (height + gap), name) for top in tops for part, name in enumerate(_PAIR)]
    axes.set_yticks(*zip(*halves, strict=True), rotation=90, va="center", fontsize=9)
    save_figure(figure, path, caption, title)


def save_grid(
    path: StrPath,
    rows: Sequence[Tensor],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    title: str,
    caption: str,
    captioned: bool = True,
) -> None:
    """Draw rows of images, each row with its name at the left, each column with its name above.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        rows: (columns, C, H, W) each, float in [0, 1].
        row_names, column_names: one for each row and column; names of rows may be paths.
        title, caption: texts above and below the figure.
        captioned: whether title and caption stand in the figure.
    """
    columns = len(column_names)
    labels = [label(name, 18) for name in row_names]
    letters = max(len(line) for text in labels for line in (text.split("\n") or [""]))
    beside = 0.2 + letters * CAPTION_SIZE * LETTER / POINTS
    sides = rows[0].shape[2:]
    panel, ratio = (2.0, sides[0] / sides[1]) if sides[1] > _WIDE * sides[0] else (1.0, 1.0)
    height = (panel * ratio + 0.05) * len(rows) + 0.3
    figure = empty_figure(panel * columns + beside, height, *((title, caption) if captioned else ("", "")))
    axes = figure.subplots()
    centers, tops = _show_table(axes, [list(row) for row in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks(centers, column_names, fontsize=9, **LITERAL)
    axes.set_yticks([top + sides[0] / 2 for top in tops], labels, fontsize=9, **LITERAL)
    save_figure(figure, path, caption, title)


def save_samples(
    path: StrPath, images: Tensor, names: Sequence[str], *, title: str, caption: str, columns: int | None = None
) -> None:
    """Draw images in rows, each with its name above if there are names.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        images: (N, C, H, W), float in [0, 1].
        names: one for each image, or none.
        title, caption: texts above and below the figure.
        columns: images in a row, with room for names of some 16 letters; by default the figure is about a square.
    """
    height, width = images.shape[2:]
    panel = 1.2
    if columns is None:
        columns = min(max(1, math.ceil(math.sqrt(len(images) * height / width))), len(images))
        panel = max(0.9, 4.2 / columns)
    rows = math.ceil(len(images) / columns)
    labels = [label(name, int(panel * POINTS / (LABEL_SIZE * LETTER)) - 1) for name in names]
    lines = max((text.count("\n") + 1 for text in labels), default=0)
    below = (lines + 0.5) * LABEL_SIZE * LINE / POINTS / panel if lines else 0.0
    figure = empty_figure(panel * columns + 0.3, panel * (height / width + below + 1 / _GAP) * rows, title, caption)
    axes = figure.subplots()
    centers, tops = _show_table(axes, [list(row) for row in images.split(columns)], below)
    for number, text in enumerate(labels):
        place = (centers[number % columns], tops[number // columns])
        style = {"ha": "center", "va": "bottom", "fontsize": LABEL_SIZE, "linespacing": LINE, **LITERAL}
        axes.annotate(text, place, (0, 3), textcoords="offset points", **style)
    save_figure(figure, path, caption, title)


def _points(records: Sequence[dict[str, Any]], split: str, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the records that have a finite value."""
    return [
        (r["step"], r[key]) for r in records if r["split"] == split and r.get(key) is not None and math.isfinite(r[key])
    ]


def save_curves(
    path: StrPath,
    records: Sequence[dict[str, Any]],
    quality: tuple[str, str] = ("psnr_db", "PSNR (dB)"),
    *,
    codebook_size: float,
    title: str,
    noun: str = "images",
    captioned: bool = True,
) -> None:
    """Draw loss, quality and perplexity over the steps; a measure without records is left out.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        records: the lines of metrics.jsonl, at least one; those of split "test" are drawn as dots.
        quality: the measure of reconstructions: its name in the records, and that on its axis.
        codebook_size: K, the highest possible perplexity; of several codebooks, the mean.
        title: text above the figure.
        noun: the word for examples.
        captioned: whether title and caption stand in the figure.
    """
    panels = [
        (name, key, lines)
        for name, key in (("loss", "loss"), (quality[1], quality[0]), ("perplexity (codes)", "perplexity"))
        if (lines := {split: _points(records, split, key) for split in ("train", "test")}) != {"train": [], "test": []}
    ]
    caption = (
        f"The loss should fall until the learning rate reaches zero; dots (held-out {noun}) far from the line mean"
        " overfitting."
    )
    if any(key == "perplexity" for _, key, _ in panels):
        caption += f" Perplexity is the number of codes in effective use, at most {codebook_size:g}."
    figure = empty_figure(max(6.0, 3.7 * len(panels)), 3.6, *((title, caption) if captioned else ("", "")))
    for axes, (name, key, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _draw_splits(axes, lines, noun)
        if key == "loss":
            axes.set_yscale("log")
            # Plain numbers, those between the powers of ten only where there is room for them.
            axes.yaxis.set_major_formatter("{x:g}")
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
        if key == "perplexity":
            axes.axhline(codebook_size, color=GRAY, linestyle=":", label=f"uniform over {codebook_size:g}")
            axes.set_ylim(0, codebook_size * 1.08)
        axes.set_ylabel(name)
        _legend_above(axes, columns=2)
    save_figure(figure, path, caption, title)


def save_bits(
    path: StrPath,
    records: Sequence[dict[str, Any]],
    *,
    codebook_size: int | Sequence[int],
    title: str,
    noun: str = "images",
    captioned: bool = True,
) -> None:
    """Draw the bits per index of a prior over the steps of its training.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        records: the lines of metrics.jsonl; those of split "test" are drawn as dots.
        codebook_size: K, or K of each codebook; an index takes log2 K bits under the uniform distribution.
        title: text above the figure.
        noun: the word for examples.
        captioned: whether title and caption stand in the figure.
    """
    sizes = [*codebook_size] if isinstance(codebook_size, Sequence) else [codebook_size]
    uniform = sum(map(math.log2, sizes)) / len(sizes)
    over = f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    lines = {split: _points(records, split, "bits_per_index") for split in ("train", "test")}
    reached = f", {lines['test'][-1][1]:.2f} at the end" if lines["test"] else ""
    caption = (
        f"Bits per index of held-out {noun} under the prior (dots{reached}): fewer bits mean better predictions. Dots"
        " that rise again mean overfitting. The line is measured during training, with dropout, which costs bits: at"
        " first the dots may lie below it."
    )
    figure = empty_figure(8, 3.6, *((title, caption) if captioned else ("", "")))
    axes = figure.subplots()
    axes.axhline(uniform, color=GRAY, linestyle=":", label=f"uniform over {over} codes: {uniform:.2f} bits")
    _draw_splits(axes, lines, noun)
    axes.set_ylabel("bits per index")
    _legend_above(axes, columns=3)
    save_figure(figure, path, caption, title)


def _draw_splits(axes: Any, lines: dict[str, list[tuple[int, float]]], noun: str) -> None:
    """Draw records over the steps: a line for training batches, dots for held-out examples, whose word is given."""
    # A line of few points also shows the points: of one alone there would be nothing to see.
    dots = "o" if len(lines["train"]) < _FEW_POINTS else ""
    for split, line, marker, size, color, text in (
        ("train", "-", dots, 2.5, BLUE, "training batches"),
        ("test", "", "o", 4.5, ORANGE, f"held-out {noun}"),
    ):
        if lines[split]:
            style = {"linestyle": line, "marker": marker, "markersize": size, "color": color}
            axes.plot(*zip(*lines[split], strict=True), label=text, **style)
    last = max((step for points in lines.values() for step, _ in points), default=1)
    axes.set_xlim(0, 1.04 * max(1, last))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)


def _legend_above(axes: Any, *, columns: int) -> None:
    """Add a legend above the axes: within them it would cover a curve somewhere."""
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)


def save_usage(
    path: StrPath, counts: Sequence[Tensor], *, perplexity: float, title: str, captioned: bool = True
) -> None:
    """Draw the number of times that each code is chosen, most used first.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        counts: for each codebook, (K,) int64.
        perplexity: exp of the entropy of `counts`, averaged over codebooks.
        title: text above the figure.
        captioned: whether title and caption stand in the figure.
    """
    ordered = [own.sort(descending=True).values.tolist() for own in counts]
    codes = sum(map(len, ordered))
    unused = sum(count == 0 for own in ordered for count in own)
    one = len(ordered) == 1
    caption = (
        f"One {'bar per code' if one else 'line per codebook'}. A flat profile"
        f"{' near the dotted line' if one else ''} means that the whole codebook is used; a cliff, that it"
        f" has collapsed onto few codes. Here {unused} of {counted(codes, 'code')}"
        f" {'is' if unused == 1 else 'are'} unused; the {'' if one else 'mean '}perplexity is {perplexity:.0f}."
    )
    figure = empty_figure(9, 3.4, *((title, caption) if captioned else ("", "")))
    axes = figure.subplots()
    if one:
        axes.bar(range(codes), ordered[0], width=1.0, color=BLUE)
        mean = sum(ordered[0]) / max(1, codes)
        # Small means have decimals: "0 times each" would contradict the bars.
        text = f"{mean:.0f}" if mean >= 10 else f"{mean:.2g}"
        axes.axhline(mean, color=ORANGE, linestyle=":", label=f"uniform usage: {text} times each")
    for number, own in enumerate(ordered if not one else (), start=1):
        style = {"color": SERIES[(number - 1) % len(SERIES)], "alpha": 1 - 0.6 * (number - 1) / len(ordered)}
        label = f"codebook {number}" if number <= _IN_LEGEND else None
        axes.step(range(len(own)), own, where="mid", label=label, **style)
    axes.set_xlim(-0.5, max(map(len, ordered)) - 0.5)
    axes.set_xlabel("code, by rank")
    axes.set_ylabel("times chosen")
    _legend_above(axes, columns=1 if one else min(len(ordered), _IN_LEGEND))
    save_figure(figure, path, caption, title)


def code_colors(codebook: Tensor) -> Tensor:
    """Return an RGB color in [0, 1] for each code, (K, 3); similar codes get similar colors.

    The channels are the first three principal components of the codes, each spread evenly over the range by rank.
    """
    centered = codebook.detach().float().cpu() - codebook.detach().float().cpu().mean(0)
    rank = min(3, *centered.shape)
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:rank].T
    spread = components.argsort(0).argsort(0) / max(1, len(components) - 1)
    # Dark numbers are printed on these colors.
    return torch.nn.functional.pad(0.35 + 0.65 * spread, (0, 3 - rank), value=0.7)


def save_indices(
    path: StrPath,
    originals: Tensor,
    indices: Sequence[Tensor],
    restored: Tensor,
    codebooks: Sequence[Tensor],
    *,
    title: str,
    noun: str = "image",
    grid: tuple[int, ...] | None = None,
    captioned: bool = True,
) -> None:
    """Draw images, their indices as colored grids, and the reconstructions from these indices.

    The indices stand in their cells where these are large enough to read them. Of many codebooks, the first are drawn.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        originals, restored: (N, C, H, W), float in [0, 1].
        indices: for each codebook, (N, h, w) int64.
        codebooks: for each, (K, D), for the colors.
        title: text above the figure.
        noun: the word for an example.
        grid: shape of the indices of an example in the caption, by default h and w.
        captioned: whether title and caption stand in the figure.
    """
    shown = list(zip(indices, map(code_colors, codebooks), strict=False))[:_DRAWN_CODEBOOKS]
    count, height, width = indices[0].shape
    size = " x ".join(map(str, grid or (height, width)))
    grids = f"{size} indices below {len(codebooks[0])}"
    names = ["indices"]
    if len(indices) > 1:
        names = [f"indices, codebook {number}" for number in range(1, len(shown) + 1)]
        sizes = {(*own.shape[1:], len(codes)) for own, codes in zip(indices, codebooks, strict=True)}
        grids = f"{len(indices)} grids of indices"
        if len(sizes) == 1:
            grids = f"{len(indices)} grids of {size} indices below {len(codebooks[0])}"
        grids += f", the first {len(shown)} of which are shown" if len(shown) < len(indices) else ""
    caption = (
        f"Each {noun} becomes {grids}, and the right picture is decoded from"
        f" these{'' if len(shown) < len(indices) else ' alone'}. Similar colors stand for similar codes."
    )
    panel = 2.3
    columns = 2 + len(shown)
    ratio = min(1.0, max(height / width, originals.shape[2] / originals.shape[3]))
    figure = empty_figure(
        columns * panel + 0.4, (panel * ratio + 0.1) * count + 0.25, *((title, caption) if captioned else ("", ""))
    )
    for row, panels in enumerate(figure.subplots(count, columns, squeeze=False)):
        _show(panels[0], originals[row])
        for axes, (own, colors) in zip(panels[1:-1], shown, strict=True):
            _show_indices(axes, own[row], colors, panel)
        _show(panels[-1], restored[row])
        if row == 0:
            for axes, text in zip(panels, ("original", *names, "decoded from the indices"), strict=True):
                axes.set_title(text, fontsize=10)
    save_figure(figure, path, caption, title)


def save_sequences(
    path: StrPath,
    originals: Tensor,
    indices: Sequence[Tensor],
    restored: Tensor,
    codebooks: Sequence[Tensor],
    *,
    title: str,
    noun: str,
    captioned: bool = True,
) -> None:
    """Draw examples along time, their indices below as colored rows, and the reconstructions from these.

    The indices of a codebook are a row as wide as the picture above it, so that each stands below what it describes.

    Args:
        path: file to write, whose ending is in `figures.FORMATS`.
        originals, restored: (N, C, H, W), float in [0, 1], time along W.
        indices: for each codebook, (N, T) int64; codebooks may differ in T.
        codebooks: for each, (K, D), for the colors.
        title: text above the figure.
        noun: the word for an example.
        captioned: whether title and caption stand in the figure.
    """
    longest = max(own.shape[1] for own in indices)
    rows = []
    for own, codes in zip(indices, codebooks, strict=True):
        stretched = own.cpu()[:, torch.arange(longest) * own.shape[1] // longest]
        rows.append(code_colors(codes)[stretched])
    grids = torch.stack(rows, 1).movedim(-1, 1)  # [N, 3, Q, T]
    lengths = ", ".join(dict.fromkeys(str(own.shape[1]) for own in indices))
    caption = (
        f"Each {noun} becomes {lengths} indices{' of each codebook' if len(indices) > 1 else ''}, a row for each"
        " codebook from the first above, and the lower picture is decoded from these alone. Similar colors of a row"
        " stand for similar codes."
    )
    count, height = len(originals), 1.3
    ratios = [height, max(0.25, min(height, 0.14 * len(indices))), height]
    texts = (title, caption) if captioned else ("", "")
    figure = empty_figure(3.4 * count + 0.4, sum(ratios) + 0.5, *texts)
    panels = figure.subplots(3, count, squeeze=False, height_ratios=ratios)
    for column in range(count):
        names = ("original", "indices", "decoded")
        for axes, picture, name in zip(panels[:, column], (originals, grids, restored), names, strict=True):
            _show(axes, picture[column], aspect="auto", interpolation="nearest")
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
    save_figure(figure, path, caption, title)


def _show_indices(axes: Any, indices: Tensor, colors: Tensor, panel: float) -> None:
    """Draw indices (h, w) as colored cells in a panel of a width in inches, with the numbers where they can be read."""
    height, width = indices.shape
    cell = panel * POINTS / max(height, width)
    digits = len(str(len(colors) - 1))
    size = min(8.0, 0.8 * cell, 0.85 * cell / (digits * DIGIT))
    axes.imshow(colors[indices.cpu()].numpy())
    axes.set_xticks([])
    axes.set_yticks([])
    if size >= _SMALLEST_NUMBER:
        for y in range(height):
            for x in range(width):
                axes.text(x, y, str(int(indices[y, x])), ha="center", va="center", fontsize=size)
