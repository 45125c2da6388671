"""Training of a prior on given indices: schedule, batches, loss, gradients, optimizer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastvq.data.order import batch_rows
from fastvq.training.config import PriorConfig
from fastvq.training.prior import IndexData, PriorTrainer

from ..cases import generator

TINY = PriorConfig(
    steps=6, batch_size=8, dim=16, depth=1, heads=2, warmup_steps=2, log_every=2, evaluate_every=3, checkpoint_every=3
)


def test_learning_rate_rises_and_falls():
    rates = [TINY.learning_rate_at(step) for step in range(7)]
    assert rates[0] == TINY.learning_rate / 2
    assert rates[1] == rates[2] == TINY.learning_rate
    assert rates[2] > rates[3] > rates[4] > rates[5] > rates[6]
    assert abs(rates[6]) < 1e-12


def labeled_trainer(folder, config=TINY):
    """Return a trainer on random indices of three classes."""
    train, test = (torch.randint(0, 24, (count, 4, 4), generator=generator(count)).int() for count in (20, 5))
    data = IndexData(train, test, torch.randint(0, 3, (20,), generator=generator()), torch.arange(5) % 3)
    return PriorTrainer(config, data, 24, folder, identity="none")


def test_each_step_has_its_learning_rate(tmp_path):
    trainer = labeled_trainer(tmp_path)
    for step in range(4):
        trainer.train_step()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [TINY.learning_rate_at(step)]


def test_a_step_learns_from_indices_and_their_labels(tmp_path, monkeypatch):
    trainer = labeled_trainer(tmp_path)
    loss, seen = trainer.model.loss, []
    monkeypatch.setattr(trainer.model, "loss", lambda *given: (seen.append(given), loss(*given))[1])
    for step in range(3):
        trainer.train_step()
        rows = batch_rows(step, count=20, batch_size=TINY.batch_size, seed=TINY.seed)
        indices, labels = seen[step]
        assert torch.equal(indices, trainer.data.train[rows].long())
        assert torch.equal(labels, trainer.data.train_labels[rows])


def test_recent_bits_are_the_mean_loss_in_bits(tmp_path, monkeypatch):
    trainer = labeled_trainer(tmp_path)
    loss, losses = trainer.model.loss, []
    monkeypatch.setattr(trainer.model, "loss", lambda *given: (losses.append(loss(*given)), losses[-1])[1])
    for _ in range(3):
        trainer.train_step()
    measures, text = trainer.recent()
    bits = sum(value.item() for value in losses) / 3 / math.log(2)
    assert measures == {"bits_per_index": pytest.approx(bits, rel=1e-6)}
    assert text == f"{bits:.2f} bits per index"


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path, monkeypatch):
    trainer = labeled_trainer(tmp_path)
    loss = trainer.model.loss
    for scale in (1e3, 1e-4):
        monkeypatch.setattr(trainer.model, "loss", lambda *given, scale=scale: scale * loss(*given))
        trainer.train_step()
        norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
        assert norm == pytest.approx(1, rel=1e-3) if scale > 1 else 0 < norm < 0.1


def test_the_optimizer_has_its_settings(tmp_path):
    optimizer = labeled_trainer(tmp_path, dataclasses.replace(TINY, weight_decay=0.3)).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        assert (settings["betas"], settings["weight_decay"]) == ((0.9, 0.98), 0.3)
