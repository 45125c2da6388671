"""Code tables: one for all rows, one for each row, or one for each row that a network computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastvq.functional.quantize import lookup, rows_of_mask
from fastvq.functional.soft_assign import cross_entropy, mean_assignment_entropy, soft_lookup
from fastvq.ops import sample, search, topk_search
from fastvq.precision import full_precision

from .shapes import offset_indices

CHUNK_ELEMENTS = 1 << 22
"""Elements of the largest temporary of a search: 16 MiB of float32."""


class Table(ABC):
    """The codes that rows x (C, R, D) are compared with: C codebooks of size K."""

    metric: str
    size: int

    @abstractmethod
    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return indices (C, R) of the nearest codes; -1 where the mask (C, R) is False or a row is not finite."""

    @abstractmethod
    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        """Return indices (C, R, k) of the k nearest codes, nearest first; -1 as in `nearest`."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes (C, R, ..., D) of indices (C, R, ...), zeros for -1; differentiable."""

    @abstractmethod
    def draw(self, x: Tensor, temperature: float, k: int | None, mask: Tensor | None) -> Tensor:
        """Return random indices (C, R), or k different ones (C, R, k), as `fastvq.ops.sample`; -1 as in `nearest`."""

    @abstractmethod
    def positional_entropy(self, x: Tensor, shape: tuple[int, int], temperature: float, mask: Tensor | None) -> Tensor:
        """Return the entropy () of the mean assignment at each position, averaged over positions and codebooks.

            p_bnk = softmax_k(temperature s_bnk),  m_nk = mean_b p_bnk,  value = mean_n -sum_k m_nk ln max(m_nk, 1e-5)

        In nats, differentiable. It is high if the vectors at each position of a batch use the codes evenly. The rows
        x (C, R, D) of each codebook are R = (..., B, N) with the `shape` (B, N).
        """

    @abstractmethod
    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean () of -ln softmax(s)_target over the rows whose target (C, R) is not -1.

        s = -|x - e|, or <x, e> for the metric "dot". Differentiable in x and the codes.
        """


class Shared(Table):
    """One table for all rows: codes (C, K, D)."""

    def __init__(self, codes: Tensor, metric: str = "l2") -> None:
        self.codes, self.metric, self.size = codes, metric, codes.shape[1]

    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return search(x, self.codes.detach(), metric=self.metric, mask=mask)

    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        return topk_search(x, self.codes.detach(), k, metric=self.metric, mask=mask)

    def lookup(self, indices: Tensor) -> Tensor:
        codes = lookup(self.codes.flatten(0, 1), offset_indices(indices, self.size))
        return codes.unflatten(0, indices.shape[:2])

    def draw(self, x: Tensor, temperature: float, k: int | None, mask: Tensor | None) -> Tensor:
        codes = self.codes.detach()
        if k is None:
            seed = torch.randint(2**63 - 1, ())
            indices = sample(x, codes, temperature=temperature, seed=seed, metric=self.metric)
            return indices if mask is None else indices.masked_fill(~mask, -1)
        step = max(1, CHUNK_ELEMENTS // self.size)
        heads = [
            torch.cat(
                [sample_without_replacement(part, own[None], temperature, k, self.metric) for part in rows.split(step)]
            )
            for rows, own in zip(x, codes, strict=True)
        ]
        return _apply_mask(torch.stack(heads), mask)

    def positional_entropy(self, x: Tensor, shape: tuple[int, int], temperature: float, mask: Tensor | None) -> Tensor:
        values = []
        for place, (rows, codes) in enumerate(zip(x, self.codes, strict=True)):
            rows_mask = None if mask is None else mask[place].view(-1, shape[1])
            rows = rows.reshape(-1, *shape[1:], rows.shape[-1])
            values.append(
                mean_assignment_entropy(rows, codes, metric=self.soft_metric, scale=temperature, mask=rows_mask)
            )
        return torch.stack(values).mean()

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        mask = (targets >= 0) & x.isfinite().all(-1)
        losses = [
            cross_entropy(rows, codes, chosen, metric=self.soft_metric)
            for rows, codes, chosen in zip(x, self.codes, targets, strict=True)
        ]
        counts = mask.sum(1)
        return (torch.stack(losses) * counts).sum() / counts.sum().clamp_min(1)

    @property
    def soft_metric(self) -> str:
        """The metric name that `fastvq.soft_assign` takes."""
        return "dot" if self.metric == "dot" else "distance"


class PerRow(Table):
    """One table for each row: codes (C, R, K, D), already transformed."""

    def __init__(self, codes: Tensor, metric: str = "l2") -> None:
        self.codes, self.metric, self.size = codes, metric, codes.shape[2]

    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, codes = x.flatten(0, 1)[:, None], self.codes.detach().flatten(0, 1)
        indices = search(rows, codes, metric=self.metric).view(x.shape[:2])
        return indices if mask is None else indices.masked_fill(~mask, -1)

    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        rows, codes = x.flatten(0, 1)[:, None], self.codes.detach().flatten(0, 1)
        indices = topk_search(rows, codes, k, metric=self.metric).view(*x.shape[:2], k)
        return indices if mask is None else indices.masked_fill(~mask[..., None], -1)

    def lookup(self, indices: Tensor) -> Tensor:
        flat = indices.reshape(*indices.shape[:2], -1)
        codes = self.codes.gather(2, flat.clamp_min(0)[..., None].expand(*flat.shape, self.codes.shape[-1]))
        return codes.masked_fill((flat < 0)[..., None], 0).reshape(*indices.shape, self.codes.shape[-1])

    def draw(self, x: Tensor, temperature: float, k: int | None, mask: Tensor | None) -> Tensor:
        indices = sample_without_replacement(
            x.flatten(0, 1), self.codes.detach().flatten(0, 1), temperature, k or 1, self.metric
        )
        indices = _apply_mask(indices.view(*x.shape[:2], -1), mask)
        return indices if k is not None else indices.squeeze(-1)

    def positional_entropy(self, x: Tensor, shape: tuple[int, int], temperature: float, mask: Tensor | None) -> Tensor:
        rows_mask = x.isfinite().all(-1) if mask is None else mask & x.isfinite().all(-1)
        rows = x.masked_fill(~rows_mask[..., None], 0).flatten(0, 1)
        p = (_logits(rows, self.codes.flatten(0, 1), self.metric) * temperature).softmax(-1)
        counts = rows_mask.view(len(x), -1, shape[1], 1)
        mean = (p.view(*counts.shape[:3], -1) * counts).sum(1) / counts.sum(1).clamp_min(1)
        entropies = -(mean * mean.clamp_min(1e-5).log()).sum(-1)
        return entropies.sum() / counts.any(1).sum().clamp_min(1)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        total = _negative_log(x.flatten(0, 1), self.codes.flatten(0, 1), targets.flatten(), self.metric)
        return total / ((targets >= 0) & x.isfinite().all(-1)).sum().clamp_min(1)


class Implicit(Table):
    """One table for each row, never materialized as a whole.

    Codes (1, K, D) are transformed by a network conditioned on what is known of the row, condition (1, R, D). Memory is
    O(K D) and a chunk of rows.

    With `preselect`, the network transforms only that number of codes for each row: those whose guides (K, D) are
    nearest to it. The search is exact among them.

    Source: Vallaeys et al., QINCo2: Vector Compression and Search with Improved Implicit Neural Codebooks, 2025
    (arXiv 2501.03078), for the preselection by codes without a network.
    """

    def __init__(
        self,
        codes: Tensor,
        network: NeuralCodes,
        condition: Tensor,
        metric: str = "l2",
        *,
        guides: Tensor | None = None,
        preselect: int | None = None,
    ) -> None:
        self.codes, self.network, self.condition = codes[0], network, condition[0]
        self.metric, self.size = metric, codes.shape[1]
        self.guides, self.preselect = guides, preselect

    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.nearest_k(x, 1, mask).squeeze(-1)

    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        rows = x[0].detach()
        found = rows.new_empty((len(rows), k), dtype=torch.int64)
        with torch.no_grad():
            for place, codes, candidates in self._tables(rows):
                chunk = rows[place, None]
                if k == 1:
                    best = search(chunk, codes, metric=self.metric)
                else:
                    best = topk_search(chunk, codes, min(k, codes.shape[1]), metric=self.metric)[:, 0]
                    best = F.pad(best, (0, k - best.shape[1]), value=-1)
                if candidates is not None:
                    best = candidates.gather(1, best.clamp_min(0)).masked_fill(best < 0, -1)
                found[place] = best
        return (found if mask is None else found.masked_fill(~mask[0][:, None], -1))[None]

    def _tables(self, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield (slice of rows (R, D), their codes (n, K or preselect, D), the indices of these codes or None)."""
        if self.guides is None or self.preselect is None or self.preselect >= self.size:
            for place, codes in self.network.by_rows(self.codes, self.condition):
                yield place, codes, None
            return
        candidates = topk_search(rows, self.guides.detach().to(rows.dtype), self.preselect, metric=self.metric)
        step = max(1, CHUNK_ELEMENTS // (self.preselect * self.network.widest))
        for start in range(0, len(rows), step):
            place = slice(start, start + step)
            codes = self.network(lookup(self.codes, candidates[place]), condition=self.condition[place, None])
            yield place, torch.where((candidates[place] < 0)[..., None], torch.nan, codes), candidates[place]

    def lookup(self, indices: Tensor) -> Tensor:
        chosen = indices[0]
        condition = self.condition.view(len(chosen), *[1] * (chosen.dim() - 1), self.condition.shape[-1])
        codes = self.network(lookup(self.codes, chosen), condition=condition)
        return codes.masked_fill((chosen < 0)[..., None], 0)[None]

    def draw(self, x: Tensor, temperature: float, k: int | None, mask: Tensor | None) -> Tensor:
        rows = x[0].detach()
        found = rows.new_empty((len(rows), k or 1), dtype=torch.int64)
        with torch.no_grad():
            for place, codes in self.network.by_rows(self.codes, self.condition):
                found[place] = sample_without_replacement(rows[place], codes, temperature, k or 1, self.metric)
        indices = _apply_mask(found[None], mask)
        return indices if k is not None else indices.squeeze(-1)

    def positional_entropy(self, x: Tensor, shape: tuple[int, int], temperature: float, mask: Tensor | None) -> Tensor:
        raise ValueError("codebook_diversity_loss_weight: must be 0 for implicit codebooks")

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        def part(rows: Tensor, codes: Tensor, condition: Tensor, chosen: Tensor) -> Tensor:
            transformed = self.network(codes[None], condition=condition[:, None])
            return _negative_log(rows, transformed, chosen, self.metric)

        step = max(1, CHUNK_ELEMENTS // (self.size * self.network.widest))
        pieces = zip(x[0].split(step), self.condition.split(step), targets[0].split(step), strict=True)
        # Each chunk is transformed again in the backward pass, so that only one is held at a time.
        losses = [
            checkpoint(part, rows, self.codes, condition, chosen, use_reentrant=False)
            for rows, condition, chosen in pieces
        ]
        count = ((targets >= 0) & x.isfinite().all(-1)).sum().clamp_min(1)
        return torch.stack(losses).sum() / count if losses else x.sum() * 0


def sample_without_replacement(x: Tensor, codes: Tensor, temperature: float, k: int, metric: str) -> Tensor:
    """Return k indices (R, k) for each row of x (R, D), sampled without repetition from softmax(s / temperature).

    Codes are (1, K, D) or (R, K, D). The indices are those of the largest s / temperature + Gumbel noise, -1 for rows
    that are not finite. An R x K matrix is materialized: call it for chunks of rows.

    Source: Kool et al., Stochastic Beams and Where to Find Them, 2019.
    """
    logits = _logits(x, codes, metric) / temperature
    noise = -(-torch.rand_like(logits).clamp_min(torch.finfo(logits.dtype).tiny).log()).log()
    indices = (logits + noise).topk(k, dim=1).indices
    return indices.masked_fill(~x.isfinite().all(1, keepdim=True), -1)


def _logits(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    rows = x.to(torch.promote_types(x.dtype, codes.dtype))[:, None]
    if metric == "dot":
        return (rows * codes).sum(-1)
    if len(codes) == 1 and not codes.requires_grad and not x.requires_grad:
        middle = codes.mean(1)  # far from the origin the products in cdist would cancel
        return -torch.cdist(rows[:, 0] - middle, codes[0] - middle)
    return -torch.linalg.vector_norm(rows - codes, dim=-1)


def _negative_log(x: Tensor, codes: Tensor, targets: Tensor, metric: str) -> Tensor:
    """Return the sum over rows x (R, D) of -ln softmax(s)_target over their codes (R, K, D)."""
    mask = (targets >= 0) & x.isfinite().all(-1)
    logits = _logits(x.masked_fill(~mask[:, None], 0), codes, metric)
    return F.cross_entropy(logits, targets.masked_fill(~mask, -1), ignore_index=-1, reduction="sum")


def _apply_mask(indices: Tensor, mask: Tensor | None) -> Tensor:
    """Return indices (C, R, k) with -1 where the mask (C, R) is False."""
    return indices if mask is None else indices.masked_fill(~mask[..., None], -1)


class NeuralCodes(nn.Module):
    """Network that transforms a code depending on the sum of the codes of earlier stages.

        h_0 = W [condition; code] + b,   h_{i+1} = h_i + W'_i silu(W_i h_i + b_i) + b'_i,   code' = h_depth

    State: proj_in, layers.

    Args:
        dim: D, of codes and condition.
        dim_hidden: width of the residual layers; by default D.
        depth: number of residual layers.
        l2norm_output: return unit vectors.

    Source: Huijben et al., Residual Quantization with Implicit Neural Codebooks (QINCo), 2024, section 3.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)]
        )
        self.l2norm_output = l2norm_output
        self.widest = max(dim, hidden)

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """Transform codes (..., D), each with its condition (..., D); the leading shapes are broadcast.

        Computed in the network's dtype, regardless of autocast; returned in the dtype of the codes.
        """
        with full_precision(codes):
            return self._transform(codes, condition).to(codes.dtype)

    def _transform(self, codes: Tensor, condition: Tensor) -> Tensor:
        weight = self.proj_in.weight
        # The two halves are multiplied separately, so that broadcast rows are only added.
        of_condition, of_codes = weight.chunk(2, 1)
        h = F.linear(condition.to(weight.dtype), of_condition, self.proj_in.bias)
        h = h + F.linear(codes.to(weight.dtype), of_codes)
        for layer in self.layers:
            h = h + layer(h)
        return F.normalize(h, dim=-1) if self.l2norm_output else h

    def by_rows(self, codes: Tensor, condition: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of rows, transformed codes (n, K, D)) for codes (K, D) and condition (R, D).

        A chunk has as many rows as fit CHUNK_ELEMENTS. For use without gradient.
        """
        step = max(1, CHUNK_ELEMENTS // (len(codes) * self.widest))
        for start in range(0, len(condition), step):
            place = slice(start, start + step)
            yield place, self(codes[None], condition=condition[place, None])


class IndexBackpropagationResult(NamedTuple):
    """Result of `index_backpropagation`."""

    quantized: Tensor  # (..., D), dtype of x
    indices: Tensor  # (...) int64


def index_backpropagation(
    x: Tensor, codebook: Tensor, *, metric: str = "dot", scale: float = 1.0, mask: Tensor | None = None
) -> IndexBackpropagationResult:
    """Return the best code of each vector, with the gradient of a soft choice, so that every code learns.

        p_n = softmax_k(scale s_nk),   index_n = argmax_k s_nk,   s_nk = <x_n, e_k> for "dot", -|x_n - e_k|^2 for "l2"
        quantized_n = e_{index_n},   gradient as if it were  sum_k (onehot_nk + p_nk - sg[p_nk]) e_k

    Args:
        x: (..., D), any floating dtype. codebook: (K, D). Both get gradients.
        metric, scale: of the choice.
        mask: bool (...), the vectors that take part. The others, and non-finite ones, have index -1, a zero output and
            no gradient.

    Raises:
        TypeError, ValueError: an invalid argument, by name.

    Numerics: the choice is exact (`fastvq.search`); memory is O(N D + K D) and a tile, forward and backward.

    Source: Shi et al., Scalable Image Tokenization with Index Backpropagation Quantization, 2024, equations 3 and 4.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows_mask = None if mask is None else rows_of_mask(mask, x.shape[:-1])
    indices = search(rows.detach(), codebook.detach(), metric=metric, mask=rows_mask).reshape(x.shape[:-1])
    return IndexBackpropagationResult(soft_lookup(x, codebook, indices, metric=metric, scale=scale), indices)
