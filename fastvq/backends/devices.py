"""Checks of devices: presence, and support of float64, which defines the exact indices."""

from __future__ import annotations

import functools

import torch

LONGEST_REASON = 160
"""Length of the longest message of torch that is passed on. Some list everything that its dispatcher knows."""


def has_float64(kind: str) -> bool:
    """Return whether devices of this type compute in float64."""
    return kind in ("cpu", "cuda", "meta") or (kind != "mps" and _computes_float64(kind))


@functools.cache
def _computes_float64(kind: str) -> bool:
    try:
        return bool(torch.ones((), dtype=torch.float64, device=kind).add(2.0**-40).gt(1))
    except (RuntimeError, TypeError, AssertionError):
        return False


def without_float64(device: torch.device) -> str:
    """Return why the exact ops cannot be computed on a device, or an empty string."""
    return "" if has_float64(device.type) else f"{device.type} has no float64, which defines the exact code"


def usable_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ValueError: torch cannot use it here, or it lacks float64. The message is one line.
    """
    try:
        device = torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        if len(reason) > LONGEST_REASON:
            reason = f"this torch or this machine has no {name}"
    else:
        reason = "it has no memory to compute in" if device.type == "meta" else without_float64(device)
        if not reason:
            return device
    raise ValueError(f"device: {name!r} cannot be used here: {reason}; cpu works everywhere")
