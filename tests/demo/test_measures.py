"""What the demo measures with: a judge of samples, and sizes in the usual formats."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.data import Images
from fastvq.demo import measures
from fastvq.demo.classifier import agreement, train_classifier
from fastvq.demo.image_formats import _sheet, format_sizes
from fastvq.demo.page import _table

from ..cases import generator


def squares(count=90, channels=1):
    """Bright squares at the left, in the middle or at the right of noise."""
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, channels, 12, 12), generator=generator(), dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4:8, 4 * label : 4 * label + 4] += 190
    return images, labels


def test_the_judge_learns_classes_and_leaves_randomness_alone():
    images, labels = squares()
    # Mirroring, which training does, makes the first and last class one.
    labels = (labels == 1).long()
    data = Images("squares", images, images, ("",) * len(images), labels, labels)
    torch.manual_seed(3)
    judge = train_classifier(data, steps=60)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert agreement(judge, images / 255, labels) > 0.95
    assert agreement(judge, images / 255, 1 - labels) < 0.05
    with pytest.raises(ValueError, match="images: a classifier needs classes"):
        train_classifier(Images("squares", images, images, ()), steps=1)


def by_brightness(images):
    """Logits that are highest for the class of the brightness."""
    return torch.nn.functional.one_hot((images * 255).round().long().flatten(), 4)


class Guided:
    """A prior whose samples are their labels if they are guided, else all 0."""

    classes = 4

    def sample(self, count, labels, *, generator, guidance=1.0):
        assert len(labels) == count
        return (labels if guidance > 1 else torch.zeros_like(labels))[:, None, None]


class Halving:
    """A model whose code for an image is half its brightness, and which decodes codes as they are."""

    training, bottleneck = False, None

    def train(self, mode=True):
        return self

    eval = train

    def encode(self, images):
        return (images * 255)[:, 0].round().long() // 2

    def decode(self, codes):
        return codes[:, None] / 255


def test_each_agreement_is_of_what_it_says(monkeypatch):
    monkeypatch.setattr(measures, "train_classifier", lambda *_, **__: by_brightness)
    # Six of eight images look like their class; half as bright, as 0, 0, 0, 0, 1, 1, 1 and 1, five of them do.
    seen = torch.tensor([0, 0, 0, 1, 2, 3, 2, 3]).to(torch.uint8)[:, None, None, None]
    labels = torch.tensor([0, 0, 0, 0, 2, 3, 2, 1])
    data = Images("brightnesses", seen, seen, ("",) * 8, labels, labels)
    assert measures.judge_samples(Guided(), Halving(), data, {"guidance": 2.0}) == {
        "sample_agreement": 1.0,
        "plain_sample_agreement": 0.25,
        "real_agreement": 0.75,
        "reconstruction_agreement": 0.625,
        "judged_samples": 120,
    }
    without = measures.judge_samples(Guided(), Halving(), dataclasses.replace(data, test_labels=None), {})
    assert without == dict.fromkeys(
        ("sample_agreement", "plain_sample_agreement", "real_agreement", "reconstruction_agreement")
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_of_the_usual_formats(channels):
    images, _ = squares(7, channels)
    sheet = _sheet(images)
    assert sheet.shape == ((36, 36) if channels == 1 else (36, 36, 3))
    assert np.array_equal(sheet[12:24, 12:24].reshape(12, 12, channels), images[4].permute(1, 2, 0).numpy())
    assert not sheet[24:, 12:].any()
    png, lossless, lossy = format_sizes(images, 25.0)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG", optimize=True)
    assert png == {"name": "PNG", "bytes": len(stream.getvalue()), "psnr_db": None}
    assert lossless["psnr_db"] is None
    assert lossy["psnr_db"] >= 25.0
    assert lossy["bytes"] < lossless["bytes"]
    assert format_sizes(images, 28.0)[2]["psnr_db"] > lossy["psnr_db"]


def test_a_table_escapes_what_it_shows():
    assert "<td>a &lt; b</td>" in _table(["x"], [["a < b"]])
