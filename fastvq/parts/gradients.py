"""Gradients through the nearest code: straight-through, rotation trick, DiVeQ, synchronous updates."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvq.backends.arithmetic import compute_dtype
from fastvq.functional.quantize import check_some_code, quantize_errors, unit_norm, vector_length
from fastvq.functional.soft_assign import soft_lookup
from fastvq.ops import quantize_backward

from .losses import mean_squared_errors
from .shapes import offset_indices
from .tables import Shared, Table


def straight_through(x: Tensor, q: Tensor, indices: Tensor | None = None) -> Tensor:
    """Return q with the gradient of x: the straight-through estimator.

        value = q,   d value / d x = 1,   d value / d q = 0

    Args:
        x, q: (..., D), of one shape. q gets no gradient.
        indices: int64 (...); where they are -1, x gets no gradient. By default it always does.

    Returns:
        (..., D) in the dtype of x: q itself, bit for bit if the dtypes agree, unlike x + (q - x).

    Source: van den Oord et al. 2017, section 3.2; Bengio et al. 2013.
    """
    _check_same_shape(x, q)
    return _estimate(x, q, indices, "ste")


def rotate_to(x: Tensor, q: Tensor, indices: Tensor | None = None) -> Tensor:
    """Return q; in the backward pass, it is x rotated and scaled to q, with rotation and scale held constant.

        value = q = lambda R x,   d value / d x = lambda R,   lambda = |q| / |x|
        R = 1 - 2 w w^T + 2 q' x'^T,   w = (x' + q') / |x' + q'|,   x' = x / |x|,   q' = q / |q|

    Args, Returns: as for `straight_through`, whose gradient is used where x or q is shorter than 1e-6.

    Source: Fifty et al., Restructuring Vector Quantization with the Rotation Trick, 2024, section 4.2.
    """
    _check_same_shape(x, q)
    return _estimate(x, q, indices, "rotation")


def directional_reparam(x: Tensor, q: Tensor, noise_variance: float = 5e-3) -> Tensor:
    """Return a point at the distance of q from x, in nearly its direction; differentiable in x and q (DiVeQ).

        value = x + |q - x| sg[v / |v|],   v = q - x + sqrt(noise_variance) n,   n ~ N(0, 1)

    The length carries the gradient: it pulls q towards x, so that codes learn from the task's loss alone.

    Args:
        x, q: (..., D), of one shape.
        noise_variance: variance of the direction's noise; 0 gives q in the forward pass, up to rounding.

    Returns:
        (..., D), in the dtype of x, computed in float32 at least.

    Source: Vali et al., DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick, 2025, figure 1.
    """
    _check_same_shape(x, q)
    if not noise_variance >= 0:
        raise ValueError(f"noise_variance: must not be negative, got {noise_variance}")
    dtype = compute_dtype(x, q)
    start = x.to(dtype)
    error = q.to(dtype) - start
    with torch.no_grad():
        direction = unit_norm(error + math.sqrt(noise_variance) * torch.randn_like(error))
    return (start + direction * vector_length(error)).to(x.dtype)


def synchronous(q: Tensor, codes: Tensor, v: float) -> Tensor:
    """Add v times the gradient of the codes to q, an estimate that differentiates x alone.

        value = q,   d value = d q + v d codes

    Args:
        q: (..., D), an estimator's output from x and the codes.
        codes: (..., D), looked up with their gradient.
        v: in [0, 1]; at 1 the codes get the same gradient from the task's loss as x.

    Source: Huh et al., Straightening Out the Straight-Through Estimator, 2023, equation 21.
    """
    _check_same_shape(q, codes)
    return q + v * (codes - codes.detach()).to(q.dtype)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, with its gradient multiplied by `factor`."""
    if factor == 0:
        return x.detach()
    return x if factor == 1 else factor * x + (1 - factor) * x.detach()


def _estimate(x: Tensor, q: Tensor, indices: Tensor | None, gradient: str) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return q.detach().to(x.dtype)  # plain operations can be traced and saved
    return _Estimate.apply(x, q.detach(), indices, gradient)


class _BothGradients(torch.autograd.Function):
    """One of two equal values, with the gradients of both; infinite values are as good as others."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return one.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class _Estimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, indices: Tensor | None, gradient: str) -> Tensor:
        saved = (x, q) if gradient == "rotation" else (None, None)
        ctx.save_for_backward(*saved, indices)
        ctx.gradient = gradient
        return q.to(x.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, q, indices = ctx.saved_tensors
        if ctx.gradient == "rotation":
            chosen = indices if indices is not None else grad.new_zeros(grad.shape[:-1], dtype=torch.int64)
            codes = q.to(compute_dtype(x, q)).flatten(0, -2)
            x_grad = quantize_backward(
                x.flatten(0, -2),
                codes,
                chosen.flatten(),
                grad.flatten(0, -2),
                codes.new_zeros(()),
                gradient="rotation",
                commitment_weight=0.0,
            ).reshape(grad.shape)
        else:
            x_grad = grad if indices is None else grad.masked_fill((indices < 0).unsqueeze(-1), 0)
        return x_grad, None, None, None


def _check_same_shape(x: Tensor, q: Tensor) -> None:
    if x.shape != q.shape:
        raise ValueError(f"q: must have the shape of x, {tuple(x.shape)}, got {tuple(q.shape)}")


class EstimatorOutput(NamedTuple):
    """Result of `Estimator.output`."""

    quantized: Tensor  # (C, R, D), or (C, R, k, D), dtype of x
    error: Tensor  # (), or (C, R, k)
    codebook_error: Tensor | None = None  # as error, whose value it has: the gradient of learned codes, if separate


class Estimator(NamedTuple):
    """Gradient estimator of a codebook lookup.

    Args:
        kind: "ste", "rotation" or "directional": `straight_through`, `rotate_to` or `directional_reparam`.
        noise_variance: of "directional".
        sync_update_v: share of the output's gradient that learned codes get in addition to x.
        route: whether x gets the output's gradient; otherwise learned codes get it.
        soft_temperature: without `route`, x gets the gradient of the soft assignment at this temperature instead
            (`fastvq.soft_lookup`): straight-through Gumbel-softmax, for sampled indices.
        separate: whether the error has the gradient of x alone, and learned codes get that of a second one.
    """

    kind: str = "rotation"
    noise_variance: float = 5e-3
    sync_update_v: float = 0.0
    route: bool = True
    soft_temperature: float | None = None
    separate: bool = False

    def output(self, x: Tensor, table: Table, indices: Tensor, *, learned: bool) -> EstimatorOutput:
        """Return the codes of rows x (C, R, D), and the mean squared error over the rows with a code.

        Args:
            x: differentiated through the estimator and the error.
            table: table of codes.
            indices: (C, R), or (C, R, k) for top-k; the errors of top-k are those of each code, (C, R, k).
            learned: whether the codes get gradients: from the error, and from the output by sync_update_v or if x does
                not take its gradient.
        """
        routed = self.route and x.requires_grad
        if isinstance(table, Shared):
            for head, (codes, chosen) in enumerate(zip(table.codes.unbind(), indices.unbind(), strict=True)):
                check_some_code("codebook" if len(indices) == 1 else f"codebook[{head}]", chosen, codes)
        if isinstance(table, Shared) and indices.dim() == 2 and self.kind != "directional":
            quantized, error, codebook_error = self._fused(x, table, indices, learned)
            if not routed and self.soft_temperature is not None:
                quantized = self._soft(x, table, indices)
            elif not routed:
                quantized = table.lookup(indices).to(x.dtype) if learned else quantized.detach()
        else:
            quantized, error, codebook_error = self._composed(x, table, indices, learned, routed)
        if routed and learned and self.sync_update_v > 0:
            quantized = synchronous(quantized, table.lookup(indices), self.sync_update_v)
        return EstimatorOutput(quantized, error, codebook_error)

    def _soft(self, x: Tensor, table: Shared, indices: Tensor) -> Tensor:
        assert self.soft_temperature is not None
        factor = 1 / self.soft_temperature
        found = []
        for rows, own, chosen in zip(x, table.codes, indices, strict=True):
            found.append(soft_lookup(rows, own, chosen, metric=table.soft_metric, scale=factor))
        return torch.stack(found)

    def _fused(self, x: Tensor, table: Shared, indices: Tensor, learned: bool) -> EstimatorOutput:
        codes = table.codes.flatten(0, 1)
        quantized, _, error, codebook_error = quantize_errors(
            x.flatten(0, 1),
            codes if learned else codes.detach(),
            gradient=self.kind,
            indices=offset_indices(indices, table.size),
        )
        quantized = quantized.view(x.shape)
        if not learned:
            return EstimatorOutput(quantized, error)
        if self.separate:
            return EstimatorOutput(quantized, error, codebook_error)
        # If the codes learn, the error is commitment plus codebook loss, of which the value counts once.
        return EstimatorOutput(quantized, _BothGradients.apply(error, codebook_error))

    def _composed(self, x: Tensor, table: Table, indices: Tensor, learned: bool, routed: bool) -> EstimatorOutput:
        codes = table.lookup(indices)
        codes = codes if learned else codes.detach()
        rows = x if indices.dim() == 2 else x.unsqueeze(2).expand(*indices.shape, x.shape[-1])
        apart = learned and self.separate
        errors = mean_squared_errors(rows, codes.detach() if apart else codes, indices)
        pull = mean_squared_errors(rows.detach(), codes, indices) if apart else None
        if indices.dim() == 2:
            count = (indices >= 0).sum().clamp_min(1)
            errors, pull = errors.sum() / count, None if pull is None else pull.sum() / count
        if not routed:
            return EstimatorOutput(codes.to(x.dtype), errors, pull)
        if self.kind == "directional":
            absent = (indices < 0).unsqueeze(-1)
            # Filled on both sides: a non-finite value would enter the backward pass as 0 * inf.
            quantized = directional_reparam(rows.masked_fill(absent, 0), codes, self.noise_variance)
            return EstimatorOutput(quantized.masked_fill(absent, 0), errors, pull)
        estimate = rotate_to if self.kind == "rotation" else straight_through
        return EstimatorOutput(estimate(rows, codes, indices), errors, pull)
