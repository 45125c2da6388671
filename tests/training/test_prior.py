"""Training of a prior on given indices: schedule, batches, loss, gradients, optimizer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastvq.data.order import batch_rows
from fastvq.training.config import PriorConfig
from fastvq.training.prior import IndexData, PriorTrainer, corrupted

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
    losses, seen = trainer.model.losses, []
    monkeypatch.setattr(trainer.model, "losses", lambda *given: (seen.append(given), losses(*given))[1])
    for step in range(3):
        trainer.train_step()
        rows = batch_rows(step, count=20, batch_size=TINY.batch_size, seed=TINY.seed)
        indices, labels = seen[step]
        assert torch.equal(indices, trainer.data.train[rows].long())
        assert torch.equal(labels, trainer.data.train_labels[rows])


def test_recent_bits_are_the_mean_loss_in_bits(tmp_path, monkeypatch):
    trainer = labeled_trainer(tmp_path)
    losses, found = trainer.model.losses, []
    monkeypatch.setattr(trainer.model, "losses", lambda *given: (found.append(losses(*given)), found[-1])[1])
    for _ in range(3):
        trainer.train_step()
    measures, text = trainer.recent()
    bits = sum(nats.item() for _, nats in found) / 3 / math.log(2)
    assert measures == {"bits_per_index": pytest.approx(bits, rel=1e-6)}
    assert text == f"{bits:.2f} bits per index"


def test_a_corrupted_share_of_the_indices_is_seen_and_the_true_ones_are_predicted(tmp_path, monkeypatch):
    trainer = labeled_trainer(tmp_path, dataclasses.replace(TINY, corruption=0.9))
    losses, given = trainer.model.losses, []
    monkeypatch.setattr(trainer.model, "losses", lambda *all: (given.append(all), losses(*all))[1])
    trainer.train_step()
    ((indices, _, seen),) = given
    rows = batch_rows(0, count=20, batch_size=TINY.batch_size, seed=TINY.seed)
    assert torch.equal(indices, trainer.data.train[rows].long())
    assert not torch.equal(indices, seen)
    model = trainer.model.eval()
    expected = torch.nn.functional.cross_entropy(model(seen).flatten(0, 1), indices.flatten())
    assert model.losses(indices, None, seen)[1].item() == pytest.approx(expected.item())
    assert model.losses(indices, None, seen)[1] != model.loss(indices)


def test_shares_of_corrupted_indices_differ_between_samples_and_stay_in_range():
    indices = torch.full((400, 10, 10, 2), -1)
    found = corrupted(indices, (3, 7), 0.5)
    shares = (found >= 0).flatten(1).double().mean(1)
    assert shares.mean().item() == pytest.approx(0.25, abs=0.02)
    assert shares.min() < 0.05
    assert 0.45 < shares.max() < 0.7
    for stage, size in enumerate((3, 7)):
        assert found[..., stage].unique().tolist() == [-1, *range(size)]
    assert torch.equal(corrupted(indices, (3, 7), 0.0), indices)


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path, monkeypatch):
    trainer = labeled_trainer(tmp_path)
    losses = trainer.model.losses
    for scale in (1e3, 1e-4):
        monkeypatch.setattr(
            trainer.model, "losses", lambda *given, scale=scale: [scale * value for value in losses(*given)]
        )
        trainer.train_step()
        norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
        assert norm == pytest.approx(1, rel=1e-3) if scale > 1 else 0 < norm < 0.1


def test_the_optimizer_has_its_settings(tmp_path):
    optimizer = labeled_trainer(tmp_path, dataclasses.replace(TINY, weight_decay=0.3)).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        assert (settings["betas"], settings["weight_decay"]) == ((0.9, 0.98), 0.3)
