"""Codebook state: initialisation, moving averages, revival of dead codes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .functional import unit_norm
from .ops import accumulate, ema_update_, search
from .precision import KeepsPrecision


def sample_rows(x: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(indices of `count` random rows of x among the `valid` ones, how many valid rows there are), on the device.

    The rows are distinct as long as there are enough; then they repeat. Without a valid row they are arbitrary.
    """
    keys = torch.rand(len(x), device=x.device).masked_fill_(~valid, 2.0)
    shuffled = keys.topk(min(count, len(x)), largest=False, sorted=True).indices
    available = valid.sum()
    distinct = torch.minimum(available, available.new_full((), len(shuffled))).clamp_min(1)
    return shuffled[torch.arange(count, device=x.device) % distinct], available


def kmeans(x: Tensor, size: int, *, iterations: int, valid: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random rows, by `search` and `accumulate`: no N x K matrix, no host synchronisation.

    Args:
        x: vectors (N, D) with N >= 1; unit vectors for metric "dot", whose means are normalised (spherical k-means).
        size: K.
        iterations: rounds of assignment and averaging.
        valid: bool (N,), the rows that count; rows that are not finite must be False.
        metric: "l2" or "dot".

    Returns:
        means (K, D) and how many rows each had in the last round (K,), float32. A mean without rows keeps its place.

    Source: Lloyd, Least Squares Quantization in PCM, 1982; Dhillon and Modha, 2001, for the spherical form.
    """
    seeds, _ = sample_rows(x, valid, size)
    means = torch.where(valid[seeds][:, None], x[seeds].float(), 0)
    counts = means.new_zeros(size)
    for _ in range(iterations):
        indices = search(x, means, metric=metric).masked_fill(~valid, -1)
        counts, sums = accumulate(x, indices, size)
        new = sums / counts.clamp_min(1)[:, None]
        if metric == "dot":
            new = unit_norm(new)
        means = torch.where(counts[:, None] > 0, new, means)
    return means, counts


def _refuse_many_processes() -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "the codebook isn't synchronised across processes yet: every rank would drift to one of its own. Use "
            "learnable_codebook=True, whose gradients DDP averages, without revival, or freeze_codebook=True"
        )


class Codebook(KeepsPrecision, nn.Module):
    """K codes of D dimensions with what their learning needs. The state is float32 whatever the module is cast to.

    State: embed (1, K, D), a parameter if learnable; cluster_size (1, K); embed_avg (1, K, D); initted (), false
    until k-means has run. Names and the leading axis are those of vector_quantize_pytorch, whose checkpoints load.

    Args: see `fastvq.VectorQuantize`.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        dead_code_threshold: float = 0.0,
        cosine: bool = False,
        learnable: bool = False,
        ema_update: bool = True,
    ) -> None:
        super().__init__()
        self.size, self.dim = size, dim
        self.decay, self.eps = decay, eps
        self.kmeans_iters = kmeans_iters
        self.dead_code_threshold = dead_code_threshold
        self.cosine = cosine
        self.metric = "dot" if cosine else "l2"
        self.ema_update = ema_update

        embed = torch.zeros(1, size, dim, dtype=torch.float32)
        if not kmeans_init:
            # He's uniform initialisation of a (1, K, D) tensor, whose fan-in is K D.
            embed.uniform_(-math.sqrt(6 / (size * dim)), math.sqrt(6 / (size * dim)))
            embed = unit_norm(embed) if cosine else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(1, size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # The host's copy of `initted`: asking the tensor would wait for the device at every step.
        self._ready = not kmeans_init

    @property
    def codes(self) -> Tensor:
        """(K, D)."""
        return self.embed[0]

    def forward(self, x: Tensor) -> Tensor:
        """Indices (N,) of x (N, D)."""
        return search(x, self.codes.detach(), metric=self.metric)

    @torch.no_grad()
    def initialise_(self, x: Tensor, mask: Tensor | None) -> None:
        """k-means on the rows of x (N, D) that are finite and in the mask (N,), unless it has run already."""
        if self._ready:
            return
        valid = x.isfinite().all(1)
        if mask is not None:
            valid = valid & mask
        _refuse_many_processes()
        if len(x) == 0:
            return
        # Before the first batch alone, so waiting for the device is no matter; a traced graph takes it on trust.
        if not torch.compiler.is_compiling():
            self._ready = bool(self.initted)  # the state may have been written to behind our back
            if self._ready or not bool(valid.any()):
                return
        means, counts = kmeans(x, self.size, iterations=self.kmeans_iters, valid=valid, metric=self.metric)
        # A code without rows starts as if it had one: with none, the first update would send it to the origin.
        self.set_(means, counts.clamp_min(1))

    @torch.no_grad()
    def set_(self, codes: Tensor, cluster_size: Tensor | None = None) -> None:
        """Sets the codes (K, D) and, if given, the cluster sizes (K,), with averages that agree."""
        codes = codes.to(self.embed)
        if self.cosine:
            codes = unit_norm(codes)
        if cluster_size is not None:
            self.cluster_size[0].copy_(cluster_size)
        self.embed[0].copy_(codes)
        self.embed_avg[0].copy_(codes * self.cluster_size[0, :, None])
        self.initted.fill_(True)
        self._ready = True

    @torch.no_grad()
    def learn_(self, x: Tensor, indices: Tensor, *, ema_update: bool | None = None) -> None:
        """Updates the moving averages and revives dead codes from x (N, D) with its indices (N,), -1 for what doesn't
        count. Nothing here waits for the device."""
        if self._learns(ema_update):
            counts, sums = accumulate(x, indices, self.size)
            self.learn_from_(counts, sums, x, indices, ema_update=ema_update)

    def _learns(self, ema_update: bool | None = None) -> bool:
        return (self.ema_update if ema_update is None else ema_update) or self.dead_code_threshold > 0

    @torch.no_grad()
    def learn_from_(
        self, counts: Tensor, sums: Tensor, x: Tensor, indices: Tensor, *, ema_update: bool | None = None
    ) -> None:
        """`learn_`, from what `accumulate` makes of x and its indices."""
        if not self._learns(ema_update):
            return
        _refuse_many_processes()
        if self.ema_update if ema_update is None else ema_update:
            ema_update_(
                self.codes, self.cluster_size[0], self.embed_avg[0], counts, sums, decay=self.decay, eps=self.eps
            )
            if self.cosine:
                self.embed.copy_(unit_norm(self.embed))
        else:
            self.cluster_size[0].lerp_(counts, 1 - self.decay)
        if self.dead_code_threshold > 0:
            self._revive_(x, indices >= 0)

    @torch.no_grad()
    def learn_together_(self, inputs: list[Tensor], indices: list[Tensor]) -> None:
        """As `learn_`, for a codebook that several levels share: the averages take each level's rows (N, D) and indices
        (N,) in turn, and the codes follow once, at the end."""
        if not self._learns():
            return
        _refuse_many_processes()
        for x, chosen in zip(inputs, indices, strict=True):
            counts, sums = accumulate(x, chosen, self.size)
            self.cluster_size[0].lerp_(counts, 1 - self.decay)
            if self.ema_update:
                self.embed_avg[0].lerp_(sums, 1 - self.decay)
        if self.ema_update:  # with a decay of 1 the averages stay and the codes follow from them
            ema_update_(self.codes, self.cluster_size[0], self.embed_avg[0], counts, sums, decay=1.0, eps=self.eps)
            if self.cosine:
                self.embed.copy_(unit_norm(self.embed))
        if self.dead_code_threshold > 0:
            self._revive_(torch.cat(inputs), torch.cat(indices) >= 0)

    def _revive_(self, x: Tensor, valid: Tensor) -> None:
        """Puts every code whose cluster size fell below the threshold on a random row of its own, as far as there are
        rows, and gives it the threshold as its size."""
        if len(x) == 0:
            return
        dead = self.cluster_size[0] < self.dead_code_threshold
        rows, available = sample_rows(x, valid, self.size)
        rank = dead.cumsum(0) - 1
        dead = dead & (rank < available)
        fresh = x[rows[rank.clamp_min(0)]].to(self.embed.dtype)
        self.embed[0].copy_(torch.where(dead[:, None], fresh, self.codes))
        self.cluster_size.masked_fill_(dead[None], self.dead_code_threshold)
        self.embed_avg[0].copy_(torch.where(dead[:, None], fresh * self.dead_code_threshold, self.embed_avg[0]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            for state in (self.embed, self.embed_avg, self.cluster_size):
                state.data = state.data.float()  # assign=True puts in what the checkpoint has
        self._ready = not self.initted.is_meta and bool(self.initted)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, metric={self.metric}"
