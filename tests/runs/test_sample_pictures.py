"""Pictures of samples: indices, labels and images, by a prior and a model whose pixels are the indices."""

from __future__ import annotations

import pytest
import torch

from fastvq.data import Examples
from fastvq.modalities import ImageConfig
from fastvq.runs import plots
from fastvq.runs.pictures import shown_rows
from fastvq.runs.sample_pictures import picture_completions, picture_neighbors, picture_samples

from ..cases import generator

CONFIG = ImageConfig(data="folder", image_size=8)
CLASSES = ("boot", "bag", "coat")


class FakePrior:
    """What it draws without a label lies in [50, 100), with label n in [100 + 50 n, 150 + 50 n)."""

    def __init__(self, classes):
        self.classes, self.settings = classes, []

    def sample(self, count, labels=None, *, given=None, generator, **settings):
        assert labels is None or labels.shape == (count,)
        self.settings.append(settings)
        drawn = torch.randint(50, 100, (count, 4, 4), generator=generator)
        if labels is not None:
            drawn += 50 * (1 + labels)[:, None, None]
        return drawn if given is None else torch.where(given < 0, drawn, given)


class FakeModel:
    """A code is the brightness of 2 x 2 pixels, as in `blocks`."""

    def encode(self, images):
        return (images[:, 0, ::2, ::2] * 255).round().long()

    value_range = (0.0, 1.0)
    strides = (2, 2)
    scales = None

    @property
    def adapter(self):
        return self

    def index_shape(self, grid):
        return grid

    def restore(self, indices):
        return blocks(indices) / 255


def blocks(indices):
    """(N, 4, 4) to images (N, 1, 8, 8)."""
    return indices[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)


def made(classes, held_out=11, high=50):
    """Images of blocks below 50, so that none could have been drawn; the held-out ones are of classes in turn."""
    train, test = (
        blocks(torch.randint(0, high, (count, 4, 4), generator=generator(count))).to(torch.uint8)
        for count in (40, held_out)
    )
    if not classes:
        return Examples("blocks", train, test, tuple(f"image {n}" for n in range(held_out)))
    labels = torch.arange(held_out) % classes
    names = tuple(CLASSES[label] for label in labels)
    return Examples("blocks", train, test, names, torch.arange(40) % classes, labels, CLASSES)


def pictured(monkeypatch, picture, classes, images, seed=0):
    """Rows (rows, columns, 8, 8) of whole brightnesses, the names of rows and columns."""
    shown = []
    monkeypatch.setattr(plots, "save_grid", lambda path, *what, **_: shown.append(what))
    prior = FakePrior(classes)
    picture(None, prior, FakeModel(), CONFIG, images, seed=seed, guidance=2.0)
    assert all(settings == {"guidance": 2.0} for settings in prior.settings)
    ((rows, row_names, column_names),) = shown
    return (torch.stack(list(rows))[:, :, 0] * 255).round().long(), list(row_names), list(column_names)


@pytest.mark.parametrize("classes", [3, 0])
def test_samples_stand_beside_real_images_of_their_class(monkeypatch, classes):
    images = made(classes)
    rows, names, columns = pictured(monkeypatch, picture_samples, classes, images)
    assert columns == ["real"] * 3 + ["sampled"] * 7
    assert names == (list(CLASSES) if classes else [""] * 4)
    for n, row in enumerate(rows):
        # Of 11 images of 3 classes, n, n + 3 and n + 6 are the first of class n.
        real = images.test[n::3][:3] if classes else images.test[[(3 * n + i) % 11 for i in range(3)]]
        assert torch.equal(row[:3], real[:, 0].long())
        assert (row[3:] // 50 == (2 + n if classes else 1)).all()
    drawn = rows[:, 3:].flatten(0, 1) % 50
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert torch.equal(pictured(monkeypatch, picture_samples, classes, images)[0], rows)
    assert not torch.equal(pictured(monkeypatch, picture_samples, classes, images, seed=1)[0], rows)


def test_few_or_no_real_images_of_a_class(monkeypatch):
    images = made(3, held_out=2)
    rows, names, _ = pictured(monkeypatch, picture_samples, 3, images)
    assert names == ["boot", "bag", "coat"]
    for n in (0, 1):
        assert torch.equal(rows[n, :3], images.test[[n] * 3, 0].long())
    assert (rows[2, :3] == 128).all()  # gray
    assert (rows[2, 3:] // 50 == 4).all()


@pytest.mark.parametrize("classes", [3, 0])
def test_completions_keep_the_upper_half_and_draw_the_lower(monkeypatch, classes):
    images = made(classes)
    rows, names, columns = pictured(monkeypatch, picture_completions, classes, images)
    assert columns == ["original", "decoded", "given", "sampled", "sampled", "sampled"]
    chosen = shown_rows(images, 8)
    assert names == [images.test_names[row] for row in chosen]
    originals = images.test[chosen, 0].long()
    for column in range(6):
        assert torch.equal(rows[:, column, :4], originals[:, :4])
    for column in (0, 1):
        assert torch.equal(rows[:, column], originals)
    assert (rows[:, 2, 4:] == 128).all()  # gray
    bands = 2 + images.test_labels[chosen] if classes else torch.ones(8, dtype=torch.int64)
    drawn = rows[:, 3:, 4:]
    assert torch.equal(drawn // 50, bands[:, None, None, None].expand_as(drawn))
    assert len(drawn.flatten(0, 1).unique(dim=0)) == 24


@pytest.mark.parametrize("classes", [3, 0])
def test_neighbors_are_the_nearest_training_images_and_mirrored_ones(monkeypatch, classes):
    images = made(classes, high=256)
    rows, names, columns = pictured(monkeypatch, picture_neighbors, classes, images)
    assert columns == ["sampled", "nearest", "2.", "3.", "4.", "5."]
    assert names == (list(CLASSES) if classes else [""] * 10)
    learned = torch.cat([images.train, images.train.flip(-1)])[:, 0].long()
    distances = (rows[:, :1] - learned).square().sum((2, 3))
    nearest = distances.argsort(1)[:, :5]
    assert torch.equal(rows[:, 1:], learned[nearest])
    assert (nearest < 40).any()
    assert (nearest >= 40).any()
    bands = 2 + torch.arange(3) if classes else torch.ones(10, dtype=torch.int64)
    assert torch.equal(rows[:, 0] // 50, bands[:, None, None].expand(-1, 8, 8))
