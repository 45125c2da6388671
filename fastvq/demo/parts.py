"""Parts of a demo: their announcement, and settings with fewer steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from fastvq.modalities.settings import Settings

SettingsT = TypeVar("SettingsT", bound=Settings)


def announce(parts: Sequence[tuple[str, int]], part: int) -> None:
    """Print number and description of a part that begins.

    Args:
        parts: description of each part, and its approximate time in seconds on 2 idle cores.
        part: number of the part, from 1.
    """
    description, seconds = parts[part - 1]
    print(f"\n[{part}/{len(parts)}] {description}: about {seconds} s on 2 idle cores", flush=True)


def with_steps(config: SettingsT, steps: int | None) -> SettingsT:
    """Return settings with another number of training steps, if one is given."""
    return config if steps is None else dataclasses.replace(config, steps=steps)
