"""Quantizers of other projects: what replaces their methods by exact kernels, in models as they are.

One file has the adapters of a family of projects; `registry` lists them all.
"""

from __future__ import annotations

from .replace import AccelerationReport, Replaced, Skipped, accelerate, restore
from .weights import from_dac, from_encodec, from_mimi, from_snac, from_vqgan

__all__ = [
    "AccelerationReport",
    "Replaced",
    "Skipped",
    "accelerate",
    "from_dac",
    "from_encodec",
    "from_mimi",
    "from_snac",
    "from_vqgan",
    "restore",
]
