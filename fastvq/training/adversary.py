"""Adversarial loss of reconstructions, with the discriminator that learns beside the VQ-VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq import distributed
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.models.discriminator import PatchDiscriminator

_LARGEST_RATIO = 1e4
_EPS = 1e-4


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

    def __init__(self, config: ImageConfig, device: torch.device) -> None:
        size, layers = config.example_format, config.discriminator_layers
        if min(size.height, size.width) < 2**layers:
            raise ConfigError(f"discriminator_layers: {layers} halve the sides of images too often, got {size}")
        try:
            discriminator = PatchDiscriminator(size.shape[0], width=config.discriminator_width, layers=layers)
        except ValueError as error:
            raise ConfigError(f"discriminator_{error}") from error
        self.discriminator = discriminator.to(device)
        self.weight, self.start = config.adversarial_weight, config.adversarial_start
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), betas=(0.5, 0.9))
        # Created here, so that a checkpoint of any step has them and can be restored in place.
        for parameter in self.discriminator.parameters():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        # Sums since the last record, of this rank: loss of y, loss of D, ratio, parts of batches.
        self.window = torch.zeros(4, dtype=torch.float64, device=device)

    def loss(self, reconstruction: Tensor, error: Tensor, last_layer: Tensor) -> Tensor:
        """Return the loss () of reconstructions, given their reconstruction loss and the decoder's last weight."""
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
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        (loss / parts).backward()
        self.window[1] += loss.detach()

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
