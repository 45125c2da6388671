"""Adversarial loss of reconstructions, with the discriminator that learns beside the VQ-VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq import distributed
from fastvq.errors import ConfigError
from fastvq.modalities import AudioConfig, ImageConfig, TrainConfig
from fastvq.models.discriminator import PatchDiscriminator, SpectrogramDiscriminator

_LARGEST_RATIO = 1e4
_EPS = 1e-4
_BALANCE_DECAY = 0.99
_LEAST_SHARE, _LEAST = 1e-6, 1e-30
"""Least gradient that is balanced, as a share of that of the reconstruction loss, and if there is none."""


class Adversary:
    """Discriminator D of patches, its optimizer, and the loss that it gives reconstructions y of images x.

        loss of D = (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2
        loss of y = -weight ratio mean D(y),   ratio = |grad reconstruction loss| / (|grad mean D(y)| + 1e-4)

    where gradients are those of the decoder's last layer, over the examples of all ranks, and the ratio at most 1e4.
    Both learn from step `adversarial_start` on. A batch may come in parts, of which each has a ratio of its own; the
    discriminator learns from all together. Discriminators are equal on every rank.

    Args:
        config: the settings.
        device: device of the discriminator.

    Raises:
        ConfigError: a discriminator of this size does not fit the images.

    Source: Esser, Rombach, Ommer, Taming Transformers for High-Resolution Image Synthesis (VQGAN), 2020, equations 4 to
    7; the hinge loss: Lim and Ye, Geometric GAN, 2017.
    """

    def __init__(self, config: ImageConfig | AudioConfig, device: torch.device) -> None:
        try:
            self.discriminator = self._discriminator(config).to(device)
        except ValueError as error:
            raise ConfigError(f"discriminator_{error}") from error
        self.weight, self.start = config.adversarial_weight, config.adversarial_start
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), betas=(0.5, 0.9))
        # Created here, so that a checkpoint of any step has them and can be restored in place.
        for parameter in self.discriminator.parameters():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        # Sums since the last record, of this rank: loss of y, loss of D, ratio, parts of batches.
        self.window = torch.zeros(4, dtype=torch.float64, device=device)

    def _discriminator(self, config: Any) -> nn.Module:
        size, layers = config.example_format, config.discriminator_layers
        if min(size.height, size.width) < 2**layers:
            raise ConfigError(f"discriminator_layers: {layers} halve the sides of images too often, got {size}")
        return PatchDiscriminator(size.shape[0], width=config.discriminator_width, layers=layers)

    def loss(self, reconstruction: Tensor, error: Tensor, last_layer: Tensor, images: Tensor) -> Tensor:
        """Return the loss () of reconstructions.

        Args:
            reconstruction: the reconstructions.
            error: their reconstruction loss ().
            last_layer: the decoder's last weight.
            images: the originals.
        """
        self.discriminator.requires_grad_(False)  # the gradients below are its own
        fooled = -self.discriminator(reconstruction).mean()
        self.discriminator.requires_grad_(True)
        gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (error, fooled)]
        if distributed.active():
            distributed.sum_(*gradients)
        norms = [gradient.norm() / distributed.world_size() for gradient in gradients]
        ratio = (norms[0] / (norms[1] + _EPS)).clamp(0, _LARGEST_RATIO)
        zero = torch.zeros_like(ratio)
        self.window += torch.stack([fooled.detach(), zero, ratio, torch.ones_like(ratio)])
        return self.weight * ratio * fooled

    def accumulate(self, images: Tensor, reconstruction: Tensor, parts: int = 1) -> None:
        """Add the gradients of one of the equal parts of a batch of images and their reconstructions."""
        loss = self._own_loss(self.discriminator(images), self.discriminator(reconstruction.detach()))
        (loss / parts).backward()
        self.window[1] += loss.detach()

    def _own_loss(self, real: Any, fake: Any) -> Tensor:
        """Return the discriminator's loss, given what it says of images and of their reconstructions."""
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

    def learn(self, learning_rate: float) -> None:
        """Let the discriminator learn to tell images from their reconstructions, from what was accumulated."""
        if distributed.active():
            gradients = [parameter.grad for parameter in self.discriminator.parameters() if parameter.grad is not None]
            distributed.sum_(*gradients)
            for gradient in gradients:
                gradient /= distributed.world_size()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def recent(self) -> dict[str, float | None]:
        """Return the mean losses and ratio since the last record, and begin anew; nothing before the start."""
        fooled, own, ratio, steps = self.window.tolist()
        self.window.zero_()
        if not steps:
            return {}
        return {
            "adversarial_loss": fooled / steps,
            "discriminator_loss": own / steps,
            "adversarial_ratio": ratio / steps,
        }

    def state(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint must hold, as tensors to be restored in place."""
        tensors = {f"adversary.{name}": value for name, value in self.discriminator.state_dict().items()}
        for name, parameter in self.discriminator.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adversary.optimizer.{name}.{key}"] = value
        return tensors


class SpectralAdversary(Adversary):
    """Adversary of audio: a `SpectrogramDiscriminator`, feature matching, and a balance of the gradients.

        loss of y = weight (n_r / n_a) l_a + feature_weight (n_r / n_f) l_f
        l_a = mean over resolutions of mean max(0, 1 - D(y))
        l_f = mean over resolutions and layers of  mean |D_l(x) - D_l(y)| / mean |D_l(x)|

    n_r, n_a and n_f are moving averages of the norms of the gradients of the reconstruction loss, of l_a and of l_f
    by y, so that the weights say how strong each loss is beside the reconstruction loss, whatever their scales.

    Source: Défossez et al., High Fidelity Neural Audio Compression (EnCodec), 2022, section 3.4.
    """

    def __init__(self, config: AudioConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.feature_weight = config.feature_weight
        # Moving averages of the norms, and what the weights of all steps so far sum to.
        self.norms = torch.zeros(4, dtype=torch.float64, device=device)

    def _discriminator(self, config: Any) -> nn.Module:
        return SpectrogramDiscriminator(config.channels, width=config.discriminator_width)

    def loss(self, reconstruction: Tensor, error: Tensor, last_layer: Tensor, images: Tensor) -> Tensor:
        self.discriminator.requires_grad_(False)
        fake = self.discriminator(reconstruction)
        with torch.no_grad():
            real = self.discriminator(images)
        self.discriminator.requires_grad_(True)
        fooled = _mean([F.relu(1 - outputs[-1]).mean() for outputs in fake])
        matched = _mean(
            [
                (one - other).abs().mean() / other.abs().mean()
                for own, others in zip(fake, real, strict=True)
                for one, other in zip(own[:-1], others[:-1], strict=True)
            ]
        )
        losses = (error, fooled, matched)
        norms = torch.stack(
            [torch.autograd.grad(loss, reconstruction, retain_graph=True)[0].norm().double() for loss in losses]
        )
        if distributed.active():
            distributed.sum_(norms)
        norms = norms / distributed.world_size()
        self.norms.lerp_(torch.cat([norms, torch.ones_like(norms[:1])]), 1 - _BALANCE_DECAY)
        means = self.norms[:3] / self.norms[3]
        ratios = (means[0] / means[1:].clamp_min(_LEAST_SHARE * means[0] + _LEAST)).float()
        zero = torch.zeros_like(fooled)
        self.window += torch.stack([fooled.detach(), zero, ratios[0], torch.ones_like(zero)])
        return self.weight * ratios[0] * fooled + self.feature_weight * ratios[1] * matched

    def _own_loss(self, real: Any, fake: Any) -> Tensor:
        pairs = zip(real, fake, strict=True)
        return _mean([(F.relu(1 - x[-1]).mean() + F.relu(1 + y[-1]).mean()) / 2 for x, y in pairs])

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"adversary.norms": self.norms}


def adversary_of(config: TrainConfig, device: torch.device) -> Adversary | None:
    """Return the adversary that the settings ask for, if any.

    Raises:
        ConfigError: a discriminator of this size does not fit the examples.
    """
    if not getattr(config, "adversarial_weight", 0.0):
        return None
    if isinstance(config, AudioConfig):
        return SpectralAdversary(config, device)
    return Adversary(config, device) if isinstance(config, ImageConfig) else None


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
