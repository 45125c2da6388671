"""Calls of a quantizer by a VQ-VAE: the layout of its vectors, indices and losses.

Quantizers keep the signatures of vector_quantize_pytorch, which differ in what they return and how they decode. An
adapter gives all of them one form: features (B, D, *grid) to codes of that shape, indices and one loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.quantizers import (
    FSP,
    FSQ,
    LFQ,
    BinaryMapper,
    EvoLFQ,
    GroupedSphericalVQ,
    HierarchicalVQ,
    LatentQuantize,
    RandomProjectionQuantizer,
    ResidualVQ,
    Sequential,
    SplitResidualVQ,
    StridedResidualVQ,
    VectorQuantize,
)
from fastvq.quantizers.grouped import Grouped
from fastvq.quantizers.residual import ResidualStack

UNSUITABLE: dict[type[nn.Module], str] = {
    RandomProjectionQuantizer: "it only returns indices, the targets of self-supervised learning: no codes to decode",
    BinaryMapper: "it samples bits from logits and returns one-hot vectors, not codes of the dimension of its input",
    EvoLFQ: "it contains an encoder and a decoder of its own",
    Sequential: "it is a sequence of modules: give the quantizer within it",
    StridedResidualVQ: "it returns indices of several lengths, at strides in time",
}
"""Quantizers that cannot be the bottleneck of a VQ-VAE, with the reason."""
_MOST_VECTORS = 1 << 14
"""Largest implicit codebook whose codes are computed at once."""


class Adapter:
    """One form for all quantizers that map vectors (B, N, D) to codes and indices.

    A quantizer returns either one index for each vector, or several, for its heads, codebooks or stages. Then the
    indices have a last axis for them, and `codebook_size` is a tuple with a size for each.

    Args:
        quantizer: the module.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    @property
    def codebook_size(self) -> int | tuple[int, ...]:
        """K for one index per vector, or the sizes of the codebooks along the last axis of the indices.

        Raises:
            TypeError: the quantizer does not say.
        """
        quantizer = self.quantizer
        if isinstance(quantizer, VectorQuantize):
            return quantizer.codebook_size if quantizer.heads == 1 else (quantizer.codebook_size,) * quantizer.heads
        if isinstance(quantizer, FSQ | LFQ | LatentQuantize):
            size = quantizer.codebook_size
            return (size,) * quantizer.num_codebooks if quantizer.keep_num_codebooks_dim else size
        if isinstance(quantizer, ResidualStack):
            return _stage_sizes(quantizer)
        if isinstance(quantizer, SplitResidualVQ | GroupedSphericalVQ):
            return (quantizer.codebook_size,) * len(quantizer.codebooks)
        number = getattr(quantizer, "codebook_size", None)
        if not isinstance(number, int):
            raise TypeError(f"{type(quantizer).__name__} has no codebook_size: the number of its codes is unknown")
        return number

    @property
    def decodes_leading(self) -> bool:
        """True if the indices of the first codebooks alone can be decoded, to a coarser signal."""
        return isinstance(self.quantizer, ResidualStack | SplitResidualVQ)

    @property
    def scales(self) -> tuple[tuple[int, ...], ...] | None:
        """Shapes of the grids whose indices follow each other in one sequence, or None for a single grid."""
        return None

    @property
    def leading(self) -> tuple[int, ...]:
        """Numbers of the leading indices of a sequence that can be decoded without the others, and of all; or none."""
        return ()

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one sample's indices for features of a grid."""
        size = self.codebook_size
        return grid if isinstance(size, int) else (*grid, len(size))

    def quantize(self, z: Tensor, *, accumulate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, shaped as z (B, D, *grid), indices (B, *grid) or (B, *grid, Q), and the loss ().

        `accumulate`: see `VQVAE.forward`.
        """
        grid = z.shape[2:]
        options = {"accum_ema_update": True} if accumulate and isinstance(self.quantizer, VectorQuantize) else {}
        codes, indices, *others = self.quantizer(z.flatten(2).transpose(1, 2), **options)
        return codes.transpose(1, 2).unflatten(2, grid), indices.unflatten(1, grid), _total(others, z)

    def codes(self, indices: Tensor, ndim: int) -> Tensor:
        """Return the codes (B, D, *grid) of indices, for a grid with `ndim` axes."""
        grid = indices.shape[1 : 1 + ndim]
        flat = indices.flatten(1, ndim)
        decode = getattr(self.quantizer, "get_output_from_indices", None) or self.quantizer.indices_to_codes
        return decode(flat).transpose(1, 2).unflatten(2, grid)

    def stages(self, indices: Tensor) -> list[Tensor]:
        """Return the indices (B, *grid) of each codebook."""
        return [indices] if isinstance(self.codebook_size, int) else list(indices.unbind(-1))

    def stage_sizes(self) -> tuple[int, ...]:
        """Return K of each element of `stages`."""
        size = self.codebook_size
        return (size,) if isinstance(size, int) else size

    def code_vectors(self) -> Tensor | tuple[Tensor, ...] | None:
        """Return the code vectors (K, D), or those of each codebook; None if they are too many, or depend on others."""
        quantizer = self.quantizer
        if isinstance(quantizer, ResidualVQ):
            return None if quantizer.implicit_neural_codebook else tuple(quantizer.codebooks)
        if isinstance(quantizer, SplitResidualVQ | GroupedSphericalVQ):
            return tuple(quantizer.codebooks)
        if isinstance(quantizer, ResidualStack):
            codebooks: Any = quantizer.codebooks if max(self.stage_sizes()) <= _MOST_VECTORS else None
            return codebooks if codebooks is None else tuple(codebooks)
        vectors: Tensor
        if isinstance(quantizer, VectorQuantize) and quantizer.separate_codebook_per_head:
            return quantizer.codebook.unbind()
        if isinstance(quantizer, FSQ | LatentQuantize | LFQ | FSP):
            if quantizer.codebook_size > _MOST_VECTORS:
                return None
            if isinstance(quantizer, FSP):
                device = next((parameter.device for parameter in quantizer.parameters()), None)
                vectors = quantizer.indices_to_act_value(torch.arange(quantizer.codebook_size, device=device))
            else:
                vectors = quantizer.codebook if isinstance(quantizer, LFQ) else quantizer.implicit_codebook
        elif isinstance(found := getattr(quantizer, "codebook", None), Tensor):
            vectors = found
        else:
            return None
        size = self.codebook_size
        return vectors if isinstance(size, int) else (vectors,) * len(size)


class ChannelsFirst(Adapter):
    """Adapter of `LatentQuantize`, which takes (B, D, N)."""

    def quantize(self, z: Tensor, *, accumulate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        grid = z.shape[2:]
        codes, indices, loss = self.quantizer(z.flatten(2))
        return codes.unflatten(2, grid), indices.unflatten(1, grid), loss

    def codes(self, indices: Tensor, ndim: int) -> Tensor:
        return self.quantizer.indices_to_codes(indices.flatten(1, ndim)).unflatten(2, indices.shape[1 : 1 + ndim])


class Groups(Adapter):
    """Adapter of quantizers of groups of channels, whose indices (G, B, N, Q) become (B, N, G Q)."""

    @property
    def codebook_size(self) -> tuple[int, ...]:
        return tuple(size for rvq in self.quantizer.rvqs for size in _stage_sizes(rvq))

    def quantize(self, z: Tensor, *, accumulate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        grid = z.shape[2:]
        codes, indices, *others = self.quantizer(z.flatten(2).transpose(1, 2))
        indices = indices.movedim(0, -2).flatten(-2).unflatten(1, grid)
        return codes.transpose(1, 2).unflatten(2, grid), indices, _total(others, z)

    def codes(self, indices: Tensor, ndim: int) -> Tensor:
        grid = indices.shape[1 : 1 + ndim]
        flat = indices.flatten(1, ndim).unflatten(-1, (self.quantizer.groups, -1)).movedim(-2, 0)
        return self.quantizer.get_output_from_indices(flat).transpose(1, 2).unflatten(2, grid)

    def code_vectors(self) -> tuple[Tensor, ...] | None:
        found: list[Tensor] = []
        for rvq in self.quantizer.rvqs:
            vectors = Adapter(rvq).code_vectors()
            if vectors is None:
                return None
            found += vectors
        return tuple(found)


class Scales(Adapter):
    """Adapter of `HierarchicalVQ`: the indices of all scales, from the coarsest on, are one sequence (B, T)."""

    @property
    def codebook_size(self) -> int:
        sizes = set(self.quantizer.codebook_sizes)
        if len(sizes) > 1:
            raise TypeError(f"a HierarchicalVQ in a VQVAE must have one codebook_size for all scales, got {sizes}")
        return next(iter(sizes))

    @property
    def scales(self) -> tuple[tuple[int, ...], ...]:
        return self.quantizer.level_shapes

    def index_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return (sum(map(math.prod, self.scales)),)

    def quantize(self, z: Tensor, *, accumulate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, loss = self.quantizer(z if self.quantizer.channel_first else z.movedim(1, -1))
        codes = codes if self.quantizer.channel_first else codes.movedim(-1, 1)
        return codes, torch.cat([scale.flatten(1) for scale in indices], 1), loss

    def codes(self, indices: Tensor, ndim: int) -> Tensor:
        codes = self.quantizer.get_output_from_indices(self.stages(indices))
        return codes if self.quantizer.channel_first else codes.movedim(-1, 1)

    def stages(self, indices: Tensor) -> list[Tensor]:
        shapes = self.quantizer.level_shapes
        if indices.shape[1:] != self.index_shape(()):
            raise ValueError(
                f"indices: must have shape (B, {self.index_shape(())[0]}), got {tuple(indices.shape)}: those of the"
                f" scales {', '.join('x'.join(map(str, shape)) for shape in shapes)}"
            )
        parts = indices.split([math.prod(shape) for shape in shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def stage_sizes(self) -> tuple[int, ...]:
        return (self.codebook_size,) * self.quantizer.num_levels

    def code_vectors(self) -> Tensor | None:
        return None if self.quantizer.vq is None else self.quantizer.vq.codebook


def adapter_of(quantizer: Any) -> Adapter:
    """Return the adapter of a quantizer, its own if it has one.

    Raises:
        TypeError: the quantizer has no codes to decode from, or no indices.
    """
    for kind, reason in UNSUITABLE.items():
        if isinstance(quantizer, kind):
            raise TypeError(f"{kind.__name__} cannot be the bottleneck of a VQVAE: {reason}")
    if isinstance(own := getattr(quantizer, "adapter", None), Adapter):
        return own
    if isinstance(quantizer, HierarchicalVQ):
        return Scales(quantizer)
    if isinstance(quantizer, LatentQuantize):
        return ChannelsFirst(quantizer)
    return Groups(quantizer) if isinstance(quantizer, Grouped) else Adapter(quantizer)


def _stage_sizes(stack: Any) -> tuple[int, ...]:
    return tuple(stage.codebook_size for stage in stack.layers)


def _total(losses: list[Any], z: Tensor) -> Tensor:
    """Return the first of a quantizer's further results as one loss (): the sum over stages; 0 if there is none."""
    if not losses:
        return z.new_zeros(())
    return losses[0] if losses[0].dim() == 0 else losses[0].sum()
