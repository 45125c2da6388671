"""The size and color that images are brought to; importing it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastvq.errors import ConfigError

FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class ImageFormat:
    """Size and color of the images of a model, and the treatment of images of another aspect.

    Args:
        height, width: in pixels; the width is the height by default.
        grayscale: one channel instead of three.
        fit: "crop" takes the largest central piece of the aspect; "pad" adds black bars around the whole image;
            "stretch" changes the aspect.

    Raises:
        ConfigError: `fit` is none of these, or a size is not positive.
    """

    height: int
    width: int = 0
    grayscale: bool = False
    fit: str = "crop"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ConfigError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        if not self.width:
            object.__setattr__(self, "width", self.height)
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return (1 if self.grayscale else 3, self.height, self.width)
