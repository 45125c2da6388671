"""The health of a codebook: which codes are used, how evenly, and how far the vectors are from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvq.distributed import recomputing
from fastvq.precision import KeepsPrecision, ZeroOnMaterialize, materialize_unsaved_buffers_

DEAD_SHARE_OF_UNIFORM = 0.1
"""A code is counted as dead below this share of what it would have if all codes were chosen equally often."""


def usage(counts: Tensor) -> Tensor:
    """Share of codes with a nonzero count, in [0, 1]. counts (..., K) of any dtype; returns (...) float32."""
    return (counts > 0).float().mean(-1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes, in [1, K]: how many codes, used equally often, would carry as much.

        perplexity = exp(-sum_k p_k ln p_k),   p = counts / sum of counts

    counts (..., K) of any dtype; returns (...) float32, and 0 where nothing was counted.

    Source: Sonnet's VectorQuantizer; van den Oord et al. 2017.
    """
    total = counts.double().sum(-1, keepdim=True)
    p = counts / total.clamp_min(1)
    return (torch.special.entr(p).sum(-1).exp() * (total.squeeze(-1) > 0)).float()


def dead_share(counts: Tensor) -> Tensor:
    """Share of codes chosen less than a tenth as often as under equal use, in [0, 1]; 0 where nothing was counted.

        dead = |{k : counts_k < 0.1 sum(counts) / K}| / K

    counts (..., K) of any dtype; returns (...) float32.

    Source: the threshold is Mimi's for replacing a code (Defossez et al., Moshi, 2024).
    """
    fair = counts.double().mean(-1, keepdim=True)
    return (counts < DEAD_SHARE_OF_UNIFORM * fair).float().mean(-1)


class HealthReport(NamedTuple):
    """What `Monitored.health` returns: each () for one codebook, with an axis for levels, groups or heads."""

    usage: Tensor
    perplexity: Tensor
    dead_share: Tensor
    quantization_error: Tensor


class Health(ZeroOnMaterialize, KeepsPrecision, nn.Module):
    """Counts on the device, without ever waiting for it, what a quantizer chooses in training. Nothing of it is saved.

    Args:
        size: K.
        heads: a leading axis of so many codebooks, or None for none.

    State: code_counts (K,) or (H, K) int64; error () float32, the mean squared error per element of the vectors that
    were counted with an error, `weight` of them.
    """

    code_counts: Tensor
    error: Tensor
    weight: Tensor

    def __init__(self, size: int, heads: int | None = None) -> None:
        super().__init__()
        shape = (size,) if heads is None else (heads, size)
        self.register_buffer("code_counts", torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.register_buffer("error", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("weight", torch.zeros((), dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def observe_(self, indices: Tensor, error: Tensor | None = None) -> None:
        """Counts indices, (...) or (H, ...) beside heads; -1 counts for nothing. `error` () is the mean of
        (x - quantized)^2 over the elements of the vectors that count. A recomputed forward doesn't count again."""
        if recomputing():
            return
        heads = self.code_counts.view(-1, self.code_counts.shape[-1])
        flat = indices.reshape(len(heads), -1)
        counted = (flat >= 0).long()
        heads.scatter_add_(1, flat.clamp_min(0), counted)
        if error is not None:
            rows = counted.sum()
            self.weight.add_(rows)
            error = torch.where(rows > 0, error.detach().to(self.error), self.error)
            self.error.lerp_(error, rows / self.weight.clamp_min(1))

    def reset_(self) -> None:
        """Counts from here on."""
        self.code_counts.zero_()
        self.error.zero_()
        self.weight.zero_()


@torch.no_grad()
def observe_stages_(levels: Sequence[Health], indices: Tensor, errors: Tensor) -> None:
    """`observe_` of each level with its own of the indices (Q, ...) and errors (Q,), in fewer operations."""
    if recomputing():
        return
    flat = indices.flatten(1)
    counted = (flat >= 0).long()
    for health, places, once in zip(levels, flat.clamp_min(0).unbind(), counted.unbind(), strict=True):
        health.code_counts.scatter_add_(0, places, once)
    rows = counted.sum(1)
    weights, means = [health.weight for health in levels], [health.error for health in levels]
    torch._foreach_add_(weights, list(rows.to(weights[0].dtype).unbind()))
    before = torch.stack(means)
    errors = torch.where(rows > 0, errors.detach().to(before), before)
    after = before.lerp(errors, rows / torch.stack(weights).clamp_min(1))
    torch._foreach_copy_(means, list(after.unbind()))


class Monitored:
    """What every quantizer tells of its codebooks' health, in training since `reset_health`. Nothing waits for the
    device.

    A quantizer with one codebook keeps its `Health` in `_health`; one made of others names them in `_monitored`, and
    its values have an axis for them.
    """

    _health: Health

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        materialize_unsaved_buffers_(self, state_dict)

    @property
    def _monitored(self) -> list[Monitored] | None:
        return None

    @property
    def code_counts(self) -> Tensor:
        """How often each code was chosen, (K,) int64; (levels, K) for several codebooks, filled up with zeros where one
        has fewer codes than another."""
        if self._monitored is None:
            return self._health.code_counts
        counts = [one.code_counts for one in self._monitored]
        largest = max(c.shape[-1] for c in counts)
        return torch.stack([nn.functional.pad(c, (0, largest - c.shape[-1])) for c in counts])

    def usage(self) -> Tensor:
        """Share of the codes that were chosen at all, () float32 or per level."""
        return self.health().usage

    def perplexity(self) -> Tensor:
        """`fastvq.perplexity` of the counts, () float32 or per level."""
        return self.health().perplexity

    def dead_share(self) -> Tensor:
        """Share of the codes that were chosen hardly ever, `fastvq.dead_share`, () float32 or per level."""
        return self.health().dead_share

    def quantization_error(self) -> Tensor:
        """Mean of (x - quantized)^2 over elements, as the codebook meets x, () float32 or per level."""
        return self.health().quantization_error

    def health(self) -> HealthReport:
        """(usage, perplexity, dead_share, quantization_error), each () float32 or per level."""
        if self._monitored is not None:
            reports = [one.health() for one in self._monitored]
            return HealthReport(*(torch.stack(values) for values in zip(*reports, strict=True)))
        counts = self._health.code_counts
        # A copy: the value is that of now, not of when it is read.
        return HealthReport(usage(counts), perplexity(counts), dead_share(counts), self._health.error.clone())

    def reset_health(self) -> None:
        """Starts all of it afresh."""
        for one in self._monitored or ():
            one.reset_health()
        if self._monitored is None:
            self._health.reset_()


COUNTED = 2**18
"""The largest codebook whose codes are counted one by one."""


class _Dimension(Monitored, nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self._health = Health(levels)


class LevelUse(Monitored):
    """`Monitored` for a quantizer whose codes are products of levels: up to 2^18 codes are counted one by one, of a
    larger codebook the levels of each dimension, so that health has an axis for the dimensions."""

    def _count_levels(self, levels: Sequence[int], heads: int | None = None) -> None:
        """To be called in __init__. heads: of so many codebooks, each of these levels, for `Health`."""
        size = math.prod(levels)
        self._dimensions = nn.ModuleList() if size <= COUNTED else nn.ModuleList(_Dimension(count) for count in levels)
        if size <= COUNTED:
            self._health = Health(size, heads)

    @property
    def _monitored(self) -> list[Monitored] | None:
        return list(self._dimensions) or None  # type: ignore[arg-type]

    def _observe(self, indices: Tensor, levels: Tensor, mask: Tensor, error: Tensor | None) -> None:
        """Counts indices (...), or (H, ...), -1 for nothing; or levels (..., d) where mask, bool that broadcasts to
        (...), is True; with their mean squared error () where there is such a thing."""
        if not len(self._dimensions):
            self._health.observe_(indices.long(), error)
        for dimension, column in zip(self._dimensions, levels.unbind(-1), strict=False):
            cast(_Dimension, dimension)._health.observe_(column.long().masked_fill(~mask, -1), error)
