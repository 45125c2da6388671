"""The judge of samples: it learns classes, and each agreement is of what its name says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvq.data import DATA_SETS, Examples
from fastvq.runs import classifier
from fastvq.runs.classifier import agreement, train_classifier

from ..demo.squares import squares


def test_the_judge_learns_classes_and_leaves_randomness_alone():
    images, labels = squares()
    # Mirroring, which training does, makes the first and last class one.
    labels = (labels == 1).long()
    data = Examples("squares", images, images, ("",) * len(images), labels, labels)
    torch.manual_seed(3)
    judge = train_classifier(data, steps=60)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert agreement(judge, images / 255, labels) > 0.95
    assert agreement(judge, images / 255, 1 - labels) < 0.05
    with pytest.raises(ValueError, match="images: a classifier needs classes"):
        train_classifier(Examples("squares", images, images, ()), steps=1)


def test_the_judge_knows_digits_that_it_has_not_seen():
    digits = DATA_SETS["digits"].load()
    judge = train_classifier(digits, mirrored=False)
    assert agreement(judge, digits.test / 255, digits.test_labels) > 0.965


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
    """A model whose index for an image is half its brightness, and which decodes an index to itself."""

    training, bottleneck = False, None

    def train(self, mode=True):
        return self

    eval = train

    def encode(self, images):
        return (images * 255)[:, 0].round().long() // 2

    def restore(self, indices):
        return indices[:, None] / 255


def test_each_agreement_is_of_what_it_says(monkeypatch):
    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: by_brightness)
    # Six of eight images look like their class; half as bright, as 0, 0, 0, 0, 1, 1, 1 and 1, five of them do.
    seen = torch.tensor([0, 0, 0, 1, 2, 3, 2, 3]).to(torch.uint8)[:, None, None, None]
    labels = torch.tensor([0, 0, 0, 0, 2, 3, 2, 1])
    data = Examples("brightnesses", seen, seen, ("",) * 8, labels, labels)
    assert classifier.judge_samples(Guided(), Halving(), data, {"guidance": 2.0}) == {
        "sample_agreement": 1.0,
        "plain_sample_agreement": 0.25,
        "real_agreement": 0.75,
        "reconstruction_agreement": 0.625,
        "judged_samples": 120,
    }
    without = classifier.judge_samples(Guided(), Halving(), dataclasses.replace(data, test_labels=None), {})
    assert without == dict.fromkeys(
        ("sample_agreement", "plain_sample_agreement", "real_agreement", "reconstruction_agreement")
    )
