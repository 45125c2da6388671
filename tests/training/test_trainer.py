"""Training: settings, data order, resuming bit for bit, evaluation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import time
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvq
from fastvq.data import Images
from fastvq.errors import CheckpointError, ConfigError, DataError
from fastvq.runs.load import load_model
from fastvq.training import (
    TrainConfig,
    Trainer,
    build_model,
    checkpoint,
    evaluate,
    psnr_db,
)
from fastvq.training.batches import batch_rows, flip_some
from fastvq.training.config import PriorConfig, Settings
from fastvq.training.evaluation import reconstruct
from fastvq.training.loop import forget_run
from fastvq.training.metrics import read_metrics

# 392 vectors a batch for 16 codes: with this threshold some code is replaced at random in nearly every step.
TINY = TrainConfig(
    codebook_size=16, dim=8, dead_code_threshold=20, width=8, residual_width=4, encoder_blocks=1, decoder_blocks=1,
    steps=12, batch_size=8, warmup_steps=2, log_every=2, evaluate_every=6, checkpoint_every=4,
)  # fmt: skip


def tiny_images(seed: int = 0) -> Images:
    pixels = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images("noise", pixels[:40], pixels[40:], tuple(f"image {n}" for n in range(20)))


def assert_same_state(a: Trainer, b: Trainer) -> None:
    """Every tensor that a checkpoint holds is equal to the last bit."""
    first, second = a._checkpoint().tensors, b._checkpoint().tensors
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def stop_after(trainer: Trainer, steps: int) -> None:
    """Train, and send this process the signal of Ctrl-C in step number `steps`."""
    original = trainer.train_step

    def step_and_interrupt() -> None:
        original()
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.train_step = step_and_interrupt
    assert not trainer.fit(progress=False)
    assert trainer.step == steps


# Settings


def test_settings_survive_json() -> None:
    assert TrainConfig.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY
    older = TINY.to_json()
    del older["seed"]
    assert TrainConfig.from_json(older) == dataclasses.replace(TINY, seed=TrainConfig().seed)
    with pytest.raises(ConfigError, match="settings of another version of fastvq: sede"):
        TrainConfig.from_json(older | {"sede": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("codebook_size", 0), ("dim", 0), ("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("decay", 1.5),
     ("seed", -1), ("test_fraction", 1.0), ("bottleneck", "fsq"), ("image_size", 30), ("learning_rate", math.nan)],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", "oracle", "one of transformer, pixelcnn, lstm, got 'oracle'"),
        ("dim", 0, "at least 1, got 0"),
        ("depth", -2, "at least 1, got -2"),
        ("heads", 0, "at least 1, got 0"),
        ("dropout", 1.0, "at least 0 and below 1, got 1.0"),
        ("label_dropout", -0.1, "at least 0 and below 1, got -0.1"),
        ("steps", 0, "at least 1, got 0"),
        ("learning_rate", 0.0, "positive, got 0.0"),
        ("warmup_steps", -1, "at least 0, got -1"),
        ("weight_decay", -0.05, "at least 0, got -0.05"),
        ("seed", 2**63, f"between 0 and {2**63 - 1}, got {2**63}"),
    ],
)
def test_a_priors_setting_out_of_range_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be {re.escape(message)}$"):
        PriorConfig(**{name: value})


@pytest.mark.parametrize("settings", [TrainConfig, PriorConfig])
def test_every_number_has_a_range(settings: type[Settings]) -> None:
    # Of a folder the size of the images is free.
    given = {"data": "folder"} if settings is TrainConfig else {}
    for name, kind in typing.get_type_hints(settings).items():
        if kind not in (str, bool):
            with pytest.raises(ConfigError, match=f"^{name} must be "):
                settings(**given, **{name: math.nan})
    assert PriorConfig(dropout=0, label_dropout=0, warmup_steps=0, weight_decay=0).dim is None


def test_an_image_size_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_size 30 is no multiple"):
        TrainConfig(data="folder", image_size=30)


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [TINY.learning_rate_at(step) for step in range(TINY.steps + 1)]
    assert rates[0] == pytest.approx(TINY.learning_rate / 2)
    assert max(rates) < TINY.learning_rate
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_each_step_has_its_learning_rate(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_images(), tmp_path)
    for step in range(4):
        trainer.train_step()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [TINY.learning_rate_at(step)]


# Data order


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 9))
def test_an_epoch_shows_no_image_twice(count: int, batch_size: int, seed: int) -> None:
    if batch_size > count:
        with pytest.raises(ValueError, match="batch_size"):
            batch_rows(0, count=count, batch_size=batch_size, seed=seed)
        return
    steps = count // batch_size
    rows = [batch_rows(step, count=count, batch_size=batch_size, seed=seed) for step in range(2 * steps)]
    for epoch in (rows[:steps], rows[steps:]):
        seen = torch.cat(epoch)
        assert len(seen.unique()) == len(seen) == steps * batch_size
        assert 0 <= seen.min() <= seen.max() < count


def test_order_and_flips_depend_on_seed_and_step_alone() -> None:
    def rows(step: int, seed: int) -> torch.Tensor:
        return batch_rows(step, count=100, batch_size=10, seed=seed)

    first = rows(13, 5)
    torch.manual_seed(99)
    rows(2, 5)
    assert torch.equal(rows(13, 5), first)
    assert not torch.equal(rows(13, 6), first)
    assert not torch.equal(rows(3, 5), first)

    images = torch.rand(400, 1, 4, 4)
    flipped = flip_some(images, 3, seed=1)
    assert torch.equal(flip_some(images, 3, seed=1), flipped)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 140 < mirrored.sum() < 260


# Resuming


@pytest.mark.parametrize("bottleneck", ["vq", "none"])
@pytest.mark.parametrize("interrupted_at", [4, 7, 11])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, bottleneck: str, interrupted_at: int) -> None:
    config = dataclasses.replace(TINY, bottleneck=bottleneck)
    whole = Trainer(config, tiny_images(), tmp_path / "whole")
    assert whole.fit(progress=False)

    stop_after(Trainer(config, tiny_images(), tmp_path / "parts"), interrupted_at)
    torch.rand(1000)
    resumed = Trainer(config, tiny_images(), tmp_path / "parts", resume=True)
    assert resumed.step == interrupted_at
    assert resumed.fit(progress=False)

    assert_same_state(whole, resumed)
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


def test_a_run_is_reproduced_by_its_seed(tmp_path: Path) -> None:
    states = []
    for n, seed in enumerate([3, 3, 4]):
        trainer = Trainer(dataclasses.replace(TINY, seed=seed), tiny_images(), tmp_path / f"run{n}")
        trainer.fit(progress=False)
        states.append(trainer)
    assert_same_state(states[0], states[1])
    with pytest.raises(AssertionError):
        assert_same_state(states[0], states[2])


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path: Path) -> None:
    whole = Trainer(TINY, tiny_images(), tmp_path / "whole")
    whole.fit(progress=False)
    # A process that dies leaves records beyond its last checkpoint, the last of them cut off.
    killed = Trainer(TINY, tiny_images(), tmp_path / "killed")
    stop_after(killed, 8)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "split": "train", "loss": 99.0}\n{"step": 12, "spl')
    resumed = Trainer(TINY, tiny_images(), tmp_path / "killed", resume=True)
    resumed.fit(progress=False)
    assert_same_state(whole, resumed)
    assert read_metrics(tmp_path / "killed" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    Trainer(TINY, tiny_images(), tmp_path).fit(progress=False)
    records = (tmp_path / "metrics.jsonl").read_bytes()
    assert Trainer(TINY, tiny_images(), tmp_path, resume=True).fit(progress=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == records


def test_resuming_with_other_settings_or_images_is_refused(tmp_path: Path) -> None:
    stop_after(Trainer(TINY, tiny_images(), tmp_path), 4)
    with pytest.raises(ConfigError, match="batch_size from 8 to 10, seed from 0 to 1"):
        Trainer(dataclasses.replace(TINY, batch_size=10, seed=1), tiny_images(), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="not those that the run"):
        Trainer(TINY, tiny_images(seed=5), tmp_path, resume=True)


def test_a_run_is_not_begun_on_top_of_another(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Trainer(TINY, tiny_images(), tmp_path, resume=True)
    stop_after(Trainer(TINY, tiny_images(), tmp_path), 4)
    with pytest.raises(CheckpointError, match="already holds a run"):
        Trainer(TINY, tiny_images(), tmp_path)
    (tmp_path / "mine.txt").touch()
    forget_run(tmp_path)
    assert Trainer(TINY, tiny_images(), tmp_path).step == 0
    assert (tmp_path / "mine.txt").exists()


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size 41 is more than the 40 training images"):
        Trainer(dataclasses.replace(TINY, batch_size=41), tiny_images(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_images(), tmp_path)
    with torch.no_grad():
        next(trainer.model.decoder.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="at step 2"):
        trainer.fit(progress=False)
    assert not checkpoint.checkpoint_folders(tmp_path)


def test_the_second_ctrl_c_acts_as_usual(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_images(), tmp_path)
    original = trainer.train_step
    before = signal.getsignal(signal.SIGINT)

    def interrupt_twice() -> None:
        original()
        # Python calls a handler between two steps of its own, not always at once: a second signal before that would
        # be lost in the first.
        deadline = time.monotonic() + 10
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not before and time.monotonic() < deadline:
            pass
        signal.raise_signal(signal.SIGINT)
        while time.monotonic() < deadline:
            pass

    trainer.train_step = interrupt_twice
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(progress=False)
    assert signal.getsignal(signal.SIGINT) is before


# Evaluation


def test_psnr() -> None:
    assert psnr_db(0.01) == pytest.approx(20)
    assert psnr_db(1.0) == 0
    assert psnr_db(0.0) == math.inf


def test_evaluation_is_of_all_pixels_and_all_codes_whatever_the_batches() -> None:
    torch.manual_seed(1)
    model = build_model(TINY)
    images = tiny_images().train
    x = images.float() / 255
    model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluate(model, images, batch_size=7)

    assert model.training
    assert model.bottleneck.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    restored, indices = reconstruct(model, x)
    assert result.psnr_db == pytest.approx(psnr_db((restored - x).square().mean().item()), abs=1e-4)
    assert torch.equal(result.counts, torch.bincount(indices.flatten(), minlength=16))
    share = result.counts[result.counts > 0] / result.counts.sum()
    assert result.perplexity == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-5)
    assert result.usage == pytest.approx((result.counts > 0).float().mean().item())
    assert restored.min() >= 0
    assert restored.max() <= 1


def test_the_ceiling_has_no_codes() -> None:
    result = evaluate(build_model(dataclasses.replace(TINY, bottleneck="none")), tiny_images().test)
    assert (result.perplexity, result.usage, result.counts.numel()) == (None, None, 0)
    assert 0 < result.psnr_db < 20


def test_a_trained_model_loads_from_its_folder(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_images(), tmp_path)
    trainer.fit(progress=False)
    model, config = load_model(tmp_path)
    assert config == TINY
    assert not model.training
    assert isinstance(model.bottleneck, fastvq.VectorQuantize)
    x = tiny_images().test.float() / 255
    assert torch.equal(model.encode(x), trainer.model.eval().encode(x))


def test_training_lowers_the_error_on_held_out_images(tmp_path: Path) -> None:
    ramps = (torch.rand(120, 1, 1, 28, generator=torch.Generator().manual_seed(0)).cumsum(-1) * 18).expand(
        -1, 1, 28, 28
    )
    pixels = ramps.to(torch.uint8).contiguous()
    images = Images("ramps", pixels[:100], pixels[100:], ("ramp",) * 20)
    trainer = Trainer(dataclasses.replace(TINY, steps=150, evaluate_every=150, checkpoint_every=150), images, tmp_path)
    before = evaluate(trainer.model, images.test).psnr_db
    trainer.fit(progress=False)
    assert evaluate(trainer.model, images.test).psnr_db > before + 6
