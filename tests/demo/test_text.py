"""The demo of text to image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastvq.data import Examples
from fastvq.demo import parts, text
from fastvq.demo.folder import _delete
from fastvq.modalities import ImageConfig
from fastvq.models import ContrastiveModel, TextTokenizer
from fastvq.runs import load
from fastvq.training.config import ContrastiveConfig, PriorConfig

from .squares import squares

SMALL = ImageConfig(
    data="squares", image_size=12, codebook_size=16, dim=8, width=8, residual_width=4, encoder_blocks=1,
    decoder_blocks=1, steps=2, batch_size=8, flip=False,
)  # fmt: skip
PRIOR = PriorConfig(text=True, steps=2, batch_size=8, dim=16, depth=1, heads=2)
CONTRASTIVE = ContrastiveConfig(steps=2, batch_size=8, dim=8, width=4, text_width=8)
WHERE = ("square at the left", "square in the middle", "square at the right")


def captioned() -> Examples:
    images, labels = squares(60)
    captions = tuple(f"{WHERE[label]}\n{WHERE[label]}, {number}" for number, label in enumerate(labels.tolist()))
    return Examples(
        "squares", images[:40], images[40:], captions[40:], train_captions=captions[:40], test_captions=captions[40:]
    )


def test_the_demo_fills_a_table_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    examples = captioned()
    monkeypatch.setattr(text, "load_examples", lambda _: examples)
    monkeypatch.setattr(load, "load_examples", lambda _: examples)
    monkeypatch.setattr(text, "JUDGED", 6)
    monkeypatch.setattr(text, "DRAWN", 3)
    monkeypatch.setattr(text, "LEARNED", WHERE)
    monkeypatch.setattr(text, "MADE_UP", WHERE[:1])
    for picture in ("picture_reconstructions", "picture_run", "picture_prior"):
        monkeypatch.setattr(parts, picture, lambda *_, **__: None)
    folder = tmp_path / "demo"
    metrics = text.run_demo(folder, config=SMALL, prior_config=PRIOR, contrastive_config=CONTRASTIVE)
    assert metrics is not None
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["candidates"] == {"train": 6, "test": 6}
    for shares in metrics["retrieval"].values():
        assert list(shares) == ["real", "decoded", "first sample", "best sample"]
        assert all(0 <= first <= five <= 1 for first, five in shares.values())
    assert 0 <= metrics["copies"] <= 6
    assert metrics["prior_bits_with_other_captions"] != metrics["prior_bits_per_index"]
    page = (folder / "index.html").read_text()
    for name in ("captions", "learned", "held-out", "combinations", "neighbors"):
        assert f'src="{name}.png"' in page
    _delete(folder)
    assert {path.name for path in folder.rglob("*") if path.is_file()} <= {".demo", ".lock"}


def test_samples_are_put_in_the_order_of_their_similarity() -> None:
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train(WHERE, vocabulary=300, length=16)
    model = ContrastiveModel(
        1, vocabulary=tokenizer.vocabulary, text_length=tokenizer.length, dim=8, width=4, text_width=8
    ).eval()
    model.tokenizer = tokenizer
    drawn = torch.rand(3, 5, 1, 12, 12)
    found = text.ranked(model, drawn, list(WHERE))
    with torch.no_grad():
        for own, images, name in zip(found, drawn, WHERE, strict=True):
            similar = model(images, tokenizer.encode(name)[None])[:, 0]
            assert torch.equal(own, images[similar.argsort(descending=True)])
