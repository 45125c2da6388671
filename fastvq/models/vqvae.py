"""VQ-VAE: an encoder, a bottleneck that maps features to indices, and a decoder."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastvq.parts.arguments import check_sizes

from .adapters import Adapter, adapter_of


class VQVAEOutput(NamedTuple):
    """Result of a forward pass: the reconstruction of x, the indices (B, *grid) and the bottleneck's loss ().

    Separate autoencoders at several scales have a reconstruction each, one after the other (`fastvq.models.jukebox`).
    """

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor


class Bottleneck(Protocol):
    """Module between encoder and decoder that maps vectors to indices and back.

    Called with (B, N, D), one vector for each grid position, it returns `(codes (B, N, D), indices (B, N) or (B, N, Q),
    loss ())`; `get_output_from_indices(indices)` returns the codes. The quantizers of fastvq in their default layout
    are bottlenecks as well, whatever they return (`fastvq.models.adapters`), but for those that `UNSUITABLE` lists
    there; `HierarchicalVQ` needs the number of spatial axes of the grid.
    """

    training: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def get_output_from_indices(self, indices: Tensor) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...


class Continuous(nn.Module):
    """Base class of bottlenecks without indices: codes (B, N, D) of real numbers, indices (B, N, 0)."""

    def latents(self, x: Tensor) -> Tensor:
        """Return the numbers (..., latent_dim) that stand for features (..., D) in eval mode."""
        raise NotImplementedError

    def no_indices(self, x: Tensor) -> Tensor:
        """Return the indices (B, N, 0) of features x (B, N, D)."""
        return torch.empty(*x.shape[:-1], 0, dtype=torch.int64, device=x.device)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Raise a RuntimeError: there is nothing to decode from."""
        raise RuntimeError(f"a VQVAE with a {type(self).__name__} has no codes to decode from: call forward")


class NoBottleneck(Continuous):
    """Bottleneck that quantizes nothing: that of a plain autoencoder.

    Its error is that of the two networks alone, a lower bound for every quantizer in its place. Without a `latent_dim`
    it passes the features through unchanged and has no parameters.

    Args:
        dim: dimension of the features, for a `latent_dim`.
        latent_dim: dimension to which linear maps reduce the features, and from which they restore them.

    Shapes: x (B, N, D) -> (codes (B, N, D), indices (B, N, 0), zero loss).
    """

    def __init__(self, dim: int | None = None, *, latent_dim: int | None = None) -> None:
        super().__init__()
        if latent_dim is not None:
            check_sizes(dim=dim, latent_dim=latent_dim)
            assert dim is not None
            self.project_in, self.project_out = nn.Linear(dim, latent_dim), nn.Linear(latent_dim, dim)
        self.latent_dim = latent_dim

    def latents(self, x: Tensor) -> Tensor:
        """Return the latents (..., latent_dim) of features (..., D)."""
        return x if self.latent_dim is None else self.project_in(x)

    def features(self, latents: Tensor) -> Tensor:
        """Return the features (..., D) that the decoder gets for latents (..., latent_dim)."""
        return latents if self.latent_dim is None else self.project_out(latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.features(self.latents(x)), self.no_indices(x), x.new_zeros(())


class VQVAE(nn.Module):
    """Compress a signal to a grid of integers and reconstruct it.

        z = encoder(x);  codes, indices, loss = bottleneck(z);  reconstruction = decoder(codes)

    Args:
        encoder: (B, C, *size) -> (B, D, *grid), for example `fastvq.models.Encoder`.
        bottleneck: for example `fastvq.VectorQuantize` or `NoBottleneck`.
        decoder: (B, D, *grid) -> (B, C, *size).
        value_range: lowest and highest value of a signal, which `restore` keeps to.

    Source: van den Oord, Vinyals, Kavukcuoglu 2017, Neural Discrete Representation Learning, section 3.
    """

    bottleneck: Bottleneck

    def __init__(
        self,
        encoder: nn.Module,
        bottleneck: Bottleneck,
        decoder: nn.Module,
        *,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.bottleneck = bottleneck
        self.decoder = decoder
        self.value_range = value_range

    @property
    def adapter(self) -> Adapter:
        """The form in which the bottleneck is called."""
        return adapter_of(self.bottleneck)

    @property
    def codebook_size(self) -> int | tuple[int, ...]:
        """K, or the sizes of the codebooks along the last axis of the indices.

        Raises:
            TypeError: the bottleneck has no indices, or does not say how many codes it has.
        """
        return self.adapter.codebook_size

    def forward(self, x: Tensor, accumulate: bool = False) -> VQVAEOutput:
        """Reconstruct x (B, C, *size); in training mode the bottleneck also learns its codebook.

        Args:
            x: the signals.
            accumulate: `VectorQuantize` keeps the statistics of x for its next learning step, in which a later call
                without this flag learns from both; other bottlenecks learn at once.
        """
        codes, indices, loss = self.adapter.quantize(self.encoder(x), accumulate=accumulate)
        return VQVAEOutput(self.decoder(codes), indices, loss)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the indices of x (B, C, *size), int64. Nothing learns, whatever the mode.

        They are (B, *grid), or (B, *grid, Q) for a bottleneck with several indices for each vector: stages, heads or
        groups; those of all scales of a `HierarchicalVQ` are (B, T).
        """
        training = self.bottleneck.training
        self.bottleneck.train(False)
        try:
            _, indices, _ = self.adapter.quantize(self.encoder(x))
        finally:
            self.bottleneck.train(training)
        return indices.long()

    def decode(self, indices: Tensor) -> Tensor:
        """Return the signal (B, C, *size) of indices as `encode` returns them."""
        return self.decoder(self.adapter.codes(indices, getattr(self.encoder, "ndim", 2)))

    def restore(self, indices: Tensor) -> Tensor:
        """Return `decode(indices)` as float32, clamped to the range of a signal."""
        return self.decode(indices).float().clamp(*self.value_range)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return x as it is restored from its indices, or without indices from its features. Nothing learns."""
        if not isinstance(self.bottleneck, Continuous):
            return self.restore(self.encode(x))
        training = self.bottleneck.training
        self.bottleneck.train(False)
        try:
            return self(x).reconstruction.float().clamp(*self.value_range)
        finally:
            self.bottleneck.train(training)

    @property
    def strides(self) -> tuple[int, ...]:
        """The number of values of a signal for each position of the grid, along each of its axes."""
        encoder: Any = self.encoder
        if hasattr(encoder, "strides"):
            return tuple(encoder.strides)
        return (int(getattr(encoder, "stride", 1)),) * int(getattr(encoder, "ndim", 2))

    @property
    def first(self) -> tuple[int, ...]:
        """Number of values along each axis that have a position of their own, before those that share one."""
        encoder: Any = self.encoder
        return tuple(getattr(encoder, "first", (0,) * len(self.strides)))
