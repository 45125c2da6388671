"""The quantize step in torch operations."""

from fastvq.reference import quantize_backward as quantize_backward
from fastvq.reference import quantize_forward as quantize_forward
from fastvq.reference import residual_quantize_backward as residual_quantize_backward
from fastvq.reference import residual_quantize_forward as residual_quantize_forward
