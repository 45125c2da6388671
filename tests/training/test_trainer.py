"""Training of a VQ-VAE: resuming bit for bit, interruptions, evaluations."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.data import Images
from fastvq.errors import CheckpointError, ConfigError, DataError
from fastvq.runs.load import load_model
from fastvq.training import Evaluation, Trainer, checkpoint, evaluate
from fastvq.training.loop import delete_run
from fastvq.training.metrics import read_metrics

from .tiny import TINY, tiny_images


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
    assert trainer.fit(progress=False) is None
    assert trainer.step == steps


def test_each_step_has_its_learning_rate(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_images(), tmp_path)
    for step in range(4):
        trainer.train_step()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [TINY.learning_rate_at(step)]


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
    with pytest.raises(CheckpointError, match="the data differ from those that the run"):
        Trainer(TINY, tiny_images(seed=5), tmp_path, resume=True)


def test_a_run_is_not_begun_on_top_of_another(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Trainer(TINY, tiny_images(), tmp_path, resume=True)
    stop_after(Trainer(TINY, tiny_images(), tmp_path), 4)
    with pytest.raises(CheckpointError, match="already holds a run"):
        Trainer(TINY, tiny_images(), tmp_path)
    (tmp_path / "mine.txt").touch()
    delete_run(tmp_path)
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


@pytest.mark.parametrize("steps", [12, 13])
def test_every_step_is_evaluated_at_most_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    evaluated = []
    original = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer: (evaluated.append(trainer.step), original(trainer))[1])
    config = dataclasses.replace(TINY, steps=steps)
    shown: list[tuple[int, Evaluation]] = []

    def show(trainer: Trainer, evaluation: Evaluation) -> None:
        shown.append((trainer.step, evaluation))

    last = Trainer(config, tiny_images(), tmp_path).fit(on_evaluation=show, progress=False)
    assert evaluated == [step for step, _ in shown] == ([6, 12] if steps == 12 else [6, 12, 13])
    assert shown[-1][1] is last

    again = Trainer(config, tiny_images(), tmp_path, resume=True).fit(on_evaluation=show, progress=False)
    assert evaluated[len(shown) - 1 :] == [steps]
    assert shown[-1] == (steps, again)
    assert again.psnr_db == last.psnr_db
