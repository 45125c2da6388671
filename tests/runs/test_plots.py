"""Pictures: written whole, with the panels they promise, and none of them blank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastvq.runs import plots


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the list to which a test's figures are added when they are saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def savefig(figure: Figure, *args: object, **options: object) -> None:
        saved.append(figure)
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def texts(figure: Figure) -> str:
    """Return all titles, labels and the caption of a figure."""
    parts = [figure.get_suptitle(), figure.get_supxlabel()]
    for axes in figure.axes:
        parts += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        if axes.get_legend():
            parts += [text.get_text() for text in axes.get_legend().get_texts()]
    return " ".join(" ".join(parts).split())


def ink(path: Path, figure: Figure, axes_index: int) -> float:
    """Return the standard deviation of the saved pixels in one panel, 0 to 255; a blank panel has 0."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), dtype=np.float64)
    height, width = pixels.shape
    box = figure.axes[axes_index].get_position()
    rows = slice(int((1 - box.y1) * height) + 2, int((1 - box.y0) * height) - 2)
    return float(pixels[rows, int(box.x0 * width) + 2 : int(box.x1 * width) - 2].std())


@pytest.mark.parametrize(("count", "channels", "panels"), [(1, 1, 1), (11, 3, 16)])
def test_reconstructions(tmp_path: Path, figures: list[Figure], count: int, channels: int, panels: int) -> None:
    path = tmp_path / "new" / "pairs.png"
    originals = torch.rand(count, channels, 12, 12)
    restored = (originals + 0.1).clamp(0, 1)
    restored[0] = originals[0] - 0.1
    names = [f"image {n}" for n in range(count)]
    plots.save_reconstructions(path, originals, restored, names, title="A title", caption="A caption.")
    (figure,) = figures
    assert len(figure.axes) == panels
    assert "A title" in texts(figure)
    assert "A caption." in texts(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["original", "decoded"]
    assert "image 0" in texts(figure)
    assert "20.0 dB" in texts(figure)
    # Original above, reconstruction below, one line between.
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape[:2] == (25, 12)
    assert all(ink(path, figure, n) > 10 for n in range(count))
    assert list(path.parent.iterdir()) == [path]


def test_curves(tmp_path: Path, figures: list[Figure]) -> None:
    records = [
        {"step": step, "split": "train", "loss": 1 / step, "psnr_db": 10 + step / 10, "perplexity": 2.0 * step}
        for step in range(1, 50)
    ]
    records.append({"step": 49, "split": "test", "psnr_db": 14.0, "perplexity": 90.0})
    path = tmp_path / "curves.png"
    plots.save_curves(path, records, codebook_size=128, title="Curves")
    (figure,) = figures
    assert len(figure.axes) == 3
    for expected in ("Curves", "loss", "PSNR (dB)", "perplexity", "step", "held-out images", "uniform over 128 codes"):
        assert expected in texts(figure)
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 3]
    assert all(ink(path, figure, n) > 10 for n in range(3))


def test_curves_of_a_run_without_a_bottleneck_have_no_perplexity(tmp_path: Path, figures: list[Figure]) -> None:
    records = [{"step": 1, "split": "test", "psnr_db": 14.0, "perplexity": None}]
    plots.save_curves(tmp_path / "curves.png", records, codebook_size=128, title="Ceiling")
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["PSNR (dB)"]
    assert "Perplexity" not in texts(figures[0])


def test_bits_of_a_prior(tmp_path: Path, figures: list[Figure]) -> None:
    records = [{"step": step, "split": "train", "bits_per_index": 7 - step / 10} for step in range(1, 30)]
    records += [{"step": step, "split": "test", "bits_per_index": 6.5 - step / 20} for step in (10, 20, 30)]
    path = tmp_path / "bits.png"
    plots.save_bits(path, records, codebook_size=128, title="Bits")
    (figure,) = figures
    (axes,) = figure.axes
    for expected in ("Bits", "bits per index", "step", "training batches", "held-out images", "5.00 at the end"):
        assert expected in texts(figure)
    assert "uniform over 128 codes: 7.00 bits" in texts(figure)
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["held-out images"].get_xydata().tolist() == [[10, 6.0], [20, 5.5], [30, 5.0]]
    assert drawn["training batches"].get_xydata()[0].tolist() == [1, 6.9]
    assert set(drawn["uniform over 128 codes: 7.00 bits"].get_ydata()) == {7.0}
    assert ink(path, figure, 0) > 10


def test_bits_of_a_prior_without_records_are_no_error(tmp_path: Path, figures: list[Figure]) -> None:
    plots.save_bits(tmp_path / "bits.png", [], codebook_size=8, title="Bits")
    assert "3.00 bits" in texts(figures[0])
    assert "at the end" not in texts(figures[0])


def test_usage(tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "usage.png"
    plots.save_usage(path, torch.tensor([5, 0, 9, 2]), perplexity=2.6, title="Usage")
    (figure,) = figures
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [9, 5, 2, 0]
    for expected in ("Usage", "times chosen", "code, by rank", "1 of 4 codes", "4 times each"):
        assert expected in texts(figure)
    assert ink(path, figure, 0) > 10


def test_indices(tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "indices.png"
    indices = torch.arange(18).reshape(2, 3, 3)
    plots.save_indices(path, torch.rand(2, 1, 12, 12), indices, torch.rand(2, 1, 12, 12), torch.randn(32, 5), title="T")
    (figure,) = figures
    assert len(figure.axes) == 6
    assert [text.get_text() for text in figure.axes[4].texts] == [str(n) for n in range(9, 18)]
    for expected in ("original", "indices", "decoded from the indices", "3 x 3 indices below 32"):
        assert expected in texts(figure)
    assert all(ink(path, figure, n) > 10 for n in range(6))


@pytest.mark.parametrize(("size", "dim"), [(1, 4), (2, 4), (64, 1), (64, 2), (64, 16)])
def test_code_colors_are_colors_and_tell_codes_apart(size: int, dim: int) -> None:
    colors = plots.code_colors(torch.randn(size, dim, generator=torch.Generator().manual_seed(0)))
    assert colors.shape == (size, 3)
    assert colors.min() >= 0
    assert colors.max() <= 1
    assert len(colors.unique(dim=0)) == size


def test_similar_codes_get_similar_colors() -> None:
    near = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    codebook = torch.cat([near, near + torch.tensor([5.0, *[0.0] * 7])])
    colors = plots.code_colors(codebook)[:, 0]
    assert (colors[:40] < colors[40:].min()).all() or (colors[:40] > colors[40:].max()).all()
