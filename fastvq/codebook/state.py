"""Codebooks: their state, and the step in which they learn from a batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import distributed
from fastvq.functional.quantize import unit_norm
from fastvq.ops import search
from fastvq.parts.arguments import check_fractions
from fastvq.precision import KeepsPrecision, Unsaved, as_scalar

from .affine import Affine
from .candidates import Candidates
from .guards import guard_ready
from .kmeans import SEEDINGS, kmeans
from .replacement import Replacement, Replacer
from .storage import LostCodes, WriteCheck, is_dtensor, read, refuse_dtensor, write_
from .update import batch_statistics, ema_step_

Weight = float | Tensor | Callable[[Tensor, Tensor], Tensor]
"""Factor that multiplies 1 - decay in one step: (), (K,) or (H, K), or a function of (sums, counts) that returns it."""


def checked_decay(decay: float | Tensor) -> float | Tensor:
    """Return a decay that lies in [0, 1]; a tensor () isn't read, as this would wait for the device."""
    if not isinstance(decay, Tensor):
        check_fractions(decay=decay)
    elif decay.dim() or not decay.is_floating_point():
        got = f"shape {tuple(decay.shape)}, {decay.dtype}"
        raise ValueError(f"decay: must be a number or a floating-point tensor of shape (), got {got}")
    return decay


SPLIT = 0.01
"""Distance of a code that has been split from the original, in units of its length."""


class Codebook(KeepsPrecision, Unsaved, nn.Module):
    """K codes of D dimensions for each of H heads, with the state that they learn by.

    The state is float32 whatever dtype the module is cast to.

    State: embed (H, K, D), a parameter if learnable; cluster_size (H, K); embed_avg (H, K, D); initted (), 0 until
    k-means has run, then 1. Names and the leading axis are those of vector_quantize_pytorch, whose checkpoints load.
    There initted is bool, which `AveragedModel` cannot average.

    Args:
        dim, size, heads: D, K, H: the number of separate codebooks, one where the heads of a layer share it.
        sync: learn with all ranks if a process group exists when the codebook learns; None means True.
        sync_kmeans: the same for k-means.
        manual_ema_update: the codes follow their averages only when `update_ema` is called.
        replacement: the policy for dead codes, or None.
        cosine: codes are compared by direction. Averages and writes normalize them; a learnable codebook without
            averages is a free parameter, and its normalized form is compared.
        affine: decays and sync of an `Affine` reparametrization, or None.
        bridge: a module that maps embed to the codes in use, (H, K, D) -> (H, K, D), before the affine map; or None.
        The others: see `fastvq.VectorQuantize`.

    Raises:
        ValueError: decay, eps or kmeans_iters is out of range, or kmeans_seeding unknown.
    """

    _statistics = ("held_counts", "held_sums")

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
        kmeans_seeding: str = "k-means++",
        cosine: bool = False,
        learnable: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        replacement: Replacement | None = None,
        sync: bool | None = None,
        sync_kmeans: bool = True,
        affine: dict[str, Any] | None = None,
        bridge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        checked_decay(decay)
        if not eps >= 0:
            raise ValueError(f"eps: must not be negative, got {eps}")
        rounds: Any = kmeans_iters
        if not (isinstance(rounds, Integral) and int(rounds) >= 0):
            raise ValueError(f"kmeans_iters: must be an integer that isn't negative, got {kmeans_iters!r}")
        if kmeans_seeding not in SEEDINGS:
            raise ValueError(f"kmeans_seeding: must be one of {', '.join(SEEDINGS)}, got {kmeans_seeding!r}")
        self.dim, self.size, self.heads = dim, size, heads
        self.decay: float | Tensor = decay
        self.eps = eps
        self.kmeans_init, self.kmeans_iters, self.kmeans_seeding = kmeans_init, kmeans_iters, kmeans_seeding
        self.cosine = cosine
        self.metric = "dot" if cosine else "l2"
        self._normalizes = cosine and learnable and not ema_update
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.sync, self.sync_kmeans = sync, sync_kmeans

        embed = torch.zeros(heads, size, dim, dtype=torch.float32)
        if not kmeans_init:
            embed = self._random_codes_(embed)
        self.register_buffer("initted", torch.tensor(float(not kmeans_init), dtype=torch.float32))
        self.register_buffer("cluster_size", torch.ones(heads, size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.held_counts, self.held_sums = None, None
        replaces = replacement is not None and (replacement.threshold > 0 or replacement.anchors)
        self.replacer = Replacer(replacement, size, dim, heads) if replaces and replacement is not None else None
        self.vq_bridge = bridge
        self.affine = None if affine is None else Affine(self, heads, dim, **affine)
        self.replayed: Tensor | None = None  # the codes of a recomputed forward pass
        self._write_check = WriteCheck()
        self._lost = LostCodes()
        self._ready = not kmeans_init
        self._seen: tuple[Tensor, int] | None = None

    def _random_codes_(self, embed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return embed (H, K, D) with the codes of a new codebook."""
        # He's uniform initialization of a (H, K, D) tensor, whose fan-in is K D.
        limit = math.sqrt(6 / (self.size * self.dim))
        embed.uniform_(-limit, limit, generator=generator)
        return unit_norm(embed) if self.cosine else embed

    def ready(self, *, to_guard: bool = False) -> bool:
        """Return whether `initted` says that the codes are in place, so that k-means need not run.

        Anybody may write to that tensor. On the CPU it is read at each call. Elsewhere this would wait for the device:
        it is read when it is another tensor than before or has been written to, which a write to `initted.data`
        conceals. A compiled graph is for one answer, and asks at each call, `to_guard`, whether it is still the one.
        """
        if not to_guard and torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime  # which takes long to import

            comptime(guard_ready)
            return self._ready
        initted = self.initted
        if type(initted) is not Tensor or initted.is_meta:  # as a fake tensor, or on "meta", it has no value
            return self._ready
        if initted.device.type == "cpu" or initted.is_inference():
            self._ready = bool(initted)
        elif self._seen is None or self._seen[0] is not initted or self._seen[1] != initted._version:
            self._ready, self._seen = bool(initted), (initted, initted._version)
        lost = not to_guard and self._ready and self.kmeans_init and self._lost(self._parameters.get("embed"))
        return self._ready and not lost

    @property
    def codes(self) -> Tensor:
        """The codes that vectors are compared with, (H, K, D): embed, or its image under bridge and affine map."""
        codes = self._buffers.get("embed")  # nn.Module's lookup by name takes longer than a search of one vector
        if codes is None:
            codes = self.embed
        if type(codes) is not Tensor:
            refuse_dtensor("embed", codes)
        codes = codes if self.vq_bridge is None else self._bridged(self.vq_bridge, codes)
        codes = codes if self.affine is None else self.affine.of_codes(self, codes)
        codes = unit_norm(codes) if self._normalizes else codes
        # Checkpointing may stop a recomputation as soon as it has what it needs, before the layer ends its pass.
        if self.replayed is None or not distributed.recomputing():
            return codes
        return self.replayed + (codes - codes.detach()) if codes.requires_grad else self.replayed

    @staticmethod
    def _bridged(bridge: nn.Module, codes: Tensor) -> Tensor:
        found = bridge(codes)
        if found.shape != codes.shape:
            raise ValueError(f"vq_bridge: must return codes {tuple(codes.shape)}, got {tuple(found.shape)}")
        return found

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the indices (H, N) of x (H, N, D), -1 where the mask (H, N) is False."""
        return search(x, self.codes.detach(), metric=self.metric, mask=mask)

    def initialize_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Run k-means on the first batch, and update the statistics of an affine map on every batch.

        The rows of x (H, N, D) take part that are finite and in the mask (H, N).
        """
        ready = self.ready()
        if self._write_check.written is not None:
            self._write_check.check("embed", self._parameters.get("embed"), read(self, "embed"))
        if (ready and self.affine is None) or distributed.recomputing():
            return
        with torch.no_grad():
            rows_mask = x.isfinite().all(-1)
            if mask is not None:
                rows_mask = rows_mask & mask
            if not ready:
                self._run_kmeans_(x, rows_mask)
            if self.affine is not None:
                self.affine.observe_(self, self.embed.detach(), x, rows_mask)

    def _run_kmeans_(self, x: Tensor, mask: Tensor) -> None:
        together = self.together() and self.sync_kmeans
        if x.shape[1] == 0 and not together:
            return
        # These reads wait for the device, but only before the first batch. A traced graph omits them.
        if not torch.compiler.is_compiling():
            available = mask.sum().float()
            if together:
                distributed.sum_(available)
            if not bool(available):
                return
        found = [
            kmeans(
                head,
                self.size,
                iterations=self.kmeans_iters,
                mask=head_mask,
                metric=self.metric,
                seeding=self.kmeans_seeding,
                together=together,
            )
            for head, head_mask in zip(x, mask, strict=True)
        ]
        # A code without rows starts as if it had one: with none, the first update would send it to the origin.
        self.set_(torch.stack([means for means, _ in found]), torch.stack([counts for _, counts in found]).clamp_min(1))

    @torch.no_grad()
    def set_(self, codes: Tensor, cluster_size: Tensor | None = None) -> None:
        """Set the codes (H, K, D) and, if given, the cluster sizes (H, K), and make the averages agree with them."""
        codes = codes.to(self.embed_avg)
        if self.cosine:
            codes = unit_norm(codes)
        self._store_(codes)
        if cluster_size is not None:
            self.cluster_size.copy_(cluster_size)
        self.embed_avg.copy_(codes * self.cluster_size[..., None])
        self._mark_ready_(True)

    def _mark_ready_(self, ready: bool) -> None:
        self.initted.fill_(float(ready))
        self._ready, self._seen = ready, None

    def _store_(self, codes: Tensor) -> None:
        """Write codes (H, K, D) float32 to embed."""
        if "embed" in self._buffers:
            self.embed.copy_(codes)
            return
        before = read(self, "embed") if self._write_check.left else None
        write_(self, "embed", codes)
        if before is not None:
            self._write_check.record(self._parameters.get("embed"), before, codes)

    @torch.no_grad()
    def reinitialize_(self) -> None:
        """Return to the state of a new codebook: random codes, or with kmeans_init those of the next training batch.

        Averages, cluster sizes, affine statistics, reservoirs and what `learn_(accumulate_only=True)` has kept are
        reset too. Ranks that learn together draw the same codes if all of them call this.
        """
        codes = torch.zeros(self.embed_avg.shape, dtype=torch.float32, device="cpu")
        if not self.kmeans_init:
            limit = 2**63 - 1
            seed = distributed.common_seed(limit) if self.together() else int(torch.randint(limit, ()))
            codes = self._random_codes_(codes, torch.Generator("cpu").manual_seed(seed))
        codes = codes.to(self.embed_avg.device)
        self._store_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.fill_(1)
        self.held_counts = self.held_sums = None
        if self.affine is not None:
            self.affine.reset_(self)
        if self.replacer is not None:
            self.replacer.reset_()
        self._mark_ready_(not self.kmeans_init)

    @torch.no_grad()
    def resize_(self, size: int) -> None:
        """Change the number of codes to `size`, and keep the averages of those that stay.

        Fewer: the codes of the largest cluster sizes stay, in their order. More: the codes of the largest cluster sizes
        are split, each into nearby ones that share its cluster size. Ranks that learn together get the same codes if
        all of them call this. Reservoirs and what `learn_(accumulate_only=True)` has kept are dropped.

        Raises:
            ValueError: the codes have a bridge, which may depend on their number.
        """
        if self.vq_bridge is not None:
            raise ValueError("vq_bridge: must be None to change the number of codes")
        refuse_dtensor("embed", self.embed)
        ready, codes, old = self.ready(), read(self, "embed"), self.size
        order = self.cluster_size.argsort(dim=1, descending=True, stable=True)
        kept = order[:, :size].sort(1).values if size < old else torch.arange(old, device=codes.device).expand_as(order)
        added = order[:, torch.arange(max(0, size - old), device=codes.device) % old]
        source = torch.cat([kept, added], 1)
        shares = torch.zeros_like(self.cluster_size).scatter_add_(
            1, source, torch.ones_like(source, dtype=torch.float32)
        )
        sizes = (self.cluster_size / shares.clamp_min(1)).gather(1, source)
        places = source[..., None].expand(-1, -1, self.dim)
        averages = (self.embed_avg / shares.clamp_min(1)[..., None]).gather(1, places)
        codes = codes.gather(1, places)
        limit = 2**63 - 1
        seed = distributed.common_seed(limit) if self.together() else int(torch.randint(limit, ()))
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(self.heads, added.shape[1], self.dim, generator=generator, device="cpu").to(codes)
        near = codes[:, kept.shape[1] :]
        moved = near + SPLIT * noise * near.square().mean(-1, keepdim=True).sqrt()
        codes[:, kept.shape[1] :] = unit_norm(moved) if self.cosine else moved
        averages[:, kept.shape[1] :] = codes[:, kept.shape[1] :] * sizes[:, kept.shape[1] :, None]
        self.size, self.cluster_size, self.embed_avg = size, sizes, averages
        learnable = "embed" in self._parameters
        self.embed = nn.Parameter(codes, self.embed.requires_grad) if learnable else codes
        self.held_counts = self.held_sums = None
        if self.replacer is not None:
            self.replacer = Replacer(self.replacer.policy, size, self.dim, self.heads)
            self.replacer.follow_(codes.device)
        self._write_check = WriteCheck()
        self._mark_ready_(ready)

    def learns(self, ema_update: bool | None = None) -> bool:
        """Return whether a learning step would change anything; `ema_update` overrides the codebook's own setting."""
        return self.replacer is not None or (self.ema_update if ema_update is None else ema_update)

    def together(self) -> bool:
        """Return whether this codebook learns with other ranks, as of now."""
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
        """Apply `learn_together` to this codebook alone, with vectors x (H, N, D) and their indices (H, N)."""
        learn_together([self], [x], [indices], weight=weight, ema_update=ema_update, accumulate_only=accumulate_only)

    def own_rows(self, x: Tensor) -> Tensor:
        """Return x (H, N, D) in the space of `embed`: mapped back, if the codes are an affine image of it."""
        return x if self.affine is None else self.affine.of_rows(self, x)

    def hold_(self, counts: Tensor, sums: Tensor) -> None:
        """Keep the statistics (H, K), (H, K, D) of a batch for the next learning step."""
        if self.held_counts is None or self.held_sums is None:
            self.held_counts, self.held_sums = counts.clone(), sums.clone()
        else:
            self.held_counts.add_(counts)
            self.held_sums.add_(sums)

    def take_held_(self, counts: Tensor, sums: Tensor) -> None:
        """Add the kept statistics to those of a learning step."""
        if self.held_counts is not None and self.held_sums is not None:
            counts.add_(self.held_counts)
            sums.add_(self.held_sums)
            self.held_counts = self.held_sums = None

    @torch.no_grad()
    def commit_(self) -> None:
        """Learn from the statistics that `learn_(accumulate_only=True)` has kept, if there are any."""
        if self.held_counts is None:
            return
        none = self.embed.new_zeros(self.heads, 0, self.dim)
        self.learn_(none, none.new_zeros(self.heads, 0, dtype=torch.int64))

    def move_averages_(
        self, counts: Tensor, sums: Tensor, weight: Weight | None = None, ema_update: bool | None = None
    ) -> None:
        """Move the averages by the statistics (H, K), (H, K, D) of a batch, and the codes with them.

        Without `ema_update`, only the cluster sizes move: the replacement of dead codes depends on them. With a weight
        of zero for all codes, the codes stay bit-identical.
        """
        averages = self.ema_update if ema_update is None else ema_update
        # `ema_update_` writes to all of its state: what must stay is passed as a copy.
        follows = averages and not self.manual_ema_update
        in_place = follows and "embed" in self._buffers
        codes = self.embed if in_place else read(self, "embed")
        embed_avg = self.embed_avg if averages else self.embed_avg.clone()
        factor = None if weight is None else self._expand_weight(weight, counts, sums)
        before = None if factor is None else codes.detach().clone()
        ema_step_(codes, self.cluster_size, embed_avg, counts, sums, factor, decay=self.decay, eps=self.eps)
        if self.cosine:
            codes.copy_(unit_norm(codes))
        if factor is not None and before is not None:
            codes.copy_(torch.where((factor != 0).any(), codes, before))
        if follows and not in_place:
            self._store_(codes)

    def _expand_weight(self, weight: Weight, counts: Tensor, sums: Tensor) -> Tensor:
        """Return the weight as (H, K) float32."""
        found = weight(sums, counts) if callable(weight) else weight
        given = found.to(counts.device) if isinstance(found, Tensor) else as_scalar(found).to(counts)
        given = given[None] if given.dim() == 1 else given
        shape = (self.heads, self.size)
        if given.dim() and given.shape != shape:
            raise ValueError(
                f"ema_update_weight: must have shape (), ({shape[1]},) or {shape}, got {tuple(given.shape)}"
            )
        return given.to(self.cluster_size).expand(shape).contiguous()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes from their averages: e_k = m_k / N'_k as in `fastvq.ema_update_`."""
        none, zeros = torch.zeros_like(self.embed_avg), torch.zeros_like(self.cluster_size)
        codes = read(self, "embed")
        # With a weight of zero the averages stay, and the codes follow them.
        ema_step_(codes, self.cluster_size, self.embed_avg, zeros, none, zeros, decay=self.decay, eps=self.eps)
        self._store_(unit_norm(codes) if self.cosine else codes)

    def candidates(self, x: Tensor, mask: Tensor) -> list[Candidates]:
        """Return, for each head, the rows of x (H, N, D) in the mask (H, N) that may replace dead codes."""
        assert self.replacer is not None
        self.replacer.follow_(x.device)
        self.replacer.steps.add_(1)
        together = self.together()
        return [
            self.replacer.candidates(
                x[head], mask[head], self.embed[head].detach(), head=head, metric=self.metric, together=together
            )
            for head in range(self.heads)
        ]

    def replace_from_(self, candidates: list[Candidates]) -> None:
        """Replace the dead codes of each head by its candidates."""
        assert self.replacer is not None
        in_place = "embed" in self._buffers
        codes = self.embed if in_place else read(self, "embed")
        for head, found in enumerate(candidates):
            state = codes[head], self.cluster_size[head], self.embed_avg[head]
            if self.replacer.policy.anchors:
                self.replacer.move_to_anchors_(*state, found, self.decay)
                if self.cosine:
                    codes[head] = unit_norm(codes[head])
            else:
                self.replacer.replace_(*state, found)
        if not in_place:
            self._store_(codes)

    @torch.no_grad()
    def replace_dead_(self, x: Tensor, mask: Tensor) -> None:
        """Replace dead codes by rows of x (H, N, D) in the mask (H, N), without a learning step."""
        if self.replacer is None or distributed.recomputing():
            return
        found = self.candidates(self.own_rows(x), mask)
        if self.together():
            distributed.sum_(*(tensor for pair in found for tensor in pair))
        self.replace_from_(found)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.affine is not None:
            self.affine.complete(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.held_counts = self.held_sums = None  # statistics of other codes
        with torch.no_grad():
            for state in (*self._parameters.values(), *self._buffers.values()):
                if state is not None and state.dtype != torch.float32:
                    state.data = state.data.float()  # assign=True takes over the checkpoint's dtypes
        self._ready, self._seen = not self.initted.is_meta and bool(self.initted), None
        self._write_check = WriteCheck()
        self._warn_of_loaded_codes(prefix)

    @torch.no_grad()
    def non_finite(self) -> Tensor:
        """Return the share (H,) of codes that are not finite, or whose averages are not; they are never chosen.

        Where `fully_shard` has sharded the codes, they are gathered: all ranks must call this.
        """
        codes = read(self, "embed") if is_dtensor(self.embed) else self.embed
        finite = codes.isfinite().all(-1) & self.embed_avg.isfinite().all(-1) & self.cluster_size.isfinite()
        return 1 - finite.float().mean(-1)

    def _warn_of_loaded_codes(self, prefix: str) -> None:
        # Loading may wait for the device; a training step must not.
        if type(self.embed.data) is not Tensor or self.embed.is_meta or torch.compiler.is_compiling():
            return
        count = round(float(self.non_finite().sum()) * self.size)
        if count:
            warnings.warn(
                f"{prefix}embed: {count} of {self.heads * self.size} loaded codes are not finite, or have averages that"
                " are not: they are never chosen, and reported by health().non_finite",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, heads={self.heads}, metric={self.metric}"


@torch.no_grad()
def learn_together(
    codebooks: Sequence[Codebook],
    x: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    *,
    weight: Weight | None = None,
    active: Sequence[Tensor] | None = None,
    ema_update: bool | None = None,
    accumulate_only: bool = False,
) -> None:
    """Move each codebook towards its vectors, and replace its dead codes. Nothing waits for the device.

    All codebooks share one `accumulate` and, over several ranks, one all-reduce: that of their counts, sums and
    candidates for replacement, so that every rank gets the same bits. A codebook that is listed more than once, because
    stages share it, moves its averages once for each entry. A forward pass that is recomputed for its gradient changes
    nothing.

    Args:
        codebooks: Q of them, with one D.
        x: vectors, a tensor (Q, H, N, D) or Q tensors (H, N, D).
        indices: (Q, H, N) or Q tensors (H, N) int64; rows with -1 are excluded.
        weight: factor that multiplies 1 - decay, see `Weight`. Codebooks stay bit-identical if it is zero.
        active: () for each codebook, 0 if it takes no part in this batch; instead of a weight. A codebook that takes
            part on no rank, and has no kept statistics, stays bit-identical.
        ema_update: use the moving averages, instead of the codebooks' own setting.
        accumulate_only: keep counts and sums for the next step without this, or for `Codebook.commit_`.
    """
    if distributed.recomputing():
        return
    learning, affine = [], False
    for place, codebook in enumerate(codebooks):
        if codebook.learns(ema_update):
            learning.append(place)
            affine = affine or codebook.affine is not None
    if not learning:
        return
    flags = [] if active is None else [active[i].clone() for i in learning]
    if len(learning) < len(codebooks):
        codebooks = [codebooks[i] for i in learning]
        x, indices = [x[i] for i in learning], [indices[i] for i in learning]
    if affine:
        x = [codebook.own_rows(rows) for codebook, rows in zip(codebooks, x, strict=True)]

    counts, sums = batch_statistics(x, indices, [(codebook.heads, codebook.size) for codebook in codebooks])
    entries: dict[Codebook, list[int]] = {}
    for place, codebook in enumerate(codebooks):
        entries.setdefault(codebook, []).append(place)
        if accumulate_only:
            codebook.hold_(counts[place], sums[place])
        elif codebook.held_counts is not None:
            codebook.take_held_(counts[place], sums[place])
    if accumulate_only:
        return
    candidates: dict[Codebook, list[Candidates]] = {}
    for codebook, places in entries.items():
        if codebook.replacer is not None:
            shared = len(places) > 1
            rows = torch.cat([x[i] for i in places], 1) if shared else x[places[0]]
            chosen = torch.cat([indices[i] for i in places], 1) if shared else indices[places[0]]
            candidates[codebook] = codebook.candidates(rows, chosen >= 0)
    if codebooks[0].together():
        distributed.sum_(*counts, *sums, *flags, *(t for found in candidates.values() for pair in found for t in pair))
    weights: list[Any] = [weight] * len(codebooks)
    for place, flag in enumerate(flags):
        weights[place] = ((flag > 0) | (counts[place] > 0).any()).float()
    for codebook, places in entries.items():
        before = codebook.replacer is not None and codebook.replacer.policy.before_update
        if codebook in candidates and before:
            codebook.replace_from_(candidates[codebook])
        for place in places:
            codebook.move_averages_(counts[place], sums[place], weights[place], ema_update)
        if codebook in candidates and not before:
            codebook.replace_from_(candidates[codebook])
