"""Settings of a VQ-VAE of video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastvq.data.video_format import VideoFormat
from fastvq.errors import ConfigError

from .pixel_config import PixelConfig
from .settings import setting


@dataclass(frozen=True)
class VideoConfig(PixelConfig):
    """Settings of a VQ-VAE of clips of video and of its training; see `TrainConfig`.

    The defaults are for the clips of the package. Videos in a folder are larger and faster.
    """

    modality: ClassVar[str] = "video"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"causal": {}}
    of_folders: ClassVar[dict[str, Any]] = {"frame_size": 64, "frame_rate": 12.0, "skip_unreadable": True}

    data: str = setting("emoji-clips", "a data set with a name, or a folder of files or tar shards")
    frames: int = setting(17, "frames of a clip, 1 plus a multiple of 2**time_downsamples")
    frame_rate: float = setting(6.0, "frames per second of the clips; 12 for a folder")
    frame_size: int = setting(32, "height of the frames in pixels, a multiple of 2**downsamples; 64 for a folder")
    frame_width: int | None = setting(None, "width of the frames in pixels (default: as the height)")
    grayscale: bool = setting(False, "one channel instead of three")
    time_downsamples: int = setting(2, "strided convolutions, the last ones, that halve the frames after the first")

    steps: int = setting(1200, "optimizer steps")
    batch_size: int = setting(8, "examples per step")
    learning_rate: float = setting(1e-3, "peak learning rate of Adam")
    evaluate_every: int = setting(300, "steps between evaluations on the held-out examples")
    checkpoint_every: int = setting(300, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_downsamples > self.downsamples:
            raise ConfigError(
                f"time_downsamples must be at most downsamples = {self.downsamples}, got {self.time_downsamples}"
            )
        if (self.frames - 1) % 2**self.time_downsamples:
            raise ConfigError(
                f"frames must be 1 plus a multiple of 2**time_downsamples = {2**self.time_downsamples}, got"
                f" {self.frames}"
            )
        square = None if self.frame_width is None else self.frame_size
        names = ("frames", "frame_size", "grayscale", "frame_rate")
        self.check_example(names, frame_width=square, fit="crop")
        self.check_sides(frame_size=self.example_format.height, frame_width=self.example_format.width)

    @property
    def example_format(self) -> VideoFormat:
        """Length, size, color and frame rate of the clips."""
        return VideoFormat(
            self.frames, self.frame_size, self.frame_width or 0, self.grayscale, self.fit, self.frame_rate
        )

    @property
    def feature_grid(self) -> tuple[int, int, int]:
        """Shape of the grid of features of a clip."""
        size, stride = self.example_format, 2**self.downsamples
        frames = 1 + (self.frames - 1) // 2**self.time_downsamples
        return frames, size.height // stride, size.width // stride
