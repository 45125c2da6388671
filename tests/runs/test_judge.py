"""Judgement of samples: precision and recall of known sets, copies are seen, and the page has the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastvq.cli.main import main
from fastvq.data import Examples
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.runs import judge as judging
from fastvq.runs.judge import judge, precision_and_recall
from fastvq.runs.run_page import write_run_page
from fastvq.runs.train_prior import train_prior
from fastvq.training.config import PriorConfig

from ..cases import generator
from ..tiny_runs import tiny_run


def test_precision_and_recall_of_sets():
    real = torch.randn(200, 2, generator=generator())
    alike = torch.randn(200, 2, generator=generator(1))
    precision, recall = precision_and_recall(real, alike)
    assert precision > 0.9
    assert recall > 0.9
    assert precision_and_recall(real, alike + 100) == (0, 0)
    one_mode = 0.05 * alike
    precision, recall = precision_and_recall(real, one_mode)
    assert precision > 0.9
    assert recall < 0.2
    precision, recall = precision_and_recall(real, 20 * alike)
    assert precision < 0.2


def test_precision_and_recall_by_hand():
    """With one neighbor, balls reach to the nearest of the own set."""
    real, other = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.5], [20.0], [21.0]])
    assert precision_and_recall(real, other, 1) == (pytest.approx(1 / 3), 1)  # 18.5 is the radius around 1.5
    assert precision_and_recall(other, real, 1) == (1, pytest.approx(1 / 3))


class Same:
    """A model whose indices are the pixels, and a prior that draws given images."""

    classes = 0
    codebook_size = 256

    def __init__(self, drawn):
        self.drawn = drawn

    def encode(self, x):
        return (x[:, 0] * 255).round().long()

    def restore(self, indices):
        return indices[:, None] / 255

    def encoder(self, x):
        return x

    def sample(self, count, labels, *, generator):
        return self.drawn[:count, 0].long()


@pytest.mark.parametrize("copied", [True, False])
def test_copies_of_training_images_are_seen(copied):
    images = torch.randint(0, 256, (120, 1, 6, 6), generator=generator(), dtype=torch.uint8)
    train, test, others = images.split(40)
    examples = Examples("noise", train, test, ("",) * 40)
    model = Same(train if copied else others)
    known = train[:, 0].int()
    measures = judge(model, model, ImageConfig(flip=False), examples, known, count=30)["measures"]
    for name in ("copies", "equal_indices"):
        assert (measures[name]["samples"] > 0.9) == copied
        assert measures[name]["decoded"] < 0.1
    assert (measures["nearest_rms"]["samples"] == 0) == copied
    assert measures["nearest_rms"]["decoded"] > 0.1
    assert "class_agreement" not in measures
    with pytest.raises(ConfigError, match="samples must be at least 7, and as many held-out examples, got 6"):
        judge(model, model, ImageConfig(flip=False), examples, known, count=6)


def test_the_command_writes_a_table_and_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run, _ = tiny_run(tmp_path, count=90, grayscale=True)
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1), progress=False)
    capsys.readouterr()
    monkeypatch.setattr(judging, "_BATCH", 4)
    assert main(["evaluate", str(run), "--samples", "7", "--top-k", "3"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((run / "samples.json").read_text())
    assert record["count"] == 7
    assert record["features"] == "encoder"
    assert record["sampling"] == {"top_k": 3}
    assert set(record["measures"]) == {"precision", "recall", "nearest_rms", "copies", "equal_indices"}
    assert f"{record['measures']['nearest_rms']['samples']:.3f}" in printed
    page = (run / "index.html").read_text()
    assert "7 samples, judged by <code>fastvq evaluate --samples</code>" in page
    assert "<td>distance to the nearest training image, RMS</td>" in page
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1, seed=1), overwrite=True, progress=False)
    write_run_page(run)
    assert "judged by" not in (run / "index.html").read_text()  # that was another prior
    assert main(["evaluate", str(run), "--top-k", "3"]) == 2
    assert "--top-k: has no effect without --samples" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--samples", "7", "--device", "cpu"]) == 2
    assert "--device: has no effect with --samples" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--samples", "3"]) == 2
    assert "--samples must be at least 7" in capsys.readouterr().err
