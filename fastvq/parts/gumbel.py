"""Gumbel-softmax samples of codes, a part of the rows at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.backends.arithmetic import compute_dtype

LOGITS = {"dot": 0, "distance": 1}
"""Metrics of logits by their numbers in the schema of the op."""
LARGEST_PART = 1 << 20
"""Elements of the (rows, K) softmax that are computed at once."""


class Sampled(NamedTuple):
    """Result of `gumbel_lookup`."""

    quantized: Tensor  # (N, D) float32, or float64
    indices: Tensor  # (N,) int64


def gumbel_lookup(
    x: Tensor,
    keys: Tensor,
    codes: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    metric: str = "dot",
    hard: bool = False,
) -> Sampled:
    """Return samples of the Gumbel-softmax distribution over the codes, and the most probable code of each.

        y_nk = softmax_k((l_nk + g_nk) / temperature),   l_nk = <x_n, w_k> ("dot") or -|x_n - w_k| ("distance")
        index_n = argmax_k (l_nk + g_nk),   quantized_n = sum_k y_nk e_k, or e_{index_n} if `hard`

    with noise g = -ln(-ln u). Hard samples have the straight-through gradient: that of (onehot + y - sg[y]) e.

    Args:
        x: rows (N, D), finite.
        keys: w (K, D). A code whose key is not finite is never chosen.
        codes: e (K, E). x, keys and codes get gradients.
        temperature: (), positive; it is never read outside the op, so that a compiled graph serves all its values.
        seed: int64 () on the CPU, which determines the noise.
        metric: "dot" or "distance".
        hard: whether `quantized` is one code.

    Returns:
        quantized (N, E) and indices (N,), all -1 if no key is finite.

    Memory is O(N (D + E) + K (D + E)) and a tile, forward and backward: each draws the noise again from the seed. A
    softmax that autograd keeps would be 4 N K bytes, and as much again for its noise.

    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, 2017; Maddison et al. 2017.
    """
    return Sampled(*_gumbel_lookup(x, keys, codes, temperature, seed, LOGITS[metric], hard))


@torch.library.custom_op("fastvq::gumbel_lookup", mutates_args=())
def _gumbel_lookup(
    x: Tensor, keys: Tensor, codes: Tensor, temperature: Tensor, seed: Tensor, metric: int, hard: bool
) -> tuple[Tensor, Tensor]:
    parts = _Parts(x, keys, codes, temperature, seed, metric)
    quantized = x.new_empty((len(x), codes.shape[1]), dtype=parts.dtype)
    indices = x.new_empty((len(x),), dtype=torch.int64)
    for at in parts.slices():
        y, _ = parts.softmax(at)
        best = y.argmax(1)
        quantized[at] = parts.codes[best] if hard else y @ parts.codes
        indices[at] = torch.where(parts.some, best, -1)
    return quantized, indices


@_gumbel_lookup.register_fake
def _(
    x: Tensor, keys: Tensor, codes: Tensor, temperature: Tensor, seed: Tensor, metric: int, hard: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x, keys, codes)
    return x.new_empty((x.shape[0], codes.shape[1]), dtype=dtype), x.new_empty((x.shape[0],), dtype=torch.int64)


@torch.library.custom_op("fastvq::gumbel_lookup_backward", mutates_args=())
def _gumbel_lookup_backward(
    grad: Tensor, x: Tensor, keys: Tensor, codes: Tensor, temperature: Tensor, seed: Tensor, metric: int, hard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    parts = _Parts(x, keys, codes, temperature, seed, metric)
    x_grad = torch.empty_like(x, dtype=parts.dtype)
    keys_grad, codes_grad = torch.zeros_like(parts.keys), torch.zeros_like(parts.codes)
    for at in parts.slices():
        own, rows = grad[at].to(parts.dtype), parts.rows(at)
        y, distance = parts.softmax(at)
        if hard:
            codes_grad.index_add_(0, y.argmax(1), own)
        else:
            codes_grad.addmm_(y.mT, own)
        slope = own @ parts.codes.mT
        pull = y * (slope - (y * slope).sum(1, keepdim=True)) / parts.temperature  # [rows, K], of the logits
        if distance is not None:  # the gradient of -|x - w| in x is (w - x) / |x - w|
            pull = torch.where(distance > 0, pull / distance, 0)
            x_grad[at] = pull @ parts.keys - pull.sum(1, keepdim=True) * rows
            keys_grad += pull.mT @ rows - pull.sum(0)[:, None] * parts.keys
        else:
            x_grad[at] = pull @ parts.keys
            keys_grad.addmm_(pull.mT, rows)
    return x_grad.to(x.dtype), keys_grad.to(keys.dtype), codes_grad.to(codes.dtype)


@_gumbel_lookup_backward.register_fake
def _(
    grad: Tensor, x: Tensor, keys: Tensor, codes: Tensor, temperature: Tensor, seed: Tensor, metric: int, hard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(keys), torch.empty_like(codes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, keys, codes, temperature, seed, ctx.metric, ctx.hard = inputs
    # A copy: a schedule may write to it before the backward pass.
    ctx.save_for_backward(x, keys, codes, temperature.clone(), seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _gumbel_lookup_backward(grad, *ctx.saved_tensors, ctx.metric, ctx.hard)
    return *grads, None, None, None, None


_gumbel_lookup.register_autograd(_backward, setup_context=_setup_context)


class _Parts:
    """The rows of one call in parts, with what all of them use."""

    def __init__(self, x: Tensor, keys: Tensor, codes: Tensor, temperature: Tensor, seed: Tensor, metric: int) -> None:
        self.dtype = compute_dtype(x, keys, codes)
        self.x, self.metric, self.temperature = x, metric, temperature.to(x.device, self.dtype)
        finite = keys.isfinite().all(1)
        self.some = finite.any()
        self.keys = torch.where(finite[:, None], keys, 0).to(self.dtype)
        self.codes = torch.where(finite[:, None], codes, 0).to(self.dtype)
        self.bias = torch.zeros_like(finite, dtype=self.dtype).masked_fill_(~finite, -torch.inf)
        self.generator = torch.Generator(x.device).manual_seed(int(seed))

    def slices(self) -> list[slice]:
        """Return the parts, whose noise has to be drawn in this order."""
        step = max(1, LARGEST_PART // len(self.keys))
        return [slice(start, start + step) for start in range(0, len(self.x), step)]

    def rows(self, at: slice) -> Tensor:
        """Return the rows of a part."""
        return self.x[at].to(self.dtype)

    def softmax(self, at: slice) -> tuple[Tensor, Tensor | None]:
        """Return y of a part, and the distances of its rows to the keys if the logits are these."""
        rows = self.rows(at)
        distance = torch.cdist(rows, self.keys) if self.metric == LOGITS["distance"] else None
        logits = rows @ self.keys.mT if distance is None else -distance
        uniform = torch.rand(logits.shape, generator=self.generator, device=rows.device)
        noise = -(-uniform.clamp_(torch.finfo(uniform.dtype).tiny).log()).log()
        return ((logits + noise + self.bias) / self.temperature).softmax(1).nan_to_num(0), distance
