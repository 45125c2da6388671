"""Training of a VQ-VAE: resuming bit for bit, interruptions, evaluations."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvq
from fastvq.data import Examples
from fastvq.errors import CheckpointError, ConfigError, DataError
from fastvq.runs.load import load_model
from fastvq.training import Evaluation, Trainer, checkpoint, evaluate, load_examples
from fastvq.training.checkpoint import load_latest
from fastvq.training.loop import delete_run
from fastvq.training.metrics import read_metrics

from ..data.test_source import folder_of
from .tiny import TINY, stop_after, tiny_images


def assert_same_state(a: Trainer, b: Trainer) -> None:
    """Every tensor that a checkpoint holds is equal to the last bit."""
    first, second = a._checkpoint().tensors, b._checkpoint().tensors
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_each_step_has_its_learning_rate(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_images(), tmp_path)
    for step in range(4):
        trainer.train_step()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [TINY.learning_rate_at(step)]


@pytest.mark.parametrize(
    ("bottleneck", "interrupted_at"), [("vq", 4), ("vq", 7), ("vq", 11), ("gumbel", 7), ("vae", 7), ("none", 7)]
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, bottleneck: str, interrupted_at: int) -> None:
    threshold = TINY.dead_code_threshold if bottleneck in ("vq", "none") else 1.0
    size = TINY.codebook_size if bottleneck != "vae" else 512
    changes = {"dead_code_threshold": threshold, "codebook_size": size}
    config = dataclasses.replace(TINY, bottleneck=bottleneck, **changes)
    whole = Trainer(config, tiny_images(), tmp_path / "whole")
    assert whole.fit(progress=False)

    stop_after(Trainer(config, tiny_images(), tmp_path / "parts"), interrupted_at)
    torch.rand(1000)
    resumed = Trainer(config, tiny_images(), tmp_path / "parts", resume=True)
    assert resumed.step == interrupted_at
    assert resumed.fit(progress=False)

    assert_same_state(whole, resumed)
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


def test_schedules_of_a_bottleneck_follow_the_steps(tmp_path: Path) -> None:
    options = {"temperature": 1.0, "final_temperature": 0.2, "kl_weight": 0.0, "final_kl_weight": 0.6, "annealing": 0.5}
    changes = {"bottleneck": "gumbel", "bottleneck_options": options, "dead_code_threshold": 1.0, "steps": 8}
    trainer = Trainer(dataclasses.replace(TINY, **changes), tiny_images(), tmp_path)
    for step in range(6):
        trainer.train_step()
        share = min(1.0, step / 4)
        assert float(trainer.model.bottleneck.temperature) == pytest.approx(1 - 0.8 * share)
        assert float(trainer.model.bottleneck.kl_weight) == pytest.approx(0.6 * share)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_of_random_crops_resumes_bit_for_bit(tmp_path: Path, workers: int) -> None:
    """Wide images, cropped at random; the second half of the run has another number of workers."""
    folder_of(tmp_path / "images", [f"{n}.png" for n in range(30)])
    size = {"image_size": 8, "image_width": 16, "crop_from": 12, "grayscale": False}
    config = dataclasses.replace(TINY, data=str(tmp_path / "images"), **size)
    images = load_examples(config)
    whole = Trainer(config, images, tmp_path / "whole")
    assert whole.fit(progress=False)
    stop_after(Trainer(config, images, tmp_path / "parts"), 7)
    resumed = Trainer(dataclasses.replace(config, workers=workers), images, tmp_path / "parts", resume=True)
    assert resumed.fit(progress=False)
    assert_same_state(whole, resumed)
    assert whole.model.encode(torch.rand(1, 3, 8, 16)).shape == (1, 2, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"bottleneck": "vq", "bottleneck_options": {"heads": 2}},
        {"bottleneck": "rvq", "bottleneck_options": {"codebook_sizes": [8, 4], "quantize_dropout": True}},
        {"bottleneck": "rvq", "bottleneck_options": {"num_quantizers": 2, "shared_codebook": True}},
        {"bottleneck": "grouped-rvq"},
        {"bottleneck": "sim-vq"},
        {"bottleneck": "residual-sim-vq", "bottleneck_options": {"num_quantizers": 2}},
        {
            "bottleneck": "fsq",
            "bottleneck_options": {"levels": [4, 3], "preserve_symmetry": True, "noise_dropout": 0.5},
        },
        {"bottleneck": "residual-fsq", "bottleneck_options": {"levels": [4, 3], "quantize_dropout": True}},
        {"bottleneck": "lfq"},
        {"bottleneck": "residual-lfq", "bottleneck_options": {"num_quantizers": 2}},
        {"bottleneck": "fsp", "bottleneck_options": {"levels": [4, 3]}},
        {"bottleneck": "latent", "bottleneck_options": {"levels": [4, 3]}},
        {"bottleneck": "hierarchical", "bottleneck_options": {"quant_resi": 0.0, "nested_dropout": 0.5}},
    ],
    ids=lambda options: options["bottleneck"],
)
def test_a_run_with_any_bottleneck_resumes_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    small = {"image_size": 8, "data": "noise", "steps": 5, "log_every": 2, "evaluate_every": 5, "checkpoint_every": 3}
    config = dataclasses.replace(TINY, **small, **options, codebook_size=512, dead_code_threshold=1.0)
    if "lfq" in config.bottleneck or "vq" in config.bottleneck or config.bottleneck == "hierarchical":
        config = dataclasses.replace(config, codebook_size=16)
    images = tiny_images()
    images = dataclasses.replace(images, train=images.train[..., :8, :8], test=images.test[..., :8, :8])
    whole = Trainer(config, images, tmp_path / "whole")
    evaluation = whole.fit(progress=False)
    assert evaluation

    stop_after(Trainer(config, images, tmp_path / "parts"), 3)
    resumed = Trainer(config, images, tmp_path / "parts", resume=True)
    assert resumed.fit(progress=False)
    assert_same_state(whole, resumed)
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == records

    sizes = whole.model.adapter.stage_sizes()
    assert [len(counts) for counts in evaluation.stage_counts] == [*sizes]
    assert records[-1]["usage"] == evaluation.usage
    if len(sizes) > 1:
        each = [records[-1][f"usage_{n}"] for n in range(1, len(sizes) + 1)]
        assert sum(each) / len(each) == pytest.approx(evaluation.usage)
    # Weights without a gradient, such as those of a convolution of share 0, have no state in the optimizer.
    assert load_latest(tmp_path / "parts").config == config


def test_more_settings_resume_bit_for_bit(tmp_path: Path) -> None:
    more = {"accumulate": 4, "clip_norm": 0.1, "weight_average": 0.9}
    config = dataclasses.replace(TINY, **more)
    whole = Trainer(config, tiny_images(), tmp_path / "whole")
    assert whole.fit(progress=False)
    stop_after(Trainer(config, tiny_images(), tmp_path / "parts"), 7)
    resumed = Trainer(config, tiny_images(), tmp_path / "parts", resume=True)
    assert resumed.fit(progress=False)
    assert_same_state(whole, resumed)


@pytest.mark.parametrize("size", [(64, 64), (128, 96)])
def test_color_images_of_any_size_are_learned_from(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    form = {"data": "noise", "image_size": height, "image_width": width, "grayscale": False, "downsamples": 4}
    config = dataclasses.replace(TINY, **form, batch_size=2, steps=1)
    pixels = torch.randint(0, 256, (6, 3, height, width), dtype=torch.uint8)
    trainer = Trainer(config, Examples("noise", pixels[:4], pixels[4:], ("a", "b")), tmp_path)
    assert trainer.fit(progress=False)
    assert trainer.model.encode(torch.rand(1, 3, height, width)).shape == (1, height // 16, width // 16)


@pytest.mark.parametrize("setting", [{"precision": "bf16"}, {"compile": True}])
def test_a_setting_changes_the_weights_by_rounding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]
) -> None:
    # Inductor takes too long for a test.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    windows = []
    for name, config in (("plain", TINY), ("other", dataclasses.replace(TINY, **setting))):
        trainer = Trainer(config, tiny_images(), tmp_path / name)
        trainer.train_step()
        windows.append(trainer._window)
    assert torch.allclose(*windows, rtol=0.02)
    assert torch.equal(*windows) == ("compile" in setting)


def test_parts_of_a_batch_are_learned_from_as_one(tmp_path: Path) -> None:
    """Gradient and codebook of the first step are those of the whole batch, up to rounding."""
    trainers = [
        Trainer(
            dataclasses.replace(TINY, accumulate=parts, dead_code_threshold=0), tiny_images(), tmp_path / f"{parts}"
        )
        for parts in (1, 4)
    ]
    for trainer in trainers:
        # Codes that k-means has not drawn, so that no part draws others.
        quantizer = trainer.model.bottleneck
        torch.manual_seed(3)
        quantizer.load_state_dict(fastvq.VectorQuantize(8, 16).state_dict())
        trainer.train_step()
    whole, parts = trainers
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=2e-5), name
    assert torch.allclose(whole._window, parts._window)
    for name, parameter in whole.model.named_parameters():
        other = dict(parts.model.named_parameters())[name]
        assert torch.allclose(parameter.grad, other.grad, atol=1e-5), name


def gradient_norm(clip_norm: float | None, out: Path) -> float:
    """Return the norm of the gradient that the first step of a training applies."""
    trainer = Trainer(dataclasses.replace(TINY, clip_norm=clip_norm), tiny_images(), out)
    trainer.train_step()
    return float(torch.nn.utils.get_total_norm(p.grad for p in trainer.model.parameters() if p.grad is not None))


def test_the_norm_of_the_gradient_is_clipped(tmp_path: Path) -> None:
    assert TINY.clip_norm == 1
    assert gradient_norm(1e-3, tmp_path / "short") == pytest.approx(1e-3, rel=1e-3)
    largest = gradient_norm(0, tmp_path / "any")
    assert largest > 1e-2
    # Runs from before 0 stood for any norm have null.
    assert gradient_norm(None, tmp_path / "old") == largest


def test_averaged_weights_are_evaluated_and_loaded(tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(TINY, weight_average=0.5), tiny_images(), tmp_path)
    expected: dict[str, torch.Tensor] = {}
    original = trainer.learn

    def learn() -> None:
        original()
        for name, own in trainer.model.state_dict().items():
            known = expected.get(name, own)
            expected[name] = (known + own) / 2 if own.dtype.is_floating_point else own.clone()

    trainer.learn = learn
    result = trainer.fit(progress=False)
    assert result is not None
    loaded, _ = load_model(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5), name
    assert not torch.equal(loaded.encoder.layers[0].weight, trainer.model.encoder.layers[0].weight)
    assert evaluate(loaded, tiny_images().test, trainer.objective).psnr_db == result.psnr_db
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["psnr_db"] == result.psnr_db


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
    with pytest.raises(CheckpointError, match="the data differ from those that the run") as said:
        Trainer(dataclasses.replace(TINY, data="others"), tiny_images(seed=5), tmp_path, resume=True)
    for named in (tiny_images().fingerprint(), tiny_images(seed=5).fingerprint(), TINY.data, "others"):
        assert named in str(said.value)


def test_a_run_resumes_wherever_its_data_are(tmp_path: Path) -> None:
    whole = Trainer(TINY, tiny_images(), tmp_path / "whole")
    whole.fit(progress=False)
    stop_after(Trainer(TINY, tiny_images(), tmp_path / "parts"), 4)
    moved = dataclasses.replace(TINY, data="elsewhere")
    resumed = Trainer(moved, tiny_images(), tmp_path / "parts", resume=True)
    resumed.fit(progress=False)
    assert_same_state(whole, resumed)
    assert checkpoint.load_latest(tmp_path / "parts").config == moved


def test_more_steps_follow_the_schedule_of_their_number(tmp_path: Path) -> None:
    Trainer(TINY, tiny_images(), tmp_path).fit(progress=False)
    longer = dataclasses.replace(TINY, steps=20)
    trainer = Trainer(longer, tiny_images(), tmp_path, resume=True)
    assert trainer.fit(progress=False)
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert rates == [TINY.learning_rate_at(step) for step in range(1, 12, 2)] + [
        longer.learning_rate_at(step) for step in range(13, 20, 2)
    ]
    assert (checkpoint.load_latest(tmp_path).step, checkpoint.load_latest(tmp_path).config) == (20, longer)


def test_a_run_is_never_shortened_below_what_it_has_done(tmp_path: Path) -> None:
    stop_after(Trainer(TINY, tiny_images(), tmp_path), 7)
    for steps in (1, 6, 7):
        with pytest.raises(ConfigError, match=f"^steps must be more than the 7 that the run has done, got {steps}$"):
            Trainer(dataclasses.replace(TINY, steps=steps), tiny_images(), tmp_path, resume=True)
    assert Trainer(dataclasses.replace(TINY, steps=8), tiny_images(), tmp_path, resume=True).fit(progress=False)
    assert checkpoint.load_latest(tmp_path).finished


def test_of_two_trainers_of_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    first, second = (Trainer(dataclasses.replace(TINY, seed=n), tiny_images(), tmp_path) for n in (0, 1))
    first.fit(progress=False)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=f"another training has written step-00000012 in {tmp_path} since"):
        second.fit(progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    first.fit(progress=False)


def test_a_folder_that_another_one_writes_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    """By another thread here; tests/test_files.py has other processes."""
    waiting = Trainer(TINY, tiny_images(), tmp_path)
    errors: list[Exception] = []

    def compete() -> None:
        for begin in (waiting.fit, lambda: Trainer(TINY, tiny_images(), tmp_path)):
            try:
                begin()
            except CheckpointError as error:
                errors.append(error)

    trainer = Trainer(TINY, tiny_images(), tmp_path)

    def from_another_thread(*_: object) -> None:
        thread = threading.Thread(target=compete)
        thread.start()
        thread.join()

    trainer.fit(on_evaluation=from_another_thread, progress=False)
    assert len(errors) == 4
    assert all(f"{tmp_path} is being written by another thread of this process" in str(error) for error in errors)
    reference = Trainer(TINY, tiny_images(), tmp_path / "reference")
    reference.fit(progress=False)
    assert_same_state(trainer, reference)


@pytest.mark.parametrize("at", ["step", "evaluation", "call"])
@pytest.mark.parametrize("step", [6, 12])
def test_ctrl_c_is_never_swallowed(tmp_path: Path, at: str, step: int) -> None:
    """At an evaluation in the middle or after the last step, wherever in it: the state is saved, nothing is drawn."""
    trainer, drawn = Trainer(TINY, tiny_images(), tmp_path), []

    def interrupting(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            if trainer.step == step:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return call

    if at == "step":
        trainer.train_step = interrupting(trainer.train_step)
    if at == "evaluation":
        trainer.evaluate = interrupting(trainer.evaluate)

    def draw(trainer: Trainer, _: Evaluation) -> None:
        drawn.append(trainer.step)

    assert trainer.fit(on_evaluation=interrupting(draw) if at == "call" else draw, progress=False) is None
    assert checkpoint.load_latest(tmp_path).step == step
    assert (step in drawn) == (at == "call")
    drawn.clear()
    resumed = Trainer(TINY, tiny_images(), tmp_path, resume=True)
    assert resumed.fit(on_evaluation=draw, progress=False)
    # The evaluation of the step that it continues from is shown (again).
    assert drawn == ([6, 12] if step == 6 else [12])
    reference = Trainer(TINY, tiny_images(), tmp_path / "reference")
    reference.fit(progress=False)
    assert_same_state(resumed, reference)
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(tmp_path / "reference" / "metrics.jsonl")


def test_the_state_is_saved_before_what_an_evaluation_calls(tmp_path: Path) -> None:
    def fail(trainer: Trainer, evaluation: Evaluation) -> None:
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        Trainer(TINY, tiny_images(), tmp_path).fit(on_evaluation=fail, progress=False)
    assert checkpoint.load_latest(tmp_path).step == 6


def test_what_an_evaluation_calls_does_not_change_the_training(tmp_path: Path) -> None:
    first = Trainer(TINY, tiny_images(), tmp_path / "first")
    first.fit(on_evaluation=lambda *_: torch.rand(100), progress=False)
    second = Trainer(TINY, tiny_images(), tmp_path / "second")
    second.fit(progress=False)
    assert_same_state(first, second)


GARBAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no weights": lambda t: t.pop(first_of(t, "model.", "weight")),
    "weights of another shape": lambda t: t.update({first_of(t, "model."): torch.zeros(3)}),
    "integral weights": lambda t: t.update({first_of(t, "model."): t[first_of(t, "model.")].int()}),
    "unknown weights": lambda t: t.update({"model.more": torch.zeros(3)}),
    "no moment": lambda t: t.pop(first_of(t, "optimizer.", "exp_avg")),
    "no step count": lambda t: t.pop(first_of(t, "optimizer.", ".step")),
    "moment of another shape": lambda t: t.update({first_of(t, "optimizer.", "exp_avg"): torch.zeros(())}),
    "no optimizer": lambda t: [t.pop(name) for name in list(t) if name.startswith("optimizer.")],
    "no window": lambda t: t.pop("window.sums"),
    "short window": lambda t: t.update({"window.sums": torch.zeros(2, dtype=torch.float64)}),
    "no random state": lambda t: t.pop("random.cpu"),
    "short random state": lambda t: t.update({"random.cpu": torch.zeros(5, dtype=torch.uint8)}),
    "random state of floats": lambda t: t.update({"random.cpu": torch.zeros(5056)}),
    "garbage as random state": lambda t: t.update({"random.cpu": torch.full_like(t["random.cpu"], 255)}),
    "nothing": lambda t: t.clear(),
}


def first_of(tensors: dict[str, torch.Tensor], *parts: str) -> str:
    return next(name for name in sorted(tensors) if all(part in name for part in parts) and tensors[name].dim() != 1)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_tensors_behind_a_right_digest_are_named(tmp_path: Path, garbage: str) -> None:
    Trainer(TINY, tiny_images(), tmp_path / "run").fit(progress=False)
    good = checkpoint.load_latest(tmp_path / "run")
    tensors = dict(good.tensors)
    GARBAGE[garbage](tensors)
    folder = checkpoint.save(tmp_path / "bad", dataclasses.replace(good, tensors=tensors))
    with pytest.raises(CheckpointError, match=f"{folder} is damaged"):
        Trainer(TINY, tiny_images(), tmp_path / "bad", resume=True)
    if "weights" in garbage or garbage == "nothing":
        with pytest.raises(CheckpointError, match=f"{folder} is damaged"):
            load_model(tmp_path / "bad")


def test_settings_that_make_another_model_are_named(tmp_path: Path) -> None:
    Trainer(TINY, tiny_images(), tmp_path / "run").fit(progress=False)
    good = checkpoint.load_latest(tmp_path / "run")
    for n, change in enumerate(({"dim": 4}, {"width": 2**16}, {"bottleneck": "none"}, {"codebook_size": 2**24})):
        config = dataclasses.replace(good.config, **change)
        folder = checkpoint.save(tmp_path / str(n), dataclasses.replace(good, config=config))
        with pytest.raises(CheckpointError, match=f"{folder} is damaged"):
            load_model(tmp_path / str(n))


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
    with pytest.raises(DataError, match="batch_size must be at most 40, the number of training images, got 41"):
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
    images = Examples("ramps", pixels[:100], pixels[100:], ("ramp",) * 20)
    trainer = Trainer(dataclasses.replace(TINY, steps=150, evaluate_every=150, checkpoint_every=150), images, tmp_path)
    before = evaluate(trainer.model, images.test, trainer.objective).psnr_db
    trainer.fit(progress=False)
    assert evaluate(trainer.model, images.test, trainer.objective).psnr_db > before + 6


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
