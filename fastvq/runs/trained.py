"""`fastvq.load`: the trained models of a run as one object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvq.data.images import to_float
from fastvq.errors import CheckpointError, ConfigError
from fastvq.files import StrPath
from fastvq.models import VQVAE, NoBottleneck, Prior
from fastvq.training.checkpoint import checkpoint_folders, is_checkpoint, load_checkpoint
from fastvq.training.config import TrainConfig
from fastvq.training.loop import usable_device

from .load import PRIOR_FOLDER, checkpoint_model, label_number, load_model, load_prior_of

if TYPE_CHECKING:
    from typing_extensions import Self

_BATCH = 100


class TrainedModel(nn.Module):
    """VQ-VAE of a run, with its prior if it has one: images to indices and back, and new images.

    It is in eval mode, and nothing that it does learns or records gradients. Images are moved to its device; what it
    returns is there.

    Args:
        vqvae: the VQ-VAE.
        config: the settings that it was trained with.
        prior: the prior over its indices, or None.
        no_prior: why there is none.

    Attributes:
        vqvae, config, prior, no_prior: see Args.
        channels: 1 for gray images, 3 for images in color.
        stride: heights and widths of images are multiples of it.
    """

    def __init__(
        self, vqvae: VQVAE, config: TrainConfig, prior: Prior | None = None, *, no_prior: str = "there is no prior"
    ) -> None:
        super().__init__()
        self.vqvae, self.config, self.prior = vqvae, config, prior
        self.channels = 1 if config.grayscale else 3
        self.stride: int = getattr(vqvae.encoder, "stride", 1)
        self.no_prior = no_prior
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights; `to` moves them."""
        return next(self.vqvae.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode: a codebook would change with every image that is encoded."""
        if mode:
            raise ValueError("a trained model stays in eval mode: train .vqvae or .prior instead")
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return `reconstruct(images)`."""
        return self.reconstruct(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the indices of images, int64: (B, h, w), or (B, h, w, Q) with Q stages, heads or groups.

        Those of a hierarchical quantizer are (B, T), all scales in a row.

        Args:
            images: (B, C, H, W), uint8, or floats in [0, 1]. H and W are multiples of `stride`; the model knows best
                what looks like the images that it learned from, in size as well.

        Raises:
            TypeError, ValueError: images of another shape, dtype or range; the message says what they may be.
            ConfigError: the run was trained without a bottleneck.
        """
        self._check_indices()
        return self.vqvae.encode(self._checked(images))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Return the images (B, C, H, W), float32 in [0, 1], of indices as `encode` returns them.

        Raises:
            TypeError, ValueError: indices of another shape, dtype or range.
            ConfigError: the run was trained without a bottleneck.
        """
        self._check_indices()
        _check_tensor("indices", indices)
        own = self.vqvae.adapter.index_shape(self.config.feature_grid)
        fixed = own if len(own) == 1 else own[2:]
        if indices.dim() != 1 + len(own) or indices.shape[indices.dim() - len(fixed) :] != fixed:
            expected = f"(B, {own[0]})" if len(own) == 1 else f"(B, h, w{''.join(f', {n}' for n in fixed)})"
            raise ValueError(f"indices: must be {expected}, got {tuple(indices.shape)}")
        return self.vqvae.decode(indices.to(self.device)).float().clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return images as they are decoded from their indices, float32 in [0, 1]; see `encode`.

        Without a bottleneck, they are decoded from the features.
        """
        images = self._checked(images)
        if isinstance(self.vqvae.bottleneck, NoBottleneck):
            return self.vqvae(images).reconstruction.float().clamp(0, 1)
        return self.vqvae.decode(self.vqvae.encode(images)).float().clamp(0, 1)

    @torch.no_grad()
    def sample(
        self,
        count: int = 1,
        *,
        label: int | str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Return new images (count, C, H, W), float32 in [0, 1], decoded from samples of the prior.

        Args:
            count: number of images.
            label: their class, by number or by name; by default each class in turn, if the prior has classes.
            temperature, top_k, top_p, guidance: see `fastvq.models.Prior.sample`.
            seed: equal seeds give equal samples, on equal devices; by default torch's random state decides.

        Raises:
            CheckpointError: the run has no prior, or none that can be read; the message says which command learns one.
            ValueError: an invalid argument, by name.
        """
        prior = self.prior
        if prior is None:
            raise CheckpointError(self.no_prior)
        if count < 1:
            raise ValueError(f"count: must be at least 1, got {count}")
        label = label_number(prior, label)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        labels: Tensor | None = None
        if prior.classes:
            labels = torch.arange(count) % prior.classes if label is None else torch.full((count,), label)
        images = []
        for first in range(0, count, _BATCH):
            part = None if labels is None else labels[first : first + _BATCH].to(self.device)
            number = min(_BATCH, count - first)
            indices = prior.sample(number, part, generator=generator, **settings)  # type: ignore[arg-type]
            images.append(self.decode(indices))
        return torch.cat(images)

    def extra_repr(self) -> str:
        """Return what the model takes, for `repr`."""
        return f"images (B, {self.channels}, H, W), H and W multiples of {self.stride}"

    def _check_indices(self) -> None:
        if isinstance(self.vqvae.bottleneck, NoBottleneck):
            raise ConfigError("bottleneck: this run was trained without one and has no indices; reconstruct works")

    def _checked(self, images: Tensor) -> Tensor:
        """Return images as floats on the device.

        Raises:
            ValueError: see `encode`.
        """
        _check_tensor("images", images)
        size = self.config.image_format()
        expected = (
            f"images: must be uint8, or floats in [0, 1], of shape (B, {self.channels}, H, W) with H and W multiples of"
            f" {self.stride}, such as the {size.height} x {size.width} that the model learned from"
        )
        given = f"{tuple(images.shape)} {images.dtype}"
        shape = images.shape
        if images.dim() != 4 or shape[1] != self.channels or any(n < 1 or n % self.stride for n in shape[2:]):
            raise ValueError(f"{expected}; got {given}" + self._advice(images))
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            return to_float(images)
        if not images.is_floating_point():
            raise ValueError(f"{expected}; got {given}")
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"{expected}; got values from {low:g} to {high:g}")
        return images.to(next(self.vqvae.parameters()).dtype)

    def _advice(self, images: Tensor) -> str:
        if images.dim() == 3:
            return ": images[None] is a batch of one"
        if images.dim() == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
            return ": images.permute(0, 3, 1, 2) puts the channels first"
        if images.dim() == 4 and (images.shape[1], self.channels) == (1, 3):
            return ": images.expand(-1, 3, -1, -1) has three channels"
        if images.dim() == 4 and (images.shape[1], self.channels) == (3, 1) and images.is_floating_point():
            return ": images.mean(1, keepdim=True) is gray"
        return ""


def load(run: StrPath, *, device: str | torch.device = "cpu") -> TrainedModel:
    """Return the trained models of a run as one object that encodes, decodes, reconstructs and samples.

    A RuntimeWarning says so if a training is unfinished.

    Args:
        run: folder of a run, as `fastvq train --out` writes it, whose latest checkpoint is taken; or the folder of one
            checkpoint, such as `runs/mine/checkpoints/step-00003600` or a copy of it.
        device: torch device of the models.

    Raises:
        CheckpointError: there is no run, or its checkpoint is damaged; the message names the folder.
        ConfigError: the device cannot be used.
    """
    target = usable_device(str(device))
    run = Path(run)
    folder: Path | None
    if is_checkpoint(run):
        if run.parent.parent.name == PRIOR_FOLDER and checkpoint_folders(run.parent.parent.parent):
            _refuse_prior(run.parent.parent)
        checkpoint = load_checkpoint(run)
        vqvae, config = checkpoint_model(checkpoint), checkpoint.config
        parent = run.resolve().parent
        folder = parent.parent if parent.name == "checkpoints" else None
    else:
        folder = run
        if run.name == PRIOR_FOLDER and checkpoint_folders(run.parent):
            _refuse_prior(run)
        vqvae, config = load_model(run)
    prior, no_prior = None, f"{run} is a checkpoint away from its run, which has the prior"
    if folder is not None:
        try:
            prior = load_prior_of(folder, vqvae)
        except CheckpointError as error:
            no_prior = str(error)
    return TrainedModel(vqvae, config, prior, no_prior=no_prior).to(target)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(value).__name__}")


def _refuse_prior(folder: Path) -> None:
    """Raise a CheckpointError that names the run whose prior was given as a run."""
    raise CheckpointError(f"{folder} is the prior of the run {folder.parent}: load that one, with its prior")
