"""VQ-VAE: an encoder, a bottleneck that maps features to indices, and a decoder."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class VQVAEOutput(NamedTuple):
    """Result of a forward pass: the reconstruction of x, the indices (B, *grid) and the bottleneck's loss ()."""

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor


class Bottleneck(Protocol):
    """Module between encoder and decoder that maps vectors to indices and back.

    Called with (B, N, D), one vector for each grid position, it returns `(codes (B, N, D), indices (B, N) or (B, N, Q),
    loss ())`; `get_output_from_indices(indices)` returns the codes. All quantizers of fastvq with `channel_last=True`,
    their default, are bottlenecks.
    """

    training: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def get_output_from_indices(self, indices: Tensor) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...


class NoBottleneck(nn.Module):
    """Bottleneck that passes the features through unchanged, like a quantizer without stages.

    A VQVAE with this bottleneck is a plain autoencoder: its error is that of the two networks alone, a lower bound for
    every quantizer in its place.

    Shapes: x (B, N, D) -> (x, indices (B, N, 0), zero loss).
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = torch.empty(*x.shape[:-1], 0, dtype=torch.int64, device=x.device)
        return x, indices, x.new_zeros(())

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        raise RuntimeError("a VQVAE without a bottleneck has no codes to decode from: call forward")


class VQVAE(nn.Module):
    """Compress a signal to a grid of integers and reconstruct it.

        z = encoder(x);  codes, indices, loss = bottleneck(z);  reconstruction = decoder(codes)

    Args:
        encoder: (B, C, *size) -> (B, D, *grid), for example `fastvq.models.Encoder`.
        bottleneck: for example `fastvq.VectorQuantize` or `NoBottleneck`.
        decoder: (B, D, *grid) -> (B, C, *size).

    Source: van den Oord, Vinyals, Kavukcuoglu 2017, Neural Discrete Representation Learning, section 3.
    """

    bottleneck: Bottleneck

    def __init__(self, encoder: nn.Module, bottleneck: Bottleneck, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.bottleneck = bottleneck
        self.decoder = decoder

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Reconstruct x (B, C, *size); in training mode the bottleneck also learns its codebook."""
        z = self.encoder(x)
        grid = z.shape[2:]
        codes, indices, loss = self.bottleneck(z.flatten(2).transpose(1, 2))
        codes = codes.transpose(1, 2).unflatten(2, grid)
        return VQVAEOutput(self.decoder(codes), indices.unflatten(1, grid), loss)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the indices (B, *grid), int64, of x (B, C, *size). Nothing learns, whatever the mode."""
        training = self.bottleneck.training
        self.bottleneck.train(False)
        try:
            z = self.encoder(x)
            _, indices, _ = self.bottleneck(z.flatten(2).transpose(1, 2))
        finally:
            self.bottleneck.train(training)
        return indices.unflatten(1, z.shape[2:])

    def decode(self, indices: Tensor) -> Tensor:
        """Return the signal (B, C, *size) of indices (B, *grid), as `encode` returns them.

        Indices (B, *grid, Q) of a residual quantizer with Q stages decode the same way.
        """
        ndim = getattr(self.encoder, "ndim", 2)
        grid = indices.shape[1 : 1 + ndim]
        codes = self.bottleneck.get_output_from_indices(indices.flatten(1, ndim))
        return self.decoder(codes.transpose(1, 2).unflatten(2, grid))
