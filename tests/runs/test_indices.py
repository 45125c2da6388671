"""A run's images as indices: written once, tied to the model, replaced if damaged."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from fastvq.models import VQVAE
from fastvq.runs.indices import index_examples
from fastvq.runs.load import load_model
from fastvq.training import load_examples

from ..tiny_runs import tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run of a few steps on a folder of images."""
    return tiny_run(tmp_path_factory.mktemp("prior"), count=40, grayscale=True)[0]


@pytest.fixture
def run(trained, tmp_path):
    """Return a copy of the run that a test may change."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_indices_are_written_once_and_belong_to_the_model(run, monkeypatch):
    model, config = load_model(run)
    images = load_examples(config)
    data = index_examples(run, model, images, mirrored=True)
    assert torch.equal(data.test.long(), model.encode(images.test / 255))
    both = torch.cat([images.train, images.train.flip(-1)]) / 255
    assert torch.equal(data.train.long(), model.encode(both))
    assert sorted(path.name for path in (run / "prior").iterdir()) == [
        "indices-test.npy",
        "indices-train.npy",
        "indices.json",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE, "encode", lambda *_: pytest.fail("the indices exist already"))
        again = index_examples(run, model, images, mirrored=True)
    assert torch.equal(again.train, data.train)
    plain = index_examples(run, model, images, mirrored=False)
    assert len(plain.train) == len(images.train)
    with torch.no_grad():
        model.bottleneck.codebook[:] = model.bottleneck.codebook.flip(0)
    other = index_examples(run, model, images, mirrored=False)
    assert torch.equal(other.train, 23 - plain.train)


@pytest.mark.parametrize("spoil", ["description", "truncated", "flipped", "empty", "gone", "another shape"])
def test_damaged_indices_are_written_again(run, spoil):
    model, config = load_model(run)
    images = load_examples(config)
    expected = index_examples(run, model, images, mirrored=False).train.clone()
    train, described = run / "prior" / "indices-train.npy", run / "prior" / "indices.json"
    if spoil == "description":
        described.write_text(described.read_text()[:-5])
    elif spoil == "truncated":
        train.write_bytes(train.read_bytes()[:-4])
    elif spoil == "flipped":
        content = bytearray(train.read_bytes())
        content[-8] ^= 1
        train.write_bytes(content)
    elif spoil == "empty":
        train.write_bytes(b"")
    elif spoil == "gone":
        train.unlink()
    else:
        np.save(train, np.zeros((3, 4, 4), np.int32))
    assert torch.equal(index_examples(run, model, images, mirrored=False).train, expected)
    assert np.array_equal(np.load(train), expected.numpy())


def test_labels_follow_the_mirrored_images(run):
    model, config = load_model(run)
    images = load_examples(config)
    labeled = dataclasses.replace(
        images, train_labels=torch.arange(len(images.train)) % 3, test_labels=torch.arange(len(images.test)) % 3
    )
    data = index_examples(run, model, labeled, mirrored=True)
    assert data.classes == 3
    assert torch.equal(data.train_labels, labeled.train_labels.repeat(2))
