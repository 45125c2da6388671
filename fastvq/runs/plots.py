"""Figures of a VQ-VAE, each with a title, labels, and a caption that explains it.

All drawing with matplotlib is here; `pictures` and `sample_pictures` compute what is drawn.

Figures are made without pyplot and so touch neither a display nor matplotlib's global state.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.extras import require
from fastvq.files import whole

_BLUE, _ORANGE, _GRAY = "#2166ac", "#d6604d", "#777777"
SERIES = (_BLUE, _ORANGE, "#4d9221", _GRAY, "#762a83")
"""Colors of lines and bars, one for each series."""
_DPI = 130
_LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Properties of texts that hold names of files and data sets, in which "$" and "\\" are ordinary characters."""


def _figure(width: float, height: float, title: str, caption: str) -> Any:
    """Return an empty figure of a size in inches with a title above and a wrapped caption below."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", **_LITERAL)
    figure.supxlabel(textwrap.fill(caption, int(width * 15)), fontsize=9, color="#444444", **_LITERAL)
    return figure


def figure_with(width: float, height: float, title: str, caption: str, *, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure in the common layout, and its axes or row of axes."""
    figure = _figure(width, height, title, caption)
    return figure, figure.subplots(1, columns)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG; the file is replaced as a whole."""
    with whole(path) as file:
        figure.savefig(file, dpi=_DPI, format="png")


def _show(axes: Any, image: Tensor) -> None:
    """Draw an image (C, H, W) in [0, 1] without ticks."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])


def save_reconstructions(
    path: Path, originals: Tensor, restored: Tensor, names: Sequence[str], *, title: str, caption: str
) -> None:
    """Draw pairs of original and reconstruction, each with its own PSNR.

    Args:
        path: PNG file to write.
        originals, restored: (N, C, H, W), float in [0, 1].
        names: one for each image.
        title, caption: texts above and below the figure.
    """
    columns = min(8, len(originals))
    rows = math.ceil(len(originals) / columns)
    figure = _figure(1.2 * columns + 1.0, 2.75 * rows + 1.0, title, caption)
    panels = figure.subplots(rows, columns, squeeze=False)
    for spare in panels.flat[len(originals) :]:
        spare.set_axis_off()
    for axes, original, output, name in zip(panels.flat, originals, restored, names, strict=False):
        gap = torch.ones_like(original[:, : max(1, original.shape[1] // 28)])
        _show(axes, torch.cat([original, gap, output], dim=1))
        axes.set_title(textwrap.shorten(name, 14, placeholder="..."), fontsize=9, **_LITERAL)
        error = (original - output).square().mean().item()
        axes.set_xlabel(f"{-10 * math.log10(max(error, 1e-12)):.1f} dB", fontsize=9)
    for axes in panels[:, 0]:
        height = originals.shape[2]
        axes.set_yticks([0.5 * height, 1.5 * height], ["original", "decoded"], rotation=90, va="center", fontsize=9)
        axes.tick_params(length=0)
    save_figure(figure, path)


def save_grid(
    path: Path,
    rows: Sequence[Tensor],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    title: str,
    caption: str,
) -> None:
    """Draw rows of images, each row with its name at the left, each column with its name above.

    Args:
        path: PNG file to write.
        rows: (columns, C, H, W) each, float in [0, 1].
        row_names, column_names: one for each row and column.
        title, caption: texts above and below the figure.
    """
    columns = len(column_names)
    figure = _figure(1.0 * columns + 1.2, 1.05 * len(rows) + 1.3, title, caption)
    for row, panels in enumerate(figure.subplots(len(rows), columns, squeeze=False)):
        for column, panel in enumerate(panels):
            _show(panel, rows[row][column])
            if row == 0:
                panel.set_title(column_names[column], fontsize=9, **_LITERAL)
        panels[0].set_ylabel(row_names[row], fontsize=9, rotation=0, ha="right", va="center", **_LITERAL)
    save_figure(figure, path)


def _points(records: Sequence[dict[str, Any]], split: str, key: str) -> list[tuple[int, float]]:
    return [(r["step"], r[key]) for r in records if r["split"] == split and r.get(key) is not None]


def save_curves(path: Path, records: Sequence[dict[str, Any]], *, codebook_size: int, title: str) -> None:
    """Draw loss, PSNR and perplexity over the steps; a measure without records is left out.

    Args:
        path: PNG file to write.
        records: the lines of metrics.jsonl, at least one; those of split "test" are drawn as dots.
        codebook_size: K, the highest possible perplexity.
        title: text above the figure.
    """
    panels = [
        (label, key, lines)
        for label, key in (("loss", "loss"), ("PSNR (dB)", "psnr_db"), ("perplexity (codes)", "perplexity"))
        if (lines := {split: _points(records, split, key) for split in ("train", "test")}) != {"train": [], "test": []}
    ]
    caption = (
        "Loss should fall and PSNR rise until the learning rate reaches zero; dots (held-out images) far below the"
        " line mean overfitting."
    )
    if any(key == "perplexity" for _, key, _ in panels):
        caption += f" Perplexity is the number of codes in effective use, at most {codebook_size}."
    figure = _figure(3.7 * len(panels), 4.2, title, caption)
    for axes, (label, key, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _draw_splits(axes, lines)
        if key == "loss":
            axes.set_yscale("log")
        if key == "perplexity":
            axes.axhline(codebook_size, color=_GRAY, linestyle=":", label=f"uniform over {codebook_size} codes")
            axes.set_ylim(0, codebook_size * 1.08)
        axes.set_ylabel(label)
        axes.legend(fontsize=8, loc="upper right" if key == "loss" else "lower right")
    save_figure(figure, path)


def save_bits(path: Path, records: Sequence[dict[str, Any]], *, codebook_size: int, title: str) -> None:
    """Draw the bits per index of a prior over the steps of its training.

    Args:
        path: PNG file to write.
        records: the lines of metrics.jsonl; those of split "test" are drawn as dots.
        codebook_size: K; an index takes log2 K bits under the uniform distribution.
        title: text above the figure.
    """
    uniform = math.log2(codebook_size)
    lines = {split: _points(records, split, "bits_per_index") for split in ("train", "test")}
    reached = f", {lines['test'][-1][1]:.2f} at the end" if lines["test"] else ""
    caption = (
        f"Bits per index of held-out images under the prior (dots{reached}): fewer bits mean better predictions. Dots"
        " that rise again mean overfitting. The line is measured during training, with dropout and without some"
        " labels, which costs bits: at first the dots may lie below it."
    )
    figure, axes = figure_with(8, 4.4, title, caption)
    axes.axhline(uniform, color=_GRAY, linestyle=":", label=f"uniform over {codebook_size} codes: {uniform:.2f} bits")
    _draw_splits(axes, lines)
    axes.set_ylabel("bits per index")
    # Above the axes: a curve may pass anywhere below the dotted line.
    axes.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    save_figure(figure, path)


def _draw_splits(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Draw records over the steps: a line for training batches, dots for held-out images."""
    for split, style, color, text in (
        ("train", "-", _BLUE, "training batches"),
        ("test", "o", _ORANGE, "held-out images"),
    ):
        if lines[split]:
            axes.plot(*zip(*lines[split], strict=True), style, color=color, markersize=4, label=text)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)


def save_usage(path: Path, counts: Tensor, *, perplexity: float, title: str) -> None:
    """Draw the number of times that each code is chosen, most used first.

    Args:
        path: PNG file to write.
        counts: (K,), int64.
        perplexity: exp of the entropy of `counts`.
        title: text above the figure.
    """
    ordered = counts.sort(descending=True).values.tolist()
    unused = sum(count == 0 for count in ordered)
    caption = (
        "One bar per code. A flat profile near the dotted line means that the whole codebook is used; a cliff, that it"
        f" has collapsed onto few codes. Here {unused} of {len(ordered)} codes are unused; the perplexity is"
        f" {perplexity:.0f}."
    )
    figure = _figure(9, 4, title, caption)
    axes = figure.subplots()
    axes.bar(range(len(ordered)), ordered, width=1.0, color=_BLUE)
    mean = sum(ordered) / max(1, len(ordered))
    axes.axhline(mean, color=_ORANGE, linestyle=":", label=f"uniform usage: {mean:.0f} times each")
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.set_xlabel("code, by rank")
    axes.set_ylabel("times chosen")
    axes.legend(fontsize=9, loc="upper right")  # finding the "best" place may take seconds
    save_figure(figure, path)


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
    path: Path, originals: Tensor, indices: Tensor, restored: Tensor, codebook: Tensor, *, title: str
) -> None:
    """Draw images, their indices as colored grids, and the reconstructions from these indices.

    Args:
        path: PNG file to write.
        originals, restored: (N, C, H, W), float in [0, 1].
        indices: (N, h, w), int64.
        codebook: (K, D), for the colors.
        title: text above the figure.
    """
    colors = code_colors(codebook)
    count, height, width = indices.shape
    caption = (
        f"Each image becomes {height} x {width} indices below {len(codebook)}, and the right picture is decoded from"
        " these alone. Similar colors stand for similar codes: background, edges and cloth textures stand out."
    )
    figure = _figure(7.5, 2.4 * count + 1.0, title, caption)
    for row, panels in enumerate(figure.subplots(count, 3, squeeze=False)):
        _show(panels[0], originals[row])
        panels[1].imshow(colors[indices[row].cpu()].numpy())
        panels[1].set_xticks([])
        panels[1].set_yticks([])
        if height * width <= 256:
            size = min(7.5, 50.0 / width)
            for y in range(height):
                for x in range(width):
                    panels[1].text(x, y, str(int(indices[row, y, x])), ha="center", va="center", fontsize=size)
        _show(panels[2], restored[row])
        if row == 0:
            for panel, text in zip(panels, ("original", "indices", "decoded from the indices"), strict=True):
                panel.set_title(text, fontsize=10)
    save_figure(figure, path)
