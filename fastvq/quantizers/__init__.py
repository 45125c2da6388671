"""Quantizer layers, one file each."""

from __future__ import annotations

from .vector_quantize import VectorQuantize

__all__ = ["VectorQuantize"]
