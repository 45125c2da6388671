"""Settings of a VQ-VAE of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastvq.data.image_format import ImageFormat
from fastvq.errors import ConfigError

from .pixel_config import PixelConfig
from .settings import setting


@dataclass(frozen=True)
class ImageConfig(PixelConfig):
    """Settings of a VQ-VAE of images and of its training; see `TrainConfig`.

    Presets are today's network, one in the style of VQGAN (arXiv 2012.09841), that of Sonnet's example of CIFAR-10, and
    a VQ-VAE-2 (arXiv 1906.00446). A folder holds photographs rather than the small gray images that the defaults are
    for.
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
        # Sonnet's example of CIFAR-10, which has no cosine decay and 2 residual blocks on both sides.
        "sonnet": {
            "width": 128,
            "decoder_blocks": 2,
            "flip": False,
            "learning_rate": 3e-4,
            "steps": 10_000,
            "warmup_steps": 0,
            "reconstruction_variance": 0.0633,
        },
        "vqvae2": {"grids": 2, "downsamples": 1, "learning_rate": 1e-3},
    }
    of_folders: ClassVar[dict[str, Any]] = {"image_size": 64, "grayscale": False}

    image_size: int = setting(28, "height of the images in pixels, a multiple of 2**downsamples; 64 for a folder")
    image_width: int | None = setting(None, "width of the images in pixels (default: as the height)")
    crop_from: int | None = setting(
        None, "height that images are scaled to, before random crops of image_size (default: no crops)"
    )
    grids: int = setting(1, "grids of indices, each half of the next; 2 or 3 make a VQ-VAE-2")
    attention: bool = setting(False, "attend over all positions of the coarsest grid")
    adversarial_weight: float = setting(0.0, "weight of the loss of a discriminator, as in VQGAN; 0 for none")
    adversarial_start: int = setting(1000, "step from which the discriminator and its loss take part")
    discriminator_width: int = setting(64, "channels of the discriminator's first layer")
    discriminator_layers: int = setting(2, "strided convolutions of the discriminator")

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.example_format
        square = None if self.image_width is None else self.image_size
        self.check_example(("image_size", "grayscale"), image_width=square, fit="crop", crop_from=None)
        self.check_sides(image_size=own.height, image_width=own.width)
        if self.grids > 1 and self.bottleneck in ("vae", "none"):
            raise ConfigError(
                f"grids must be 1 for the bottleneck {self.bottleneck}, which has no indices, got {self.grids}"
            )
        factor = 2 ** (self.grids - 1)
        if any(length % factor for length in self.feature_grid):
            sides = "x".join(map(str, self.feature_grid))
            raise ConfigError(
                f"grids must be 1 where the grid of features, {sides}, cannot be halved {self.grids - 1} times, got"
                f" {self.grids}"
            )
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

    def network(self) -> dict[str, Any]:
        """Return the arguments that encoder and decoder share."""
        return {**super().network(), "attention": self.attention}
