"""Pictures: written whole, with the panels they promise, and none of them blank."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from fastvq.data import Examples
from fastvq.runs import plots
from fastvq.runs.figures import label, texts_of
from fastvq.runs.pictures import shown_rows

DPI = 130
"""Resolution of a saved picture; tests/conftest.py lowers it in all other tests."""


@pytest.fixture(autouse=True)
def _fine_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvq.runs.figures.DPI", DPI)


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


@pytest.mark.parametrize(("count", "channels", "rows"), [(1, 1, 1), (11, 3, 2)])
def test_reconstructions(tmp_path: Path, figures: list[Figure], count: int, channels: int, rows: int) -> None:
    path = tmp_path / "new" / "pairs.png"
    originals = torch.rand(count, channels, 12, 12)
    restored = (originals + 0.1).clamp(0, 1)
    restored[0] = (originals[0] - 0.1).clamp(0, 1)
    names = [f"image {n}" for n in range(count)]
    plots.save_reconstructions(
        path, originals, restored, names, ["20.0 dB"] * count, title="A title", caption="A caption."
    )
    (figure,) = figures
    (axes,) = figure.axes
    assert "A title" in texts(figure)
    assert "A caption." in texts(figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["original", "decoded"] * rows
    assert [text.get_text() for text in axes.texts] == [text for name in names for text in (name, "20.0 dB")]
    # Original above, reconstruction below, one line between.
    shown = torch.from_numpy(axes.images[0].get_array().data).reshape(*axes.images[0].get_size(), channels)
    assert torch.equal(shown[:12, :12], originals[0].permute(1, 2, 0))
    assert torch.equal(shown[13:25, :12], restored[0].permute(1, 2, 0))
    assert (shown[12, :12] == 1).all()
    assert torch.equal(shown[-12:, 13 * (count - 1) % 104 :][:, :12], restored[-1].permute(1, 2, 0))
    assert ink(path, figure, 0) > 10
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
    for expected in ("Curves", "loss", "PSNR (dB)", "perplexity", "step", "held-out images", "uniform over 128"):
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
    plots.save_usage(path, [torch.tensor([5, 0, 9, 2])], perplexity=2.6, title="Usage")
    (figure,) = figures
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [9, 5, 2, 0]
    for expected in ("Usage", "times chosen", "code, by rank", "1 of 4 codes", "4 times each"):
        assert expected in texts(figure)
    assert ink(path, figure, 0) > 10


def test_indices(tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "indices.png"
    indices = torch.arange(18).reshape(2, 3, 3)
    plots.save_indices(
        path, torch.rand(2, 1, 12, 12), [indices], torch.rand(2, 1, 12, 12), [torch.randn(32, 5)], title="T"
    )
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


def drawn_texts(figure: Figure) -> list[tuple[str, Any]]:
    """Return each text of a figure with its box in pixels, as drawn."""
    figure.set_dpi(DPI)
    figure.canvas.draw()
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text())
    # Ticks outside the axes have labels too, which are not drawn.
    ticks = [
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
    ]
    return [(text.get_text(), text.get_window_extent()) for text in found if text not in ticks]


LONG = "a data set whose name is long, which its folder had from the beginning, and which nobody wanted to change"
NAMES = ["golden retrievers and other large dogs/IMG_2024_holiday_00012.jpg", "cats/a.png", f"{LONG}.jpg", "b.png"]


@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("size", [(12, 12), (8, 24), (24, 8)], ids=["square", "wide", "tall"])
def test_no_text_of_reconstructions_is_cut_or_covered(
    tmp_path: Path, figures: list[Figure], count: int, size: tuple[int, int]
) -> None:
    images = torch.rand(count, 3, *size)
    names = (NAMES * 3)[:count]
    plots.save_reconstructions(
        tmp_path / "a.png", images, images / 2, names, ["20.0 dB"] * count, title=LONG, caption=LONG * 2
    )
    check_texts(figures[0])


def check_texts(figure: Figure) -> None:
    """Assert that all texts lie within the figure, and that titles of panels do not overlap."""
    found = drawn_texts(figure)
    width, height = figure.canvas.get_width_height()
    for text, box in found:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    for n, box in enumerate(titles):
        assert not any(box.overlaps(other) for other in titles[:n])


@pytest.mark.parametrize("rows", [1, 4])
def test_no_text_of_a_grid_is_cut_or_covered(tmp_path: Path, figures: list[Figure], rows: int) -> None:
    columns = ["sampled", "nearest", "2.", "3."]
    images = [torch.rand(4, 1, 8, 8)] * rows
    plots.save_grid(tmp_path / "a.png", images, NAMES[:rows], columns, title=LONG, caption=LONG)
    check_texts(figures[0])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("dress", "dress"),
        ("cats/0001.png", "cats\n0001.png"),
        ("animals/cats/0001.png", "animals/cats\n0001.png"),
        ("golden retrievers/IMG_20240102_0001.jpg", "golden \u2026rievers\nIMG_202\u2026001.jpg"),
        ("a" * 16, "aaaaaaa\u2026aaaaaaa"),
        ("caf\udce9.png", "caf?.png"),
        ("two\nlines/a\tb.png", "two\ufffdlines\na\ufffdb.png"),
    ],
)
def test_labels_keep_folder_beginning_and_end(name: str, shown: str) -> None:
    assert label(name, 15) == shown


def test_letters_without_a_glyph_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvq.runs.figures._NAMED", set())
    images, names = torch.rand(2, 3, 8, 8), ["\u65e5\u672c.png", "\u65e5.png"]
    with pytest.warns(UserWarning, match="no glyphs for \u65e5\u672c: boxes") as found:
        plots.save_samples(tmp_path / "a.png", images, names, title="\u65e5", caption="")
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save_samples(tmp_path / "a.png", images, names, title="\u65e5", caption="")


def test_samples_stand_in_the_given_number_of_columns(tmp_path: Path, figures: list[Figure]) -> None:
    names = ["purple cat face", "grinning face", "a", "b", "c", "d"]
    plots.save_samples(tmp_path / "a.png", torch.rand(6, 3, 8, 8), names, title="", caption="", columns=3)
    (figure,) = figures
    (axes,) = figure.axes
    places = [(text.get_text(), text.xy) for text in axes.texts]
    assert [name for name, _ in places] == names  # none is shortened
    assert len({x for _, (x, _) in places}) == 3
    assert len({y for _, (_, y) in places}) == 2
    check_texts(figure)


def test_the_curves_of_a_short_run_are_seen_and_not_covered(tmp_path: Path, figures: list[Figure]) -> None:
    records = [
        {"step": 2, "split": "train", "loss": 5.0, "psnr_db": 4.3, "perplexity": 12.0},
        {"step": 2, "split": "test", "psnr_db": 4.6, "perplexity": 10.0},
    ]
    plots.save_curves(tmp_path / "curves.png", records, codebook_size=64, title="Short")
    (figure,) = figures
    for axes in figure.axes:
        assert all(line.get_marker() not in ("", "None") for line in axes.lines if len(line.get_xdata()) == 1)
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    check_texts(figure)


def test_what_is_not_finite_is_left_out_of_curves(tmp_path: Path, figures: list[Figure]) -> None:
    records = [{"step": n, "split": "test", "psnr_db": value} for n, value in enumerate((3.0, math.inf, math.nan))]
    plots.save_curves(tmp_path / "curves.png", records, codebook_size=64, title="T")
    assert [line.get_xydata().tolist() for line in figures[0].axes[0].lines] == [[[0, 3.0]]]


@pytest.mark.parametrize(("side", "size", "shown"), [(7, 512, True), (16, 64, True), (16, 4096, False), (32, 8, False)])
def test_indices_are_written_where_they_can_be_read(
    tmp_path: Path, figures: list[Figure], side: int, size: int, shown: bool
) -> None:
    indices = torch.full((1, side, side), size - 1)
    images = torch.rand(1, 1, side * 4, side * 4)
    plots.save_indices(tmp_path / "a.png", images, [indices], images, [torch.randn(size, 4)], title="T")
    (figure,) = figures
    numbers = figure.axes[1].texts
    assert bool(numbers) == shown
    if shown:
        assert numbers[0].get_fontsize() >= 5
        figure.set_dpi(DPI)
        figure.canvas.draw()
        first, second = (text.get_window_extent() for text in numbers[:2])
        assert first.x1 <= second.x0


def test_a_caption_is_metadata_where_it_is_not_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    counts = torch.tensor([3, 0, 1])
    for captioned in (True, False):
        plots.save_usage(tmp_path / "a.png", [counts], perplexity=2.0, title="T", captioned=captioned)
        title, caption = texts_of(tmp_path / "a.png")
        assert title == "T"
        assert "1 of 3 codes is unused" in caption
    assert ["1 of 3 codes is unused" in texts(figure) for figure in figures] == [True, False]


def test_no_caption_speaks_of_classes_or_one_data_set(tmp_path: Path, figures: list[Figure]) -> None:
    images = torch.rand(1, 1, 8, 8)
    plots.save_indices(
        tmp_path / "a.png", images, [torch.zeros(1, 2, 2).long()], images, [torch.randn(4, 4)], title="T"
    )
    plots.save_bits(tmp_path / "b.png", [], codebook_size=8, title="T")
    assert not [word for word in ("cloth", "label", "class") for figure in figures if word in texts(figure)]


def held_out(names: list[str], labels: list[int] | None = None) -> Examples:
    pixels = torch.zeros(len(names), 1, 4, 4, dtype=torch.uint8)
    return Examples("x", pixels, pixels, tuple(names), None, None if labels is None else torch.tensor(labels))


def test_shown_images_are_spread_over_the_set() -> None:
    assert shown_rows(held_out([f"{n}.png" for n in range(160)])) == list(range(5, 160, 10))
    assert shown_rows(held_out(["a", "b", "c"])) == [0, 1, 2]


def test_shown_images_are_of_each_class_or_folder_in_turn() -> None:
    labels = [n * 10 // 1000 for n in range(1000)]
    for images in (
        held_out(["x"] * 1000, labels),
        held_out([f"{name}/{n}.png" for n, name in enumerate(labels)]),
    ):
        rows = shown_rows(images)
        assert [labels[row] for row in rows[:10]] == [*range(10)]
        assert len({labels[row] for row in rows[10:]}) == 6
        assert len(set(rows)) == 16
        assert [labels[row] for row in shown_rows(images, 3)] == [1, 5, 8]


def test_where_one_folder_has_few_images_others_show_more() -> None:
    names = ["few/0.png", *(f"many/{n}.png" for n in range(60))]
    rows = shown_rows(held_out(names))
    assert len(rows) == 16
    assert rows.count(0) == 1
    assert max(rows) > 50


def test_wide_pictures_have_wide_and_low_panels(tmp_path):
    strips = torch.rand(10, 3, 8, 40)
    indices, codes = torch.randint(0, 9, (3, 4, 20)), torch.rand(9, 2)
    plots.save_reconstructions(
        tmp_path / "a.png", strips, strips, ["strip"] * 10, ["1 dB"] * 10, title="", caption="", captioned=False
    )
    plots.save_indices(tmp_path / "b.png", strips[:3], [indices], strips[:3], [codes], title="", captioned=False)
    plots.save_grid(tmp_path / "c.png", [strips[:5]] * 2, ["", ""], ["s"] * 5, title="", caption="", captioned=False)
    inches = {}
    for name in "abc":
        with Image.open(tmp_path / f"{name}.png") as file:
            inches[name] = tuple(side / DPI for side in file.size)
    assert inches["a"][0] == pytest.approx(3 * 3.2 + 0.6, abs=0.1)  # in three columns instead of eight
    assert inches["b"][1] < 0.4 * inches["b"][0]
    assert inches["c"][0] == pytest.approx(5 * 2.0 + 0.2, abs=0.1)
    assert inches["c"][1] < 0.2 * inches["c"][0]


def test_indices_along_time_stand_below_what_they_describe(tmp_path, monkeypatch):
    """Rows of all codebooks are as wide as the picture above them, whatever their number of indices."""
    shown = []
    original = plots._show
    monkeypatch.setattr(
        plots, "_show", lambda axes, image, **options: (shown.append((axes, image)), original(axes, image, **options))
    )
    codes = [torch.randn(5, 3), torch.randn(4, 3)]
    indices = [torch.tensor([[0, 4]] * 2), torch.tensor([[0, 1, 2, 3, 2, 1]] * 2)]
    pictures = torch.rand(2, 1, 8, 12)
    plots.save_sequences(tmp_path / "a.png", pictures, indices, pictures, codes, title="T", noun="clip")
    grid = shown[1][1]
    assert grid.shape == (3, 2, 6)
    coarse, fine = map(plots.code_colors, codes)
    assert torch.equal(grid[:, 0].T, coarse[[0, 0, 0, 4, 4, 4]])
    assert torch.equal(grid[:, 1].T, fine[[0, 1, 2, 3, 2, 1]])
    edges = [(axes.get_position().x0, axes.get_position().x1) for axes, _ in shown]
    assert edges[0] == edges[1] == edges[2] != edges[3]
    below = [axes.get_position().y1 for axes, _ in shown[:3]]
    assert below == sorted(below, reverse=True)
