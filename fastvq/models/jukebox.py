"""Separate autoencoders of one signal at several scales, as those of Jukebox.

    x -- encoder_s --> features_s -- quantizer_s --> codes_s -- decoder_s --> reconstruction_s     for each scale s

A `VQVAE` of these three modules learns all of them at once, and they share nothing. Its indices are one sequence, the
coarsest scale first, of which a `HierarchicalPrior` learns the coarsest and what each finer one adds. They decode by
the finest decoder alone. Features and codes are dictionaries {number of the scale: tensor}, the coarsest number 0.

Source: Dhariwal et al., Jukebox: A Generative Model for Music, 2020, sections 3.2 and 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .index_grids import IndexGrids


class JukeboxEncoder(nn.Module):
    """Encoders of one signal, from the coarsest scale to the finest.

    Args:
        encoders: modules from (B, C, *size) to (B, D, *grid), with an attribute `stride`, such as `AudioEncoder`. Each
            stride is a multiple of the next one.

    Shapes: (B, C, *size) -> {scale: (B, D, *grid of the scale)}.

    Raises:
        ValueError: there are fewer than two encoders, or their strides do not divide each other.
    """

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        strides = [int(encoder.stride) for encoder in encoders]  # type: ignore[arg-type]
        if len(strides) < 2 or any(coarse % fine for coarse, fine in itertools.pairwise(strides)):
            raise ValueError(f"encoders: must be at least 2, with strides that divide those before, got {strides}")
        self.encoders = nn.ModuleList(encoders)
        self.ndim, self.stride = int(getattr(encoders[0], "ndim", 2)), strides[0]

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        return {scale: encoder(x) for scale, encoder in enumerate(self.encoders)}


class JukeboxBottleneck(IndexGrids):
    """A quantizer for each scale, of which none depends on another.

    The loss is the mean of those of the quantizers, as a reconstruction loss is a mean over scales.

    Args:
        dim: dimension D of the features and of the codes of every scale.
        quantizers: any bottlenecks with indices, from coarse to fine, all with the same codebook size.
        grids: shapes of the features of a whole signal at each scale, from coarse to fine.

    Shapes: {scale: (B, D, *grid)} -> ({scale: codes (B, D, *grid)}, indices (B, T), loss ()), where T counts the
    indices of all scales. Features may be those of a part of a signal, in training.

    Raises:
        ValueError: there are fewer than two quantizers.
        TypeError: a quantizer without indices, or with another number of codes than the others.
    """

    decodes_leading = True

    def forward(self, x: Mapping[int, Tensor], accumulate: bool = False) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """Quantize features; `accumulate` as in `VQVAE.forward`."""
        codes, indices, losses = {}, [], []
        for scale, own in enumerate(self.adapters):
            codes[scale], chosen, loss = own.quantize(x[scale], accumulate=accumulate)
            indices.append(chosen.flatten(1))
            losses.append(loss)
        return codes, torch.cat(indices, 1), torch.stack(losses).mean()

    def get_output_from_indices(self, indices: Tensor) -> dict[int, Tensor]:
        """Return {scale: codes (B, D, *grid)} of the finest scale among indices (B, T) of the leading ones."""
        ends = self.adapter.leading
        if indices.dim() != 2 or indices.shape[1] not in ends:
            self.split(indices)  # says what they may be
        scale = ends.index(indices.shape[1])
        own, shape = self.adapters[scale], self.index_shapes[scale]
        return {scale: own.codes(indices[:, self.leading(scale) :].unflatten(1, shape), len(self.grids[scale]))}


class JukeboxDecoder(nn.Module):
    """Decoders of one signal, from the coarsest scale to the finest.

    Args:
        decoders: modules from (B, D, *grid) to (B, C, *size), in the order of the encoders.

    Shapes: {scale: (B, D, *grid of the scale)} -> (S B, C, *size), the S scales that are given one after the other.
    """

    def __init__(self, decoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)

    def forward(self, codes: Mapping[int, Tensor]) -> Tensor:
        return torch.cat([self.decoders[scale](own) for scale, own in codes.items()])

    @property
    def last_weight(self) -> Any:
        """Weight of the last layer of the finest decoder, whose gradients scale an adversarial loss."""
        return self.decoders[-1].last_weight
