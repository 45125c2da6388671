"""Where codes are looked for: one table for all vectors, or one for each."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .. import reference
from ..functional import lookup
from ..ops import search, topk_search
from ..ops.searches import LARGEST_K
from .heads import behind_each_other
from .implicit import NeuralCodes


class Table(ABC):
    """The codes that rows x (C, R, D) are compared with, C codebooks of size K."""

    metric: str
    size: int

    @abstractmethod
    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Indices (C, R) of the nearest codes; -1 where the mask (C, R) is False or a row isn't finite."""

    @abstractmethod
    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        """Indices (C, R, k) of the k nearest codes, nearest first, -1 likewise."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """The codes (C, R, ..., D) of indices (C, R, ...), zeros for -1; differentiable."""


class Shared(Table):
    """One table for all rows: codes (C, K, D)."""

    def __init__(self, codes: Tensor, metric: str = "l2") -> None:
        self.codes, self.metric, self.size = codes, metric, codes.shape[1]

    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return search(x, self.codes.detach(), metric=self.metric, mask=mask)

    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        return ranked(x, self.codes.detach(), k, self.metric, mask)

    def lookup(self, indices: Tensor) -> Tensor:
        codes = lookup(self.codes.flatten(0, 1), behind_each_other(indices, self.size))
        return codes.unflatten(0, indices.shape[:2])


class PerRow(Table):
    """A table for each row: codes (C, R, K, D), as a transformation by whoever calls has made them."""

    def __init__(self, codes: Tensor, metric: str = "l2") -> None:
        self.codes, self.metric, self.size = codes, metric, codes.shape[2]

    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, codes = x.flatten(0, 1)[:, None], self.codes.detach().flatten(0, 1)
        indices = search(rows, codes, metric=self.metric).view(x.shape[:2])
        return indices if mask is None else indices.masked_fill(~mask, -1)

    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        rows, codes = x.flatten(0, 1)[:, None], self.codes.detach().flatten(0, 1)
        indices = ranked(rows, codes, k, self.metric, None).view(*x.shape[:2], k)
        return indices if mask is None else indices.masked_fill(~mask[..., None], -1)

    def lookup(self, indices: Tensor) -> Tensor:
        flat = indices.reshape(*indices.shape[:2], -1)
        codes = self.codes.gather(2, flat.clamp_min(0)[..., None].expand(*flat.shape, self.codes.shape[-1]))
        return codes.masked_fill((flat < 0)[..., None], 0).reshape(*indices.shape, -1)


class Implicit(Table):
    """A table for each row that is never built as a whole: codes (1, K, D), transformed by a network conditioned on
    what is known of the row, condition (1, R, D). Memory is O(K D) and a chunk of rows."""

    def __init__(self, codes: Tensor, network: NeuralCodes, condition: Tensor, metric: str = "l2") -> None:
        self.codes, self.network, self.condition = codes[0], network, condition[0]
        self.metric, self.size = metric, codes.shape[1]

    def nearest(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.nearest_k(x, 1, mask).squeeze(-1)

    def nearest_k(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        rows = x[0].detach()
        found = rows.new_empty((len(rows), k), dtype=torch.int64)
        for place, codes in self.network.by_rows(self.codes.detach(), self.condition.detach()):
            chunk = rows[place, None]
            if k == 1:
                found[place] = search(chunk, codes, metric=self.metric)
            else:
                found[place] = ranked(chunk, codes, k, self.metric, None)[:, 0]
        return (found if mask is None else found.masked_fill(~mask[0][:, None], -1))[None]

    def lookup(self, indices: Tensor) -> Tensor:
        chosen = indices[0]
        condition = self.condition.view(len(chosen), *[1] * (chosen.dim() - 1), -1)
        codes = self.network(lookup(self.codes, chosen), condition=condition)
        return codes.masked_fill((chosen < 0)[..., None], 0)[None]


def ranked(x: Tensor, codes: Tensor, k: int, metric: str, mask: Tensor | None) -> Tensor:
    """`fastvq.topk_search` for any k up to K: beyond its limit, by the definition."""
    if k <= LARGEST_K:
        return topk_search(x, codes, k, metric=metric, mask=mask)
    indices = reference.topk_search(x, codes, k, metric=metric)
    return indices if mask is None else indices.masked_fill(~mask[..., None], -1)
