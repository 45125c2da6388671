"""Settings that VQ-VAEs of images and of video share: convolutional networks and the squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastvq.data.image_format import FITS
from fastvq.errors import ConfigError

from .settings import SIDE, setting
from .train_config import TrainConfig

PERCEPTUAL_NETWORKS = ("features", "lpips")


@dataclass(frozen=True)
class PixelConfig(TrainConfig):
    """Settings of a VQ-VAE of images or of video and of its training; see `TrainConfig`."""

    grayscale: bool = setting(True, "one channel instead of three; off for a folder")
    fit: str = setting("crop", f"what becomes of a picture of another aspect: {', '.join(FITS)}")
    flip: bool = setting(True, "mirror each training example with probability 1/2")

    width: int = setting(96, "channels at the coarsest grid")
    residual_width: int = setting(32, "channels inside a residual block")
    encoder_blocks: int = setting(2, "residual blocks in the encoder")
    decoder_blocks: int = setting(4, "residual blocks in the decoder")
    channel_multipliers: str | None = setting(
        None,
        "proportions of channels, finest grid first, such as 1,1,2 (default: each half the next)",
    )
    level_blocks: int = setting(0, "residual blocks at each finer grid of encoder and decoder")
    norm_groups: int = setting(0, "groups of a GroupNorm before nonlinearities, which divide all channels; 0 for none")
    downsamples: int = setting(2, "strided convolutions, each of which halves height and width")

    reconstruction_variance: float = setting(0.08, "divisor of the squared error, about the variance of the data")
    reconstruction_loss: str = setting("l2", "l2, the squared error, or l1, the absolute error")
    perceptual_weight: float = setting(0.0, "weight of the distance between the features of a network; 0 for none")
    perceptual_network: str = setting(
        "features", f"{' or '.join(PERCEPTUAL_NETWORKS)}: the small one in the package, or that of LPIPS"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _multipliers(self.channel_multipliers, self.downsamples)
        if self.perceptual_network not in PERCEPTUAL_NETWORKS:
            raise ConfigError(
                f"perceptual_network must be {' or '.join(PERCEPTUAL_NETWORKS)}, got {self.perceptual_network!r}"
            )
        if self.reconstruction_loss not in ("l1", "l2"):
            raise ConfigError(f"reconstruction_loss must be l1 or l2, got {self.reconstruction_loss!r}")

    def check_sides(self, **sides: int) -> None:
        """Raise a ConfigError that names a side of the pictures which the network does not divide."""
        for name, side in sides.items():
            if side % 2**self.downsamples:
                raise ConfigError(f"{name} {side} is not a multiple of 2**downsamples = {2**self.downsamples}")

    @property
    def mirrored(self) -> bool:
        """True if the model also learns from mirrored examples."""
        return self.flip

    def network(self) -> dict[str, Any]:
        """Return the arguments that encoder and decoder share."""
        return {
            "width": self.width,
            "residual_width": self.residual_width,
            "multipliers": _multipliers(self.channel_multipliers, self.downsamples),
            "level_blocks": self.level_blocks,
            "groups": self.norm_groups,
        }


def _multipliers(text: str | None, downsamples: int) -> tuple[int, ...] | None:
    """Return the numbers in a text, one for each grid; None without a text.

    Raises:
        ConfigError: they are no numbers of at least 1, or too many or few.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != downsamples or not all(part.isdecimal() and 1 <= int(part) <= SIDE for part in parts):
        raise ConfigError(
            f"channel_multipliers must be {downsamples} numbers of at least 1, one for each of the downsamples, got"
            f" {text!r}"
        )
    return tuple(map(int, parts))
