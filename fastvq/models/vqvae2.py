"""VQ-VAE-2: quantizers at several grids, each finer one conditioned on the codes of the coarser ones.

A `VQVAE` with this bottleneck is a VQ-VAE-2. Its indices are one sequence, the coarsest grid first, so that files,
priors and samples treat them like any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.parts.arguments import check_fractions, check_sizes

from .conv import Decoder, Encoder
from .index_grids import IndexGrids


class GridsBottleneck(IndexGrids):
    """Bottleneck of a VQ-VAE-2: one quantizer for each grid, from the coarsest to the finest.

        f_L = z,   f_l = encoder_l(f_{l+1})                        features, from fine to coarse
        u_l = decoder_l(m_{l-1}),   q_l = quantizer_l(f_l - u_l),   m_l = q_l + u_l

    The coarsest grid has u = 0; the decoder of the VQ-VAE gets m_L. The loss is the sum of those of the quantizers.

    Difference and sum take the place of the paper's convolutions of (f, u) and (q, u), which let the decoder ignore the
    coarse codes. The straight-through estimator passes the gradient of m_L to f_L alone, so that u learns from the
    losses of the finer quantizers: it predicts the features as well as the coarse codes allow.

    Args:
        dim: dimension D of the features and of the codes of every grid.
        quantizers: any bottlenecks with indices, from coarse to fine, all with the same codebook size.
        grid: shape of the finest grid. Each coarser one has half as many positions along every axis.
        width, residual_width, groups: of the encoders and decoders between grids, see `Encoder`.
        encoder_blocks, decoder_blocks: number of their residual blocks.
        coarse_share: in training, the share of samples whose finest q is left out, so that the coarser grids alone
            give a picture as well; costs PSNR.

    Shapes: x (B, D, *grid) -> (codes (B, D, *grid), indices (B, T), loss ()), where T counts the indices of all grids.

    Raises:
        ValueError: an invalid argument, by name; x of another grid.
        TypeError: a quantizer without indices, or with another number of codes than the others.

    Source: Razavi, van den Oord, Vinyals, Generating Diverse High-Fidelity Images with VQ-VAE-2, 2019, section 3.1.
    """

    def __init__(
        self,
        dim: int,
        quantizers: Sequence[nn.Module],
        grid: tuple[int, ...],
        *,
        width: int = 128,
        residual_width: int = 32,
        encoder_blocks: int = 2,
        decoder_blocks: int = 2,
        groups: int = 0,
        coarse_share: float = 0.0,
    ) -> None:
        check_sizes(dim=dim)
        check_fractions(coarse_share=coarse_share)
        super().__init__(dim, quantizers, halved_grids(grid, max(1, len(quantizers))))
        self.coarse_share = coarse_share
        ndim, finer = len(grid), len(quantizers) - 1
        shared: dict[str, Any] = {"width": width, "residual_width": residual_width, "ndim": ndim, "groups": groups}
        self.encoders = nn.ModuleList(
            [Encoder(dim, dim, downsamples=1, residual_blocks=encoder_blocks, **shared) for _ in range(finer)]
        )
        self.decoders = nn.ModuleList(
            [Decoder(dim, dim, upsamples=1, residual_blocks=decoder_blocks, **shared) for _ in range(finer)]
        )

    def forward(self, x: Tensor, accumulate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize features; `accumulate` as in `VQVAE.forward`."""
        if x.shape[2:] != self.grids[-1]:
            raise ValueError(
                f"x: must have the grid {'x'.join(map(str, self.grids[-1]))} that the bottleneck was built for, got"
                f" {'x'.join(map(str, x.shape[2:]))}"
            )
        features = [x]
        for encoder in self.encoders:
            features.insert(0, encoder(features[0]))
        indices, losses = [], []

        def quantized(place: int, above: Tensor | None) -> Tensor:
            own = features[place] if above is None else features[place] - above
            codes, chosen, loss = self.adapters[place].quantize(own, accumulate=accumulate)
            indices.append(chosen.flatten(1))
            losses.append(loss)
            if self.training and place == len(features) - 1 and self.coarse_share:
                left_out = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < self.coarse_share
                codes = codes.masked_fill(left_out, 0)
            return codes

        return self._merged(quantized), torch.cat(indices, 1), torch.stack(losses).sum()

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Return the codes (B, D, *grid) of indices (B, T)."""
        parts, ndim = self.split(indices), len(self.grids[-1])
        return self._merged(lambda place, _: self.adapters[place].codes(parts[place], ndim))

    def _merged(self, codes_at: Callable[[int, Tensor | None], Tensor]) -> Tensor:
        """Return m of the finest grid, for codes by the number of a grid and the features from above."""
        merged = codes_at(0, None)
        for place, decoder in enumerate(self.decoders, start=1):
            above = decoder(merged)
            merged = codes_at(place, above) + above
        return merged


def halved_grids(grid: tuple[int, ...], count: int) -> tuple[tuple[int, ...], ...]:
    """Return `count` grids from the coarsest to `grid`, each with half as many positions along every axis as the next.

    Raises:
        ValueError: an axis cannot be halved as often.
    """
    factor = 2 ** (count - 1)
    if any(length % factor for length in grid):
        raise ValueError(
            f"grids: {count} need a finest grid whose sides are multiples of {factor}, got {'x'.join(map(str, grid))}"
        )
    return tuple(tuple(length >> halvings for length in grid) for halvings in reversed(range(count)))
