"""Perceptual loss of reconstructions: their distance from the originals between the features of a trained network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvq.errors import ConfigError, MeasureError, MissingExtraError
from fastvq.modalities.image_measures import lpips_network
from fastvq.modalities.pixel_config import PixelConfig
from fastvq.models.perceptual import FeatureNetwork, load_feature_network, perceptual_distance


class PerceptualLoss:
    """Distance of reconstructions from images, or from the frames of video, times `perceptual_weight`.

    "features" is `perceptual_distance` between the features of the small network in the package, "lpips" is LPIPS with
    AlexNet.

    Args:
        config: the settings.
        device: device of the network.

    Raises:
        ConfigError: the images are too small for the network, or the weights of LPIPS are not here.
    """

    def __init__(self, config: PixelConfig, device: torch.device) -> None:
        size = config.example_format.shape[-2:]
        if min(size) < FeatureNetwork.LEAST:
            raise ConfigError(f"perceptual_weight must be 0 for sides below {FeatureNetwork.LEAST} pixels, got {size}")
        self.weight = config.perceptual_weight
        self.network: nn.Module
        if config.perceptual_network == "lpips":
            try:
                self.network = lpips_network((size[0], size[1]), device).requires_grad_(False)
            except (MeasureError, MissingExtraError) as error:
                raise ConfigError(f"perceptual_network cannot be lpips: {error}") from error
        else:
            self.network = load_feature_network().to(device)
        # Sums since the last record: distance, steps.
        self.window = torch.zeros(2, dtype=torch.float64, device=device)

    def loss(self, restored: Tensor, originals: Tensor) -> Tensor:
        """Return the weighted loss () of reconstructions (B, C, H, W) or (B, C, T, H, W)."""
        if restored.dim() == 5:
            restored, originals = (x.transpose(1, 2).flatten(0, 1) for x in (restored, originals))
        if isinstance(self.network, FeatureNetwork):
            distance = perceptual_distance(self.network, restored, originals)
        else:
            pairs = (x.expand(-1, 3, -1, -1) for x in (restored, originals))
            distance = self.network(*pairs, normalize=True).mean()
        self.window += torch.stack([distance.detach(), torch.ones_like(distance)])
        return self.weight * distance

    def recent(self) -> dict[str, float | None]:
        """Return the mean distance since the last record, and begin anew."""
        total, steps = self.window.tolist()
        self.window.zero_()
        return {"perceptual_distance": total / steps} if steps else {}
