"""The state of a codebook, and what changes it."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import distributed
from fastvq.functional.quantize import unit_norm
from fastvq.ops import ema_update_, search
from fastvq.precision import KeepsPrecision, materialize_unsaved_buffers_

from .affine import Affine
from .candidates import Candidates
from .kmeans import kmeans
from .replacement import Revival, Reviver
from .update import Weight, learn_together


class Codebook(KeepsPrecision, nn.Module):
    """K codes of D dimensions for each of H heads, with what their learning needs. The state is float32 whatever the
    module is cast to.

    State: embed (H, K, D), a parameter if learnable; cluster_size (H, K); embed_avg (H, K, D); initted (), false until
    k-means has run. Names and the leading axis are those of vector_quantize_pytorch, whose checkpoints load.

    Args:
        dim, size, heads: D, K, H.
        sync: learn with all ranks of a process group, should there be one when it learns; None or True for yes.
        sync_kmeans: likewise for k-means.
        manual_ema_update: the codes follow their averages by `update_ema` alone.
        revival: what to do with dead codes, or None.
        affine: the decays and sync of an `Affine` reparametrisation, or None.
        bridge: a module that maps embed to the codes that are used, (H, K, D) -> (H, K, D), before the affine map; or
            None.
        The others: see `fastvq.VectorQuantize`.

    Raises:
        ValueError: decay, eps or kmeans_iters that can't be.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor
    held_counts: Tensor | None
    held_sums: Tensor | None

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        heads: int = 1,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        cosine: bool = False,
        learnable: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        revival: Revival | None = None,
        sync: bool | None = None,
        sync_kmeans: bool = True,
        affine: dict[str, Any] | None = None,
        bridge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: must lie in [0, 1], got {decay}")
        if not eps >= 0:
            raise ValueError(f"eps: must not be negative, got {eps}")
        rounds: Any = kmeans_iters
        if not (isinstance(rounds, Integral) and int(rounds) >= 0):
            raise ValueError(f"kmeans_iters: must be an integer that isn't negative, got {kmeans_iters!r}")
        self.dim, self.size, self.heads = dim, size, heads
        self.decay, self.eps = decay, eps
        self.kmeans_iters = kmeans_iters
        self.cosine = cosine
        self.metric = "dot" if cosine else "l2"
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.sync, self.sync_kmeans = sync, sync_kmeans

        embed = torch.zeros(heads, size, dim, dtype=torch.float32)
        if not kmeans_init:
            # He's uniform initialisation of a (H, K, D) tensor, whose fan-in is K D.
            embed.uniform_(-math.sqrt(6 / (size * dim)), math.sqrt(6 / (size * dim)))
            embed = unit_norm(embed) if cosine else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(heads, size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_buffer("held_counts", None, persistent=False)
        self.register_buffer("held_sums", None, persistent=False)
        reviving = revival is not None and revival.threshold > 0
        self.reviver = Reviver(revival, size, dim, heads) if reviving and revival is not None else None
        self.vq_bridge = bridge
        self.affine = None if affine is None else Affine(self, heads, dim, **affine)
        self.replayed: Tensor | None = None  # what a recomputed forward takes for `codes`
        # The host's copy of `initted`: asking the tensor would wait for the device at every step.
        self._ready = not kmeans_init

    @property
    def codes(self) -> Tensor:
        """The codes that vectors are compared with, (H, K, D): embed, or its image under bridge and affine map."""
        codes = self.embed if self.vq_bridge is None else self.vq_bridge(self.embed)
        codes = codes if self.affine is None else self.affine.of_codes(self, codes)
        # Checkpointing may break a recomputation off once it has what it needs, before the layer ends its pass.
        if self.replayed is None or not distributed.recomputing():
            return codes
        return self.replayed + (codes - codes.detach()) if codes.requires_grad else self.replayed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices (H, N) of x (H, N, D); -1 where the mask (H, N) is False."""
        return search(x, self.codes.detach(), metric=self.metric, mask=mask)

    def initialise_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """k-means on the rows of x (H, N, D) that are finite and in the mask (H, N), unless it has run already; then
        follows their mean and variance, where the codes do."""
        if (self._ready and self.affine is None) or distributed.recomputing():
            return
        with torch.no_grad():
            rows_mask = x.isfinite().all(-1)
            if mask is not None:
                rows_mask = rows_mask & mask
            if not self._ready:
                self._run_kmeans_(x, rows_mask)
            if self.affine is not None:
                self.affine.observe_(self, self.embed.detach(), x, rows_mask)

    def _run_kmeans_(self, x: Tensor, mask: Tensor) -> None:
        together = self.together() and self.sync_kmeans
        if x.shape[1] == 0 and not together:
            return
        # Before the first batch alone, so waiting for the device is no matter; a traced graph takes it on trust.
        if not torch.compiler.is_compiling():
            self._ready = bool(self.initted)  # the state may have been written to behind our back
            available = mask.sum().float()
            if together:
                distributed.sum_(available)
            if self._ready or not bool(available):
                return
        found = [
            kmeans(head, self.size, iterations=self.kmeans_iters, mask=head_mask, metric=self.metric, together=together)
            for head, head_mask in zip(x, mask, strict=True)
        ]
        # A code without rows starts as if it had one: with none, the first update would send it to the origin.
        self.set_(torch.stack([means for means, _ in found]), torch.stack([counts for _, counts in found]).clamp_min(1))

    @torch.no_grad()
    def set_(self, codes: Tensor, cluster_size: Tensor | None = None) -> None:
        """Sets the codes (H, K, D) and, if given, the cluster sizes (H, K), with averages that agree."""
        codes = codes.to(self.embed)
        if self.cosine:
            codes = unit_norm(codes)
        if cluster_size is not None:
            self.cluster_size.copy_(cluster_size)
        self.embed.copy_(codes)
        self.embed_avg.copy_(codes * self.cluster_size[..., None])
        self.initted.fill_(True)
        self._ready = True

    def averages(self, ema_update: bool | None = None) -> bool:
        """Whether a step of learning uses the moving averages."""
        return self.ema_update if ema_update is None else ema_update

    def learns(self, ema_update: bool | None = None) -> bool:
        """Whether a step of learning would change anything."""
        return self.averages(ema_update) or self.reviver is not None

    def together(self) -> bool:
        """Whether this codebook learns with other ranks, as of now."""
        return self.sync is not False and distributed.active()

    def learn_(
        self,
        x: Tensor,
        indices: Tensor,
        *,
        weight: Weight | None = None,
        ema_update: bool | None = None,
        accumulate_only: bool = False,
    ) -> None:
        """`learn_together` of this codebook alone, from x (H, N, D) with its indices (H, N)."""
        learn_together([self], [x], [indices], weight=weight, ema_update=ema_update, accumulate_only=accumulate_only)

    def own_rows(self, x: Tensor) -> Tensor:
        """x (H, N, D) where `embed` is: mapped back, if the codes are an affine image of it."""
        return x if self.affine is None else self.affine.of_rows(self, x)

    def hold_(self, counts: Tensor, sums: Tensor) -> None:
        """Keeps the statistics (H, K), (H, K, D) of a batch for the next step of learning."""
        if self.held_counts is None or self.held_sums is None:
            self.held_counts, self.held_sums = counts.clone(), sums.clone()
        else:
            self.held_counts.add_(counts)
            self.held_sums.add_(sums)

    def take_held_(self, counts: Tensor, sums: Tensor) -> None:
        """Adds what was kept to the statistics of a step."""
        if self.held_counts is not None and self.held_sums is not None:
            counts.add_(self.held_counts)
            sums.add_(self.held_sums)
            self.held_counts = self.held_sums = None

    @torch.no_grad()
    def commit_(self) -> None:
        """One step of the moving averages with what `learn_(accumulate_only=True)` has kept, if it has."""
        if self.held_counts is None:
            return
        none = self.embed.new_zeros(self.heads, 0, self.dim)
        self.learn_(none, none.new_zeros(self.heads, 0, dtype=torch.int64))

    @torch.no_grad()
    def update_ema(self) -> None:
        """The codes follow from their averages, e_k = m_k / N'_k as in `fastvq.ema_update_`."""
        none = torch.zeros_like(self.embed_avg[0])
        for head in range(self.heads):  # a decay of 1 leaves the averages
            size, average = self.cluster_size[head], self.embed_avg[head]
            ema_update_(self.embed[head], size, average, none[:, 0], none, decay=1.0, eps=self.eps)
        self.normalise_()

    def normalise_(self) -> None:
        """Unit vectors, where directions are compared."""
        if self.cosine:
            self.embed.copy_(unit_norm(self.embed))

    def candidates(self, x: Tensor, mask: Tensor) -> list[Candidates]:
        """What each head's dead codes may be put on, of x (H, N, D) with mask (H, N)."""
        assert self.reviver is not None
        self.reviver.steps.add_(1)
        together = self.together()
        return [
            self.reviver.candidates(
                x[head], mask[head], self.embed[head].detach(), head=head, metric=self.metric, together=together
            )
            for head in range(self.heads)
        ]

    def revive_from_(self, found: list[Candidates]) -> None:
        """Puts dead codes on the rows found for each head."""
        assert self.reviver is not None
        for head, candidates in enumerate(found):
            self.reviver.revive_(self.embed[head], self.cluster_size[head], self.embed_avg[head], candidates)

    @torch.no_grad()
    def revive_(self, x: Tensor, mask: Tensor) -> None:
        """Puts dead codes on rows of x (H, N, D) with mask (H, N), without a step of learning."""
        if self.reviver is None or distributed.recomputing():
            return
        found = self.candidates(self.own_rows(x), mask)
        if self.together():
            distributed.sum_(*(tensor for pair in found for tensor in pair))
        self.revive_from_(found)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.affine is not None:
            for name in ("batch_mean", "batch_variance"):  # absent until the first step of training
                saved = state_dict.get(prefix + name)
                setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.embed.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.held_counts = self.held_sums = None  # statistics of other codes
        materialize_unsaved_buffers_(self, state_dict)
        with torch.no_grad():
            for state in (self.embed, self.embed_avg, self.cluster_size):
                state.data = state.data.float()  # assign=True puts in what the checkpoint has
        self._ready = not self.initted.is_meta and bool(self.initted)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, heads={self.heads}, metric={self.metric}"
