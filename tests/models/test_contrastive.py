"""The contrastive model: unit vectors, its loss, and pairs that it learns to find."""

from __future__ import annotations

import pytest
import torch

from fastvq.models import ContrastiveModel
from fastvq.models.contrastive import retrieval

from ..cases import close, generator

CAPTIONS = torch.tensor([[1, 5, 2, 0], [1, 6, 2, 0], [1, 5, 6, 2], [1, 7, 7, 2]])
SMALL = {"vocabulary": 10, "text_length": 4, "dim": 8, "width": 4, "text_width": 8}


def test_pairs_are_learned():
    torch.manual_seed(0)
    model = ContrastiveModel(3, **SMALL)
    x = torch.rand(4, 3, 16, 16, generator=generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.loss(x, CAPTIONS).item()
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(x, CAPTIONS).backward()
        optimizer.step()
    assert model.loss(x, CAPTIONS) < first / 4
    model.eval()
    assert retrieval(model, x, CAPTIONS) == 1.0
    assert retrieval(model, x, CAPTIONS.flip(0)) == 0.0
    assert retrieval(model, x, CAPTIONS.flip(0), among=4) == 1.0
    similar = model(x, CAPTIONS)
    assert similar.abs().max() <= 1 + 1e-6
    close(similar[1:2, :2], model(x[1:2], CAPTIONS[:2]))


def test_padding_does_not_change_a_caption():
    model = ContrastiveModel(1, **SMALL | {"text_length": 6}).eval()
    longer = torch.nn.functional.pad(CAPTIONS, (0, 2))
    vectors = model.texts(longer)
    model.words.weight.data[0] = 99.0
    close(model.texts(longer), vectors)
    close(vectors.norm(dim=1), torch.ones(4))


def test_equal_captions_are_not_wrong_for_each_others_images():
    model = ContrastiveModel(1, **SMALL).eval()
    x = torch.rand(2, 1, 16, 16, generator=generator())
    assert model.loss(x, CAPTIONS[[0, 0]]).item() == 0.0
    assert model.loss(x, CAPTIONS[[0, 1]]) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.images(torch.zeros(1, 3, 8, 8)),
            r"x: must be images \(B, 1, H, W\) of at least 8x8, got \(1, 3, 8, 8\)",
        ),
        (lambda m: m.images(torch.zeros(1, 1, 4, 8)), "at least 8x8, got"),
        (lambda m: m.texts(CAPTIONS[:, :3]), r"captions: must be int64 of shape \(B, 4\), got torch.int64 \(4, 3\)"),
        (lambda m: ContrastiveModel(2, **SMALL), "channels: must be 1 or 3, got 2"),
    ],
)
def test_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(ContrastiveModel(1, **SMALL))
