"""Settings of a VQ-VAE of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastvq.data import DATA_SETS
from fastvq.data.image_format import FITS, ImageFormat
from fastvq.errors import ConfigError
from fastvq.training.config import SIDE, TrainConfig, setting


@dataclass(frozen=True)
class ImageConfig(TrainConfig):
    """Settings of a VQ-VAE of images and of its training; see `TrainConfig`.

    Presets are today's network, and one in the style of VQGAN (arXiv 2012.09841). A folder holds photographs rather
    than the small gray images that the defaults are for.
    """

    modality: ClassVar[str] = "image"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "vqvae": {},
        "vqgan": {
            "width": 128,
            "residual_width": 64,
            "level_blocks": 2,
            "norm_groups": 16,
            "attention": True,
            "learning_rate": 1e-3,
        },
    }
    of_folders: ClassVar[dict[str, Any]] = {"image_size": 64, "grayscale": False}

    image_size: int = setting(28, "height of the images in pixels, a multiple of 2**downsamples; 64 for a folder")
    image_width: int | None = setting(None, "width of the images in pixels (default: as the height)")
    grayscale: bool = setting(True, "one channel instead of three; off for a folder")
    fit: str = setting("crop", f"what becomes of an image of another aspect: {', '.join(FITS)}")
    crop_from: int | None = setting(
        None, "height that images are scaled to, before random crops of image_size (default: no crops)"
    )
    flip: bool = setting(True, "mirror each training image with probability 1/2")

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
    attention: bool = setting(False, "attend over all positions of the coarsest grid")
    downsamples: int = setting(2, "strided convolutions, each of which halves the image's sides")

    reconstruction_variance: float = setting(0.08, "divisor of the squared error, about the variance of the data")
    reconstruction_loss: str = setting("l2", "l2, the squared error, or l1, the absolute error")
    adversarial_weight: float = setting(0.0, "weight of the loss of a discriminator, as in VQGAN; 0 for none")
    adversarial_start: int = setting(1000, "step from which the discriminator and its loss take part")
    discriminator_width: int = setting(64, "channels of the discriminator's first layer")
    discriminator_layers: int = setting(2, "strided convolutions of the discriminator")

    def __post_init__(self) -> None:
        super().__post_init__()
        _multipliers(self.channel_multipliers, self.downsamples)
        if self.reconstruction_loss not in ("l1", "l2"):
            raise ConfigError(f"reconstruction_loss must be l1 or l2, got {self.reconstruction_loss!r}")
        if self.accumulate > 1 and self.adversarial_weight:
            raise ConfigError(f"accumulate must be 1 with an adversarial_weight, got {self.accumulate}")
        own, known = self.example_format, DATA_SETS.get(self.data)
        if known and (own, self.crop_from) != (
            ImageFormat(known.settings["image_size"], grayscale=known.settings["grayscale"]),
            None,
        ):
            raise ConfigError(
                f"{self.data} is {known.form}: image_size, image_width, grayscale, fit and crop_from cannot be changed"
            )
        for name, value in (("image_size", own.height), ("image_width", own.width)):
            if value % 2**self.downsamples:
                raise ConfigError(f"{name} {value} is not a multiple of 2**downsamples = {2**self.downsamples}")
        if self.crop_from is not None and self.crop_from < self.image_size:
            raise ConfigError(f"crop_from must be at least image_size = {self.image_size}, got {self.crop_from}")

    @property
    def example_format(self) -> ImageFormat:
        """Size and color of the images."""
        return ImageFormat(self.image_size, self.image_width or self.image_size, self.grayscale, self.fit)

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Shape of the grid of features of an image."""
        size, stride = self.example_format, 2**self.downsamples
        return size.height // stride, size.width // stride

    @property
    def mirrored(self) -> bool:
        """Whether the model also learns from mirrored images."""
        return self.flip

    def network(self) -> dict[str, Any]:
        """Return the arguments that encoder and decoder share."""
        return {
            "width": self.width,
            "residual_width": self.residual_width,
            "multipliers": _multipliers(self.channel_multipliers, self.downsamples),
            "level_blocks": self.level_blocks,
            "groups": self.norm_groups,
            "attention": self.attention,
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
