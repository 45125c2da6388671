"""The differentiable functions: quantization and soft assignments with their gradients."""

from __future__ import annotations

from .binary_assign import BinaryAssignment, binary_assign
from .quantize import Quantized, lookup, quantize, unit_norm
from .residual_quantize import ResidualQuantized, residual_quantize
from .soft_assign import SoftAssignment, cross_entropy, mean_assignment_entropy, soft_assign, soft_lookup

__all__ = [
    "BinaryAssignment",
    "Quantized",
    "ResidualQuantized",
    "SoftAssignment",
    "binary_assign",
    "cross_entropy",
    "lookup",
    "mean_assignment_entropy",
    "quantize",
    "residual_quantize",
    "soft_assign",
    "soft_lookup",
    "unit_norm",
]
