"""The length, size, color and rate that clips of video are brought to; importing it imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastvq.errors import ConfigError

from .image_format import ImageFormat


@dataclass(frozen=True)
class VideoFormat:
    """Length, size, color and frame rate of the clips of a model, and the treatment of frames of another aspect.

    Args:
        frames: number of frames of a clip.
        height, width, grayscale, fit: of each frame, see `ImageFormat`.
        frame_rate: frames per second that a video is converted to; by default each frame of a file is taken once.

    Raises:
        ConfigError: `fit` is unknown, or a size or the frame rate is not positive.
    """

    frames: int
    height: int
    width: int = 0
    grayscale: bool = False
    fit: str = "crop"
    frame_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", self.frame.width)
        if self.frames < 1:
            raise ConfigError(f"frames must be at least 1, got {self.frames}")
        if self.frame_rate is not None and not 0 < self.frame_rate < math.inf:
            raise ConfigError(f"frame_rate must be positive and finite, got {self.frame_rate}")

    @property
    def frame(self) -> ImageFormat:
        """Size and color of a frame."""
        return ImageFormat(self.height, self.width, self.grayscale, self.fit)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width."""
        channels, height, width = self.frame.shape
        return (channels, self.frames, height, width)
