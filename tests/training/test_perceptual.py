"""The perceptual loss: the shipped network, its distances, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvq.data.emoji_clips import load_emoji_clips
from fastvq.data.examples import to_float
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig, VideoConfig
from fastvq.models.perceptual import WEIGHTS, load_feature_network, perceptual_distance
from fastvq.training import Trainer
from fastvq.training.feature_network import train_feature_network
from fastvq.training.metrics import read_metrics
from fastvq.training.perceptual import PerceptualLoss

from .tiny import TINY, stop_after, tiny_images

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(TINY, steps=4, log_every=2, evaluate_every=4, checkpoint_every=4, perceptual_weight=0.5)


def test_a_blurred_picture_is_farther_away_than_a_tinted_one_of_the_same_error() -> None:
    """The squared error sees no difference, the distance of features does."""
    network = load_feature_network()
    emoji = to_float(load_emoji_clips().test[:, :, 0])
    blurred = F.avg_pool2d(F.pad(emoji, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    error = (blurred - emoji).square().mean()
    tinted = emoji - error.sqrt()
    assert (tinted - emoji).square().mean() == pytest.approx(error.item(), rel=1e-3)
    far, near = (perceptual_distance(network, x, emoji).item() for x in (blurred, tinted))
    assert far > 2 * near > 0
    assert perceptual_distance(network, emoji, emoji) == 0


def test_features_are_those_of_four_scales_and_frozen() -> None:
    network = load_feature_network()
    shapes = [tuple(features.shape[1:]) for features in network(torch.rand(2, 1, 16, 24))]
    assert shapes == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (64, 2, 3)]
    assert not any(weight.requires_grad for weight in network.parameters())
    assert WEIGHTS.stat().st_size < 300_000


def test_a_run_with_a_perceptual_loss_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = Trainer(CONFIG, tiny_images(), tmp_path / "whole")
    assert whole.fit(progress=False)
    stop_after(Trainer(CONFIG, tiny_images(), tmp_path / "parts"), 3)
    resumed = Trainer(CONFIG, tiny_images(), tmp_path / "parts", resume=True)
    assert resumed.fit(progress=False)
    assert whole._checkpoint().same_state(resumed._checkpoint())
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == records
    assert all(0 < record["perceptual_distance"] < 4 for record in records if record["split"] == "train")


def test_the_loss_of_video_is_that_of_its_frames() -> None:
    settings: dict[str, Any] = {"perceptual_weight": 2.0}
    clips = torch.rand(2, 2, 3, 5, 32, 32)
    video = PerceptualLoss(VideoConfig(**settings), CPU).loss(*clips)
    frames = clips.transpose(2, 3).flatten(1, 2)
    image = PerceptualLoss(ImageConfig(data="folder", image_size=32, grayscale=False, **settings), CPU).loss(*frames)
    assert torch.equal(video, image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perceptual_weight": -1.0}, "perceptual_weight must be at least 0, got -1.0"),
        ({"perceptual_network": "vgg"}, "perceptual_network must be features or lpips, got 'vgg'"),
        (
            {"perceptual_weight": 1.0, "perceptual_network": "lpips"},
            "perceptual_network cannot be lpips: images of 28 x 28 are smaller than 31 x 31",
        ),
        (
            {"perceptual_weight": 1.0, "data": "folder", "image_size": 4},
            "perceptual_weight must be 0 for sides below 8 pixels",
        ),
    ],
)
def test_settings_of_the_loss_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerceptualLoss(ImageConfig(**settings), CPU)


def test_the_network_is_trained_again_by_its_command(tmp_path: Path) -> None:
    shares = train_feature_network(tmp_path / "network.safetensors", steps=2, batch_size=4, judged=8)
    assert shares.keys() == {"content", "distortion"}
    shipped, own = load_feature_network().state_dict(), load_feature_network(tmp_path / "network.safetensors")
    assert {name: value.shape for name, value in own.state_dict().items()} == {
        name: value.shape for name, value in shipped.items()
    }
