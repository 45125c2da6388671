"""Adversarial and absolute losses: formulas, records, and runs that resume bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvq.data import Examples
from fastvq.errors import ConfigError
from fastvq.modalities import AudioConfig, ImageConfig
from fastvq.models.discriminator import PatchDiscriminator
from fastvq.training import Trainer
from fastvq.training.adversary import Adversary, SpectralAdversary
from fastvq.training.metrics import read_metrics

from .tiny import TINY, stop_after, tiny_images

CONFIG = dataclasses.replace(
    TINY, steps=6, log_every=2, evaluate_every=6, checkpoint_every=3, adversarial_weight=0.8, adversarial_start=2,
    discriminator_width=8,
)  # fmt: skip
CPU = torch.device("cpu")


SOUND = AudioConfig(
    data="some", sample_rate=8000, clip_length=256, crop_length=128, strides="4,8", width=4, dim=4, codebook_size=8,
    batch_size=4, steps=6, log_every=2, evaluate_every=6, checkpoint_every=3, adversarial_weight=0.8,
    adversarial_start=2, discriminator_width=2,
)  # fmt: skip


def tiny_sounds() -> Examples:
    """Return random clips."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-9999, 9999, (12, 1, 256), generator=generator).short()
    return Examples("some", stored[:8], stored[8:], ("a", "b", "c", "d"))


@pytest.mark.parametrize(("modality", "interrupted_at"), [("image", 1), ("image", 5), ("audio", 5)])
def test_an_adversarial_run_resumes_bit_for_bit(tmp_path: Path, modality: str, interrupted_at: int) -> None:
    config: Any = CONFIG if modality == "image" else SOUND
    examples = tiny_images() if modality == "image" else tiny_sounds()
    whole = Trainer(config, examples, tmp_path / "whole")
    assert whole.fit(progress=False)
    stop_after(Trainer(config, examples, tmp_path / "parts"), interrupted_at)
    torch.rand(1000)
    resumed = Trainer(config, examples, tmp_path / "parts", resume=True)
    assert resumed.step == interrupted_at
    assert resumed.fit(progress=False)
    first, second = whole._checkpoint().tensors, resumed._checkpoint().tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    steps = [float(value) for name, value in first.items() if name.startswith("adversary.") and name.endswith(".step")]
    assert steps == [4.0] * len(steps) != []
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == records
    losses = [record.get("discriminator_loss") for record in records if record["split"] == "train"]
    assert losses[0] is None
    assert all(0 < loss < 4 for loss in losses[1:])


def test_without_weight_there_is_no_discriminator(tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(CONFIG, adversarial_weight=0.0), tiny_images(), tmp_path / "run")
    assert not [name for name in trainer._checkpoint().tensors if "adversary" in name]


def test_the_adversarial_loss_is_scaled_by_the_gradients_of_the_last_layer() -> None:
    torch.manual_seed(0)
    adversary = Adversary(CONFIG, CPU)
    last, features = torch.randn(1, 4, requires_grad=True), torch.randn(4, 28 * 28)
    image = (last @ features).view(1, 1, 28, 28)
    error = (image - 0.5).square().mean()
    loss = adversary.loss(image, error, last, image)
    assert all(weight.requires_grad and weight.grad is None for weight in adversary.discriminator.parameters())
    fooled = -adversary.discriminator(image).mean()
    norms = [torch.autograd.grad(one, last, retain_graph=True)[0].norm().item() for one in (error, fooled)]
    ratio = norms[0] / (norms[1] + 1e-4)
    assert loss.item() == pytest.approx(0.8 * ratio * fooled.item(), rel=1e-4)
    gradient = torch.autograd.grad(loss, last)[0].norm().item()
    assert gradient == pytest.approx(0.8 * norms[0], rel=1e-2)


def test_losses_of_audio_are_balanced_by_their_gradients() -> None:
    torch.manual_seed(0)
    adversary = SpectralAdversary(SOUND, CPU)
    x, y = torch.randn(2, 1, 1024), torch.randn(2, 1, 1024, requires_grad=True)
    for scale in (1.0, 10.0):  # of the reconstruction loss, which the others follow
        error = scale * (y - x).square().mean()
        norm = torch.autograd.grad(error, y, retain_graph=True)[0].norm().item()
        adversary.norms.zero_()
        gradient = torch.autograd.grad(adversary.loss(y, error, y, x), y)[0].norm().item()
        assert 0.2 * norm < gradient < 1.8 * norm
        adversary.feature_weight = 0.0
        adversary.norms.zero_()
        alone = torch.autograd.grad(adversary.loss(y, error, y, x), y)[0].norm().item()
        assert alone == pytest.approx(0.8 * norm, rel=1e-2)
        adversary.feature_weight = 1.0
    assert all(weight.requires_grad and weight.grad is None for weight in adversary.discriminator.parameters())


def test_the_balance_is_a_moving_average() -> None:
    adversary = SpectralAdversary(SOUND, CPU)
    x, y = torch.randn(1, 1, 512), torch.randn(1, 1, 512, requires_grad=True)
    norms = []
    for scale in (1.0, 3.0):
        error = scale * (y - x).square().mean()
        norms.append(torch.autograd.grad(error, y, retain_graph=True)[0].norm().item())
        adversary.loss(y, error, y, x)
    expected = (0.99 * norms[0] + norms[1]) / 1.99
    assert float(adversary.norms[0] / adversary.norms[3]) == pytest.approx(expected, rel=1e-5)


def test_the_discriminator_learns_to_tell_sounds_apart() -> None:
    torch.manual_seed(0)
    adversary = SpectralAdversary(SOUND, CPU)
    time = torch.arange(512) / 8
    low, high = (torch.sin(f * time).expand(2, 1, 512) for f in (1.0, 6.0))
    for _ in range(15):
        adversary.accumulate(low, high)
        adversary.learn(1e-2)
    outputs = [adversary.discriminator(sound) for sound in (low, high)]
    assert len(outputs[0]) == 3
    real, fake = (sum(judge[-1].mean().item() for judge in own) for own in outputs)
    assert real > 0 > fake


def test_the_discriminator_learns_to_tell_images_apart() -> None:
    torch.manual_seed(0)
    adversary = Adversary(CONFIG, CPU)
    images = (torch.arange(28) // 3 % 2).float().expand(8, 1, 28, 28)
    for _ in range(40):
        adversary.accumulate(images, images.mT)
        adversary.learn(1e-2)
    assert adversary.discriminator(images).mean() > 0.5
    assert adversary.discriminator(images.mT).mean() < -0.5


def test_parts_of_a_batch_teach_the_discriminator_what_the_whole_does() -> None:
    images = torch.rand(8, 1, 28, 28)
    gradients = []
    for parts in (1, 4):
        torch.manual_seed(0)
        adversary = Adversary(CONFIG, CPU)
        for part in images.chunk(parts):
            adversary.accumulate(part, part.mT, parts)
        gradients.append([weight.grad for weight in adversary.discriminator.parameters()])
    for whole, added in zip(*gradients, strict=True):
        assert torch.allclose(whole, added, atol=1e-6)


@pytest.mark.parametrize(("loss", "scale"), [("l1", math.sqrt(0.08)), ("l2", 0.08)])
def test_the_error_is_absolute_or_squared(tmp_path: Path, loss: str, scale: float) -> None:
    config = dataclasses.replace(TINY, reconstruction_loss=loss, flip=False, commitment_weight=0.0)
    trainer = Trainer(config, tiny_images(), tmp_path / "run")
    x = trainer._batches(0).float() / 255
    trainer.model.train()
    with torch.no_grad():
        trainer.model(x)  # initializes the codebook
        difference = trainer.model(x).reconstruction - x
    trainer.learn()
    expected = (difference.abs() if loss == "l1" else difference.square()).mean().item() / scale
    assert trainer.recent()[0]["loss"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("size", "layers", "grid"), [((28, 28), 2, (7, 7)), ((16, 32), 3, (2, 4)), ((9, 8), 1, (4, 4))]
)
def test_logits_are_those_of_patches(size: tuple[int, int], layers: int, grid: tuple[int, int]) -> None:
    assert PatchDiscriminator(3, width=8, layers=layers)(torch.rand(2, 3, *size)).shape == (2, 1, *grid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reconstruction_loss": "l3"}, "reconstruction_loss must be l1 or l2, got 'l3'"),
        ({"adversarial_weight": -1.0}, "adversarial_weight must be at least 0, got -1.0"),
        (
            {"adversarial_weight": 1.0, "discriminator_width": 12},
            "discriminator_width: must be a multiple of 8, got",
        ),
        (
            {"adversarial_weight": 1.0, "discriminator_layers": 5},
            "discriminator_layers: 5 halve the sides of image",
        ),
    ],
)
def test_settings_of_losses_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Adversary(ImageConfig(**settings), CPU)
