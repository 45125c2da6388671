"""Small network of features that ships with the package, and the distance of images between its features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastvq.extras import require
from fastvq.files import StrPath

WEIGHTS = Path(__file__).with_name("feature_network.safetensors")
"""Weights in half precision; `python -m fastvq.training.feature_network` trains them."""
_WIDTHS = (16, 32, 64, 64)
_EPS = 1e-6


class FeatureNetwork(nn.Module):
    """Map images to features at four scales, each half as wide as the one before.

    It is no VGG or AlexNet: 109,000 weights that learned, from 32x32 pixels, to tell the emoji and the clothes in the
    package apart, and how a picture was distorted (`fastvq.training.feature_network`). Two 3-wide convolutions with
    rectifiers make a scale, one the last.

    Shapes: images (B, 3, H, W) in [0, 1], or gray ones (B, 1, H, W) -> (B, c, H / s, W / s) with c = 16, 32, 64, 64 and
    s = 1, 2, 4, 8. H and W are at least 8.
    """

    LEAST = 8
    """Least side of an image."""

    def __init__(self) -> None:
        super().__init__()
        scales: list[nn.Module] = []
        channels = 3
        for scale, width in enumerate(_WIDTHS):
            layers: list[nn.Module] = [] if scale == 0 else [nn.AvgPool2d(2)]
            for inner in (channels, width) if scale < len(_WIDTHS) - 1 else (channels,):
                layers += [nn.Conv2d(inner, width, 3, padding=1), nn.ReLU()]
            scales.append(nn.Sequential(*layers))
            channels = width
        self.scales = nn.ModuleList(scales)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images.expand(-1, 3, -1, -1) * 2 - 1
        features = []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return features


def load_feature_network(path: StrPath = WEIGHTS) -> FeatureNetwork:
    """Return the network of a file of weights, frozen, in float32.

    Raises:
        MissingExtraError: safetensors is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        network = FeatureNetwork()
    weights = require("safetensors.torch").load_file(path)
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return network.requires_grad_(False).eval()


def perceptual_distance(network: FeatureNetwork, restored: Tensor, originals: Tensor) -> Tensor:
    """Return the distance () of images (B, C, H, W) between their features f, g.

        mean over scales of mean over positions of |f / |f| - g / |g||^2

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), 2018, equation
    1, with another network and equal weights of all channels.
    """
    with torch.no_grad():
        goals = network(originals)
    distances = [
        (_unit(features) - _unit(goal)).square().sum(1).mean()
        for features, goal in zip(network(restored), goals, strict=True)
    ]
    return torch.stack(distances).mean()


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + _EPS).sqrt()
