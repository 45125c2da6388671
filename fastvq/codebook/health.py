"""Health of a codebook: usage, perplexity, dead codes and quantization error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvq import distributed
from fastvq.distributed import recomputing
from fastvq.precision import Unsaved, widest_dtype, zero_statistic

DEAD_SHARE_OF_UNIFORM = 0.1
"""A code counts as dead below this share of its count under uniform use."""


def usage(counts: Tensor) -> Tensor:
    """Return the share (...) float32 of codes with a nonzero count, in [0, 1], for counts (..., K) of any dtype."""
    return (counts > 0).float().mean(-1)


def perplexity(counts: Tensor) -> Tensor:
    """Return the perplexity of the codes, in [1, K]: the number of equally used codes with the same entropy.

        perplexity = exp(-sum_k p_k ln p_k),   p = counts / sum of counts

    counts (..., K) of any dtype; returns (...) float32, 0 if the counts are all zero.

    Source: Sonnet's VectorQuantizer; van den Oord et al. 2017.
    """
    total = counts.to(widest_dtype(counts.device)).sum(-1, keepdim=True)
    p = counts / total.clamp_min(1)
    return (torch.special.entr(p).sum(-1).exp() * (total.squeeze(-1) > 0)).float()


def dead_share(counts: Tensor) -> Tensor:
    """Return the share of codes used less than a tenth as often as under uniform use, in [0, 1].

        dead = |{k : counts_k < 0.1 sum(counts) / K}| / K

    counts (..., K) of any dtype; returns (...) float32, 0 if the counts are all zero.

    Source: the threshold is Mimi's for replacing a code (Defossez et al., Moshi, 2024).
    """
    fair = counts.to(widest_dtype(counts.device)).mean(-1, keepdim=True)
    return (counts < DEAD_SHARE_OF_UNIFORM * fair).float().mean(-1)


class HealthReport(NamedTuple):
    """Result of `Monitored.health`: each () for one codebook, with an axis for stages, groups or heads."""

    usage: Tensor
    perplexity: Tensor
    dead_share: Tensor
    quantization_error: Tensor
    non_finite: Tensor  # the share of codes that hold a NaN or an infinity, in [0, 1]


class Health(Unsaved, nn.Module):
    """Statistics of the indices that a quantizer chooses in training, kept on the device and not saved.

    Args:
        size: K.
        heads: H, the size of a leading axis of codebooks, or None for no such axis.

    State: code_counts (K,) or (H, K) int64; error () float32, the mean squared error per element of `weight` vectors.
    """

    _statistics = ("code_counts", "error", "weight")

    code_counts: Tensor
    error: Tensor
    weight: Tensor

    def __init__(self, size: int, heads: int | None = None) -> None:
        super().__init__()
        shape = (size,) if heads is None else (heads, size)
        self.code_counts = zero_statistic(*shape, dtype=torch.int64)
        self.error, self.weight = zero_statistic(), zero_statistic()

    @torch.no_grad()
    def observe_(self, indices: Tensor, error: Tensor | None = None) -> None:
        """Count indices (...), or (H, ...) with heads; -1 is excluded. A recomputed forward pass is not counted again.

        `error` () is the mean of (x - quantized)^2 over the elements of the vectors with an index.
        """
        if recomputing():
            return
        if self.code_counts.device != indices.device:
            self.follow_(indices.device)
        heads = self.code_counts.view(-1, self.code_counts.shape[-1])
        flat = indices.reshape(len(heads), -1)
        ones = (flat >= 0).long()
        heads.scatter_add_(1, flat.clamp_min(0), ones)
        if error is not None:
            rows = ones.sum()
            self.weight.add_(rows)
            error = torch.where(rows > 0, error.detach().to(self.error), self.error)
            self.error.lerp_(error, rows / self.weight.clamp_min(1))

    def reset_(self) -> None:
        """Set all statistics to zero."""
        self.code_counts.zero_()
        self.error.zero_()
        self.weight.zero_()


@torch.no_grad()
def observe_stages_(stages: Sequence[Health], indices: Tensor, errors: Tensor) -> None:
    """Apply `observe_` to each stage, with indices (Q, ...) and errors (Q,), in fewer operations."""
    if recomputing():
        return
    for health in stages:
        if health.code_counts.device != indices.device:
            health.follow_(indices.device)
    flat = indices.flatten(1)
    ones = (flat >= 0).long()
    for health, places, one in zip(stages, flat.clamp_min(0).unbind(), ones.unbind(), strict=True):
        health.code_counts.scatter_add_(0, places, one)
    rows = ones.sum(1)
    weights, means = [health.weight for health in stages], [health.error for health in stages]
    torch._foreach_add_(weights, list(rows.to(weights[0].dtype).unbind()))
    before = torch.stack(means)
    errors = torch.where(rows > 0, errors.detach().to(before), before)
    after = before.lerp(errors, rows / torch.stack(weights).clamp_min(1))
    torch._foreach_copy_(means, list(after.unbind()))


Totals = dict[Health, tuple[Tensor, Tensor]]
"""Counts and error of each `Health`, of this process or of all."""


class Monitored:
    """Mixin of quantizers that report the health of their codebooks since `reset_health`.

    Indices are counted in training, and in eval within `measuring`. A quantizer with one codebook has a `Health` as
    `_health`; one that consists of other quantizers returns them as `_monitored`, and its values have an axis for them.
    Counting doesn't wait for the device and communicates with no rank; the reports sum over the ranks.
    """

    _health: Health
    _measures = False  # whether forward passes in eval are counted too

    @property
    def _monitored(self) -> list[Monitored] | None:
        return None

    @property
    def code_counts(self) -> Tensor:
        """The counts of the codes in this process, (K,) int64, or (Q, K) for several codebooks.

        Counts of codebooks of different sizes are padded with zeros to the largest K.
        """
        if self._monitored is None:
            return self._health.code_counts
        counts = [one.code_counts for one in self._monitored]
        largest = max(c.shape[-1] for c in counts)
        return torch.stack([nn.functional.pad(c, (0, largest - c.shape[-1])) for c in counts])

    def usage(self) -> Tensor:
        """Return the share of codes in use, as in `health`."""
        return self.health().usage

    def perplexity(self) -> Tensor:
        """Return `fastvq.perplexity` of the counts, as in `health`."""
        return self.health().perplexity

    def dead_share(self) -> Tensor:
        """Return `fastvq.dead_share` of the counts, as in `health`."""
        return self.health().dead_share

    def quantization_error(self) -> Tensor:
        """Return the mean of (x - quantized)^2 over elements, in the space of the codebook, as in `health`."""
        return self.health().quantization_error

    def health(self, together: bool | None = None) -> HealthReport:
        """Return usage, perplexity, dead_share, quantization_error and non_finite: () float32, or (Q,) for several.

        The first four are NaN if nothing has been counted: eval counts nothing outside `measuring`, and nothing is
        saved. `non_finite` is the share of codes that are not finite as of now, and are never chosen; 1 means that the
        codebook is lost.

        Args:
            together: report on the vectors of all ranks, which must all call this, as it is one all-reduce; by default
                if there are several ranks, unless the layer has sync_codebook=False.
        """
        leaves = self.healths()
        totals = {leaf: (leaf.code_counts, leaf.error.clone()) for leaf in leaves}  # a copy: the error changes in place
        if distributed.active() and (self._synchronizes if together is None else together):
            totals = _sum_over_ranks(leaves)
        return self._report(totals)

    def healths(self) -> list[Health]:
        """Return the statistics of every codebook, each once."""
        return list(dict.fromkeys(self._leaves()))

    def reset_health(self) -> None:
        """Set all statistics to zero."""
        for leaf in self._leaves():
            leaf.reset_()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the indices of forward passes in eval too, within the context.

        layer.eval(); layer.reset_health()
        with layer.measuring():
            ...                       # forward passes over held-out vectors
        layer.health()
        """
        parts = [part for part in self._parts() if not part._measures]
        for part in parts:
            part._measures = True
        try:
            yield
        finally:
            for part in parts:
                part._measures = False

    def _parts(self) -> Iterator[Monitored]:
        """Yield this quantizer and, if it consists of others, all of these."""
        yield self
        for one in self._monitored or ():
            yield from one._parts()

    def _leaves(self) -> Iterator[Health]:
        if self._monitored is None:
            yield self._health
        for one in self._monitored or ():
            yield from one._leaves()

    @property
    def _synchronizes(self) -> bool:
        """False if the ranks have codebooks of their own."""
        return all(one._synchronizes for one in self._monitored or ())

    def _report(self, totals: Totals) -> HealthReport:
        if self._monitored is not None:
            reports = [one._report(totals) for one in self._monitored]
            return HealthReport(*(torch.stack(values) for values in zip(*reports, strict=True)))
        counts, error = totals[self._health]
        values = (usage(counts), perplexity(counts), dead_share(counts), error)
        counted = counts.sum(-1) > 0
        known = [torch.where(counted.any() if v.dim() == 0 else counted, v, torch.nan) for v in values]
        known.append(self._non_finite().reshape(counted.shape).to(error.device))
        return HealthReport(*known)

    def _non_finite(self) -> Tensor:
        """Return the share of codes that are not finite, with an element for each codebook counted in `_health`."""
        return torch.zeros(self._health.code_counts.shape[:-1])


def _sum_over_ranks(leaves: Sequence[Health]) -> Totals:
    """Return counts and errors over all ranks. float64 holds counts up to 2^53 exactly."""
    parts = []
    for leaf in leaves:
        weight = leaf.weight.double()
        parts.append(torch.cat([leaf.code_counts.flatten().double(), torch.stack([weight, leaf.error * weight])]))
    packed = torch.cat(parts)
    distributed.sum_(packed)
    totals: Totals = {}
    for leaf, part in zip(leaves, packed.split([len(part) for part in parts]), strict=True):
        weight, error = part[-2], part[-1]
        totals[leaf] = (part[:-2].long().view_as(leaf.code_counts), (error / weight.clamp_min(1)).float())
    return totals


LARGEST = 2**18
"""The largest codebook whose codes are counted individually."""


class _Dimension(Monitored, nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self._health = Health(levels)


class LevelUse(Monitored):
    """`Monitored` for quantizers whose codes are products of levels.

    Up to 2^18 codes are counted individually. Of a larger codebook, the levels of each dimension are counted, and the
    health has an axis for the dimensions.
    """

    def _count_levels(self, levels: Sequence[int], heads: int | None = None) -> None:
        """Create the statistics, in __init__, of H = heads codebooks with these levels each, or of one."""
        size = math.prod(levels)
        self._dimensions = nn.ModuleList() if size <= LARGEST else nn.ModuleList(_Dimension(count) for count in levels)
        if size <= LARGEST:
            self._health = Health(size, heads)

    @property
    def _monitored(self) -> list[Monitored] | None:
        return list(self._dimensions) or None  # type: ignore[arg-type]

    def _observe(self, indices: Tensor, levels: Tensor, mask: Tensor, error: Tensor | None) -> None:
        """Count indices (...), or (H, ...), without -1; or levels (..., d) in the mask, which broadcasts to (...).

        `error` () is their mean squared error, if there is one.
        """
        if not len(self._dimensions):
            self._health.observe_(indices.long(), error)
        for dimension, column in zip(self._dimensions, levels.unbind(-1), strict=False):
            cast(_Dimension, dimension)._health.observe_(column.long().masked_fill(~mask, -1), error)
