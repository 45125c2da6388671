"""Differentiable functions of the soft assignment of vectors to codes, without the N x K softmax.

Throughout p_nk = softmax over k of scale s_nk, with s by metric:

    "distance"   -|x_n - e_k|          "l2"   -|x_n - e_k|^2          "dot"   <x_n, e_k>

Masked and non-finite rows are excluded: their results are 0 and so are their gradients. Non-finite codes have p = 0.
Arithmetic is in float64 if an argument is float64, else in float32. docs/streams.md has the formulae and says what is
exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvq.backends.arithmetic import check_index_range, compute_dtype, row_mask
from fastvq.ops import soft_assign_backward, soft_assign_forward
from fastvq.precision import may_change

LARGEST_MEAN = 1 << 20
"""Elements of the (positions, K) means that `mean_assignment_entropy` holds at once."""


class SoftAssignment(NamedTuple):
    """Result of `soft_assign`."""

    logsumexp: Tensor  # (R,) or (G, R)
    entropy: Tensor  # (R,) or (G, R)
    mean: Tensor  # (K,) or (G, K)


def soft_assign(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "distance",
    scale: float | Tensor = 1.0,
    floor: float = 0.0,
    mask: Tensor | None = None,
) -> SoftAssignment:
    """Return statistics of each vector's distribution over the codes, and the mean distribution.

        logsumexp_n = ln sum_k exp(scale s_nk),   entropy_n = -sum_k p_nk ln max(p_nk, floor),   mean_k = mean_n p_nk

    Args:
        x: (R, D), or (G, R, D) for means within each group; any floating dtype.
        codebook: (K, D). It and x get gradients from all three results.
        metric: "distance", "l2" or "dot": s, as above. scale: its factor, positive, a number or a tensor ();
            1 / temperature.
        floor: smallest probability whose logarithm is taken, in [0, 1); 0 gives the exact entropy. A
            compiled graph is made for one: it must not change at each step.
        mask: bool (R,) or (G, R), True for the rows that take part.

    Returns:
        logsumexp and entropy in nats (R,) or (G, R), mean (K,) or (G, K); float64 if an argument is float64, else
        float32.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Memory is O(R D + K D + G K) and a tile, forward and backward.
    """
    x, codebook, scale = _scaled(x, _held(codebook), metric, scale)
    if x.dim() == 2:
        own_mask = None if mask is None else mask[None]
        results = _SoftAssign.apply(x[None], codebook, own_mask, metric, scale, floor)
        return SoftAssignment(*(result[0] for result in results))
    return SoftAssignment(*_SoftAssign.apply(x, codebook, mask, metric, scale, floor))


def cross_entropy(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    metric: str = "distance",
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy of the soft assignment to given indices: F.cross_entropy(scale s, indices).

        loss = mean over the rows that take part of  logsumexp_n - scale s_{n,index_n}

    Args:
        x: (..., D). codebook: (K, D). Both get gradients.
        indices: int64 (...), in [-1, K); a row with -1 is excluded.
        metric, scale: as for `soft_assign`. mask: bool (...).

    Returns:
        () in nats, 0 if all rows are excluded.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. IndexError: an index is out of range, on
        the CPU.

    Source: Shen et al., NaturalSpeech 2, 2023, section 3.1, for a cross-entropy over the distances to the codes.
    """
    rows = x.reshape(-1, x.shape[-1])
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices: must have shape {tuple(x.shape[:-1])} beside x, got {tuple(indices.shape)}")
    targets = indices.reshape(-1)
    target_mask = row_mask(rows, None if mask is None else mask.reshape(-1)) & (targets >= 0)
    rows, codebook, scale = _scaled(rows, _held(codebook), metric, scale)
    each = _CrossEntropy.apply(rows[None], codebook, target_mask[None], targets[None], metric, scale)
    return each.sum() / target_mask.sum().clamp_min(1)


def mean_assignment_entropy(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "distance",
    scale: float | Tensor = 1.0,
    floor: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the entropy of the mean assignment at each position, averaged over the positions.

        m_ik = mean over the batch of p_bik,   result = mean over positions i of -sum_k m_ik ln max(m_ik, floor)

    The more evenly the codes are used, the larger it is.

    Args:
        x: (B, n, D). codebook: (K, D). Both get gradients.
        metric, scale, floor: as for `soft_assign`.
        mask: bool (B, n). Positions whose rows are all excluded are left out.

    Returns:
        () in nats.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Positions are taken in turn, so that memory is O(B n D + K D) and a tile of the means.
    """
    if x.dim() != 3:
        raise ValueError(f"x: must have shape (B, n, D), got {tuple(x.shape)}")
    by_position = None if mask is None else mask.transpose(0, 1)
    x, codebook, scale = _scaled(x, _held(codebook), metric, scale)
    return _MeanAssignmentEntropy.apply(x.transpose(0, 1), codebook, by_position, metric, scale, floor)


def soft_lookup(
    x: Tensor, codebook: Tensor, indices: Tensor, *, metric: str = "dot", scale: float | Tensor = 1.0
) -> Tensor:
    """Look up codes by index, with the gradient of the soft assignment to all codes.

        quantized_n = e_{index_n},   gradient as if it were  sum_k (onehot_nk + p_nk - sg[p_nk]) e_k

    This is the straight-through estimator of index backpropagation and, for sampled indices, of Gumbel sampling.

    Args:
        x: (..., D). codebook: (K, D). Both get gradients: x through p, the codebook through p and the lookup.
        indices: int64 (...), in [-1, K); -1 gives zeros and no gradient.
        metric, scale: as for `soft_assign`.

    Returns:
        (..., D) in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. IndexError: an index is out of range, on
        the CPU.

    Source: Shi et al., Scalable Image Tokenization with Index Backpropagation Quantization, 2024, equations 3 and 4.
    """
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices: must have shape {tuple(x.shape[:-1])} beside x, got {tuple(indices.shape)}")
    if type(indices) is Tensor and not torch.compiler.is_compiling():
        check_index_range(indices, codebook.shape[0])
    chosen = indices.reshape(-1)
    rows, codes, factor = _scaled(x.reshape(-1, x.shape[-1]), _held(codebook), metric, scale)
    found = _SoftLookup.apply(rows, codes, chosen, metric, factor).reshape(x.shape)
    if factor is scale:
        return found
    return (found if metric == "dot" else found / _of_vectors(metric, scale)).to(x.dtype)


def _held(codebook: Tensor) -> Tensor:
    """Return the codebook for the backward: a copy if it may learn by moving averages before that."""
    return codebook if codebook.requires_grad or not torch.is_grad_enabled() else codebook.detach().clone()


def _scaled(x: Tensor, codebook: Tensor, metric: str, scale: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return x, codebook and scale for the ops, whose scale is 1 if it is a tensor or may change in a compiled graph.

    It multiplies the vectors then: the ops would read a tensor, and be compiled anew for each number.
    """
    if not may_change(scale):
        return x, codebook, scale
    dtype = compute_dtype(x, codebook)
    factor = _of_vectors(metric, scale)
    return x.to(dtype) * factor, codebook if metric == "dot" else codebook.to(dtype) * factor, 1.0


def _of_vectors(metric: str, scale: float | Tensor) -> float | Tensor:
    """Return the factor of the vectors by which s is multiplied by `scale`."""
    return scale**0.5 if metric == "l2" else scale


class _SoftAssign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, scale: float, floor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.options = {"metric": metric, "scale": float(scale), "floor": float(floor)}
        maximum, log_sum, _, entropy, mean = soft_assign_forward(x, codebook, mask, **ctx.options, statistics=True)
        ctx.save_for_backward(x, codebook, mask, maximum, log_sum)
        ctx.set_materialize_grads(False)
        return maximum + log_sum, entropy, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, *ctx.saved_tensors, None, *grads, None), None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, mask: Tensor, indices: Tensor, metric: str, scale: float
    ) -> Tensor:
        ctx.options = {"metric": metric, "scale": float(scale), "floor": 0.0}
        maximum, log_sum, gap, *_ = soft_assign_forward(x, codebook, mask, indices, **ctx.options, statistics=False)
        ctx.save_for_backward(x, codebook, mask, maximum, log_sum, indices)
        return log_sum + gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, *ctx.saved_tensors, grad, None, None, None), None, None, None, None


def _gradients(
    ctx: Any, x: Tensor, codebook: Tensor, mask: Tensor | None, *tensors: Any
) -> tuple[Tensor | None, Tensor | None]:
    need_x, need_codebook = ctx.needs_input_grad[:2]
    x_grad, codebook_grad = soft_assign_backward(
        x, codebook, mask, *tensors, **ctx.options, need_x=need_x, need_codebook=need_codebook
    )
    return x_grad.to(x.dtype) if need_x else None, codebook_grad.to(codebook.dtype) if need_codebook else None


class _MeanAssignmentEntropy(torch.autograd.Function):
    """The function of x transposed to (n, B, D).

    The backward recomputes the means, which together may be as large as N x K.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, scale: float, floor: float
    ) -> Tensor:
        ctx.options = {"metric": metric, "scale": float(scale), "floor": float(floor)}
        ctx.save_for_backward(x, codebook, mask)
        total = x.new_zeros((), dtype=compute_dtype(x, codebook))
        for part, part_mask in _positions(x, codebook, mask):
            *_, mean = soft_assign_forward(part, codebook, part_mask, **ctx.options, statistics=True)
            total = total - (mean * mean.clamp_min(floor).log()).nan_to_num(0).sum()
        return total / _count_positions(x, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codebook, mask = ctx.saved_tensors
        share, floor = grad / _count_positions(x, mask), ctx.options["floor"]
        x_grads: list[Tensor] = []
        codebook_grad: Tensor | None = None
        for part, part_mask in _positions(x, codebook, mask):
            maximum, log_sum, *_, mean = soft_assign_forward(part, codebook, part_mask, **ctx.options, statistics=True)
            slope = mean.clamp_min(max(floor, torch.finfo(mean.dtype).tiny)).log() + (mean >= floor)
            sums, grads = (maximum, log_sum, None), (None, None, -share * slope, None)
            x_grad, own = _gradients(ctx, part, codebook, part_mask, *sums, *grads)
            if x_grad is not None:
                x_grads.append(x_grad)
            codebook_grad = own if codebook_grad is None or own is None else codebook_grad + own
        return torch.cat(x_grads) if x_grads else None, codebook_grad, None, None, None, None


def _positions(x: Tensor, codebook: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    step = max(1, LARGEST_MEAN // codebook.shape[0])
    parts = x.split(step) if len(x) else ()
    return list(zip(parts, [None] * len(parts) if mask is None else mask.split(step), strict=True))


def _count_positions(x: Tensor, mask: Tensor | None) -> Tensor:
    return row_mask(x, mask).any(1).sum().clamp_min(1)


class _SoftLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, indices: Tensor, metric: str, scale: float) -> Tensor:
        ctx.options = {"metric": metric, "scale": float(scale), "floor": 0.0}
        ctx.save_for_backward(x, codebook, indices)
        codes = F.embedding(indices.clamp_min(0), codebook)
        return codes.masked_fill((indices < 0)[:, None], 0).to(x.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codebook, indices = ctx.saved_tensors
        index_mask = indices >= 0
        wide = grad.to(compute_dtype(x, codebook)).masked_fill(~index_mask[:, None], 0)
        own, mask, code_grad = x[None], index_mask[None], wide[None]
        maximum, log_sum, *_ = soft_assign_forward(own, codebook, mask, **ctx.options, statistics=False)
        sums, grads = (maximum, log_sum, None), (None, None, None, code_grad)
        x_grad, codebook_grad = _gradients(ctx, own, codebook, mask, *sums, *grads)
        if codebook_grad is not None:
            codebook_grad = codebook_grad.index_add(0, indices.clamp_min(0), wide.to(codebook.dtype))
        return None if x_grad is None else x_grad[0], codebook_grad, None, None, None
