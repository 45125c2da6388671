"""Base of bottlenecks with a quantizer for each of several grids, whose indices are one sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.codebook.health import HealthReport, Monitored, Totals

from .adapters import Adapter, adapter_of
from .vqvae import Continuous


class IndexGrids(Monitored, nn.Module):
    """Quantizers of several grids, from the coarsest to the finest; a subclass says what each of them quantizes.

    Args:
        dim: dimension D of the features and of the codes of every grid.
        quantizers: any bottlenecks with indices, from coarse to fine, all with the same codebook size.
        grids: the shapes, from coarse to fine.

    Raises:
        ValueError: there are fewer than two quantizers.
        TypeError: a quantizer without indices, or with another number of codes than the others.
    """

    decodes_leading = False
    """True if the indices of the coarsest grids can be decoded without the finer ones."""

    def __init__(self, dim: int, quantizers: Sequence[nn.Module], grids: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        if len(quantizers) < 2:
            raise ValueError(f"quantizers: must be at least 2, one for each grid, got {len(quantizers)}")
        _check_quantizers(quantizers)
        self.dim, self.grids = dim, tuple(grids)
        self.quantizers = nn.ModuleList(quantizers)

    @property
    def adapter(self) -> Adapter:
        """The form in which a VQ-VAE calls this bottleneck."""
        return IndexGridsAdapter(self)

    @property
    def adapters(self) -> list[Adapter]:
        """The form in which each quantizer is called, from the coarsest grid on."""
        return [adapter_of(quantizer) for quantizer in self.quantizers]

    @property
    def index_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one sample's indices at each grid, from the coarsest."""
        return tuple(own.index_shape(grid) for own, grid in zip(self.adapters, self.grids, strict=True))

    def leading(self, count: int) -> int:
        """Return the number of a sample's indices at the first `count` grids."""
        return sum(map(math.prod, self.index_shapes[:count]))

    def split(self, indices: Tensor) -> list[Tensor]:
        """Return the indices of each grid, (B, *grid) or (B, *grid, Q), from those of all, (B, T)."""
        shapes = self.index_shapes
        counts = [math.prod(shape) for shape in shapes]
        if indices.dim() != 2 or indices.shape[1] != sum(counts):
            raise ValueError(
                f"indices: must have shape (B, {sum(counts)}), got {tuple(indices.shape)}: those of the grids"
                f" {', '.join('x'.join(map(str, shape)) for shape in shapes)}"
            )
        parts = indices.split(counts, 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    @property
    def codebook_size(self) -> int:
        """K of all codebooks."""
        return self.adapters[0].stage_sizes()[0]

    @property
    def code_counts(self) -> Tensor:
        """The counts of the codes of all stages of all grids in this process, (Q, K) int64."""
        return torch.cat([one.code_counts.reshape(-1, self.codebook_size) for one in self._monitored])

    @property
    def _monitored(self) -> list[Monitored]:
        return [quantizer for quantizer in self.quantizers if isinstance(quantizer, Monitored)]

    def _report(self, totals: Totals) -> HealthReport:
        # Quantizers with one codebook and with several may stand side by side.
        reports = [one._report(totals) for one in self._monitored]
        return HealthReport(*(torch.cat([v.reshape(-1) for v in values]) for values in zip(*reports, strict=True)))


class IndexGridsAdapter(Adapter):
    """Adapter of `IndexGrids`: the indices of all grids, from the coarsest on, are one sequence (B, T)."""

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def scales(self) -> tuple[tuple[int, ...], ...]:
        return self.quantizer.index_shapes

    @property
    def leading(self) -> tuple[int, ...]:
        counts = [self.quantizer.leading(count) for count in range(1, 1 + len(self.scales))]
        return tuple(counts) if self.quantizer.decodes_leading else ()

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return (sum(map(math.prod, self.scales)),)

    def quantize(self, z: Any, *, accumulate: bool = False) -> tuple[Any, Tensor, Tensor]:
        return self.quantizer(z, accumulate)

    def codes(self, indices: Tensor, ndim: int) -> Any:
        return self.quantizer.get_output_from_indices(indices)

    def stages(self, indices: Tensor) -> list[Tensor]:
        parts = zip(self.quantizer.adapters, self.quantizer.split(indices), strict=True)
        return [stage for own, part in parts for stage in own.stages(part)]

    def stage_sizes(self) -> tuple[int, ...]:
        return tuple(size for own in self.quantizer.adapters for size in own.stage_sizes())

    def code_vectors(self) -> tuple[Tensor, ...] | None:
        found: list[Tensor] = []
        for own in self.quantizer.adapters:
            vectors = own.code_vectors()
            if vectors is None:
                return None
            found += [vectors] * len(own.stage_sizes()) if isinstance(vectors, Tensor) else vectors
        return tuple(found)


def _check_quantizers(quantizers: Sequence[nn.Module]) -> None:
    for quantizer in quantizers:
        if isinstance(quantizer, Continuous):
            raise TypeError(f"quantizers: must have indices, got a {type(quantizer).__name__}")
    sizes = [size for quantizer in quantizers for size in adapter_of(quantizer).stage_sizes()]
    if len(set(sizes)) > 1:
        raise TypeError(f"quantizers: must all have one codebook size, got {', '.join(map(str, sizes))}")
