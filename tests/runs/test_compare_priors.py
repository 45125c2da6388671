"""Priors of equal training time: every kind has a record, and the run's own prior stays."""

from __future__ import annotations

import dataclasses
import json

import torch

from fastvq.cli.main import main
from fastvq.models.priors import PRIORS
from fastvq.runs import compare_priors as comparison
from fastvq.runs.compare_priors import compare_priors
from fastvq.runs.load import load_prior
from fastvq.runs.train_prior import train_prior
from fastvq.training.config import PriorConfig

from ..tiny_runs import tiny_run

KINDS = [kind for kind, prior in PRIORS.items() if not prior.in_scales and not prior.in_stages]
TINY = PriorConfig(
    steps=6, batch_size=8, dim=16, depth=1, heads=2, warmup_steps=2, log_every=2, evaluate_every=3, checkpoint_every=3
)


def test_priors_are_compared_after_equal_time(tmp_path):
    run, _ = tiny_run(tmp_path, count=40, grayscale=True)
    train_prior(run, TINY, progress=False)
    kept = load_prior(run)[0].state_dict()
    table = "\n".join(compare_priors(run, 0.5, config=dataclasses.replace(TINY, dim=None), progress=False))
    records = json.loads((run / "priors.json").read_text())
    assert [record["kind"] for record in records] == KINDS
    for record in records:
        assert 0 < record["bits_per_index"] < 10
        assert f"| {record['kind']} | {record['bits_per_index']:.3f} |" in table
        assert record["steps"] > 1
        assert record["processor_seconds"] < 20
    after = load_prior(run)[0].state_dict()
    assert after.keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in after.items())


def test_an_interrupted_comparison_replaces_nothing(tmp_path, monkeypatch, capsys):
    """Not even if one kind is complete."""
    run, _ = tiny_run(tmp_path, count=40, grayscale=True)
    (run / "priors.json").write_text("earlier")
    results = iter([{"kind": "transformer"}, None])
    monkeypatch.setattr(comparison, "_train_for", lambda *_, **__: next(results))
    assert main(["prior", str(run), "--compare=1"]) == 130
    assert "stopped; nothing is written" in capsys.readouterr().out
    assert (run / "priors.json").read_text() == "earlier"
