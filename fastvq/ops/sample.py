"""The op `sample`: a random code for each vector."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import select as backends
from fastvq.backends.support import METRICS
from fastvq.precision import as_scalar

from .registry import explain, op, option
from .search import check_search


def _check_sample(x: Tensor, codebook: Tensor, temperature: float, seed: Tensor, metric: str) -> None:
    check_search(x, codebook, metric, None)
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    if seed.dtype != torch.int64 or seed.shape != ():
        raise ValueError(f"seed: must be one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
    if seed.device.type != "cpu" and seed.device != x.device:
        raise ValueError(f"seed: must be on the CPU or on the device of x, {x.device}, got {seed.device}")


def _sample_fake(x: Tensor, codebook: Tensor, *, temperature: float, seed: Tensor, metric: int = 0) -> Tensor:
    _check_sample(x, codebook, temperature, seed, option(METRICS, metric))
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@op(fake=_sample_fake)
def _sample(x: Tensor, codebook: Tensor, *, temperature: float, seed: Tensor, metric: int = 0) -> Tensor:
    name = option(METRICS, metric)
    _check_sample(x, codebook, temperature, seed, name)
    run = backends.select("sample", x, codebook)
    return run(x, codebook, temperature=temperature, seed=seed, metric=name)


def sample(x: Tensor, codebook: Tensor, *, temperature: float | Tensor, seed: Tensor, metric: str = "l2") -> Tensor:
    """Draw a random code for each vector, with the probabilities of its soft assignment.

        P(index_n = k) = softmax_k(l_nk / temperature),   l_nk = -|x_n - e_k| ("l2") or <x_n, e_k> ("dot")
        index_n = argmax_k  l_nk / temperature - ln(-ln u_nk),   u_nk = (w_nk + 1/2) 2^-32

    w_nk is word k mod 4 of Philox4x32-10 with the counter (k div 4, n mod 2^32, n div 2^32, h) and the key `seed`, its
    low 32 bits first; h is the head. l comes from the float64 sum that defines `search`; the rest is computed in
    float64 too, and ties resolve to the lowest index. The result is thus a function of the arguments alone. Tiles,
    threads and backends don't change it, unless two values agree to the last digits, in which the logarithms of two
    platforms may differ. Memory is O(N + K D).

    Args:
        x, codebook: as for `search`, also with heads.
        temperature: positive, a number or a tensor (), which is read and therefore best on the CPU. The smaller, the
            more probable the nearest code.
        seed: int64 (), on the CPU or the device of x: torch.randint(2**63 - 1, ()) takes one from torch's generator.
        metric: "l2" or "dot".

    Returns:
        int64 indices (N,) or (H, N); -1 as for `search`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Numerics: docs/streams.md. Not differentiable: see `fastvq.soft_lookup`.

    Source: Maddison et al., The Concrete Distribution, 2017, section 2 (Gumbel-max); Salmon et al., Parallel Random
    Numbers: As Easy as 1, 2, 3, 2011 (Philox).
    """
    try:
        if torch.compiler.is_compiling() or isinstance(temperature, Tensor):
            return _sample_at(x, codebook, as_scalar(temperature), seed, METRICS[metric])
        return _sample(x, codebook, temperature=temperature, seed=seed, metric=METRICS[metric])
    except (RuntimeError, KeyError, TypeError) as error:
        raise explain(error, _check_sample, x, codebook, temperature, seed, metric) from None


@torch.library.custom_op("fastvq::sample_at", mutates_args=())
def _sample_at(x: Tensor, codebook: Tensor, temperature: Tensor, seed: Tensor, metric: int) -> Tensor:
    """Return `sample` at a temperature () that a compiled graph has as a tensor."""
    return _sample(x, codebook, temperature=float(temperature), seed=seed, metric=metric)


@_sample_at.register_fake
def _(x: Tensor, codebook: Tensor, temperature: Tensor, seed: Tensor, metric: int) -> Tensor:
    return _sample_fake(x, codebook, temperature=1.0, seed=seed, metric=metric)
