"""The rate, channels and length that audio is brought to; importing it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastvq.errors import ConfigError


@dataclass(frozen=True)
class AudioFormat:
    """Sample rate, channels and length of the clips of a model.

    Args:
        sample_rate: samples per second, in Hz.
        channels: 1 for mono, 2 for stereo.
        length: samples of a clip, for each channel.

    Raises:
        ConfigError: a number is out of range.
    """

    sample_rate: int
    channels: int = 1
    length: int = 1

    def __post_init__(self) -> None:
        for name in ("sample_rate", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.channels not in (1, 2):
            raise ConfigError(f"channels must be 1 or 2, got {self.channels}")

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and length."""
        return (self.channels, self.length)
