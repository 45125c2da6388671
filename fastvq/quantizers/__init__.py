"""Quantizer layers, one file each."""

from __future__ import annotations

from .grouped import GroupedResidualVQ
from .residual_vq import ResidualVQ
from .vector_quantize import VectorQuantize

__all__ = ["GroupedResidualVQ", "ResidualVQ", "VectorQuantize"]
