"""Streams of audio through a VQ-VAE: chunks of any length to indices, and indices to chunks.

    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)
    for chunk in microphone:
        play(decoder(encoder(chunk)))
    play(decoder(encoder.flush()))
    play(decoder.flush())

The networks are those of `fastvq.models.audio`: an index depends on no sample after its own `stride`, so a stream has
the latency of one stride, and of the decoder's `delay` if it has one. The chunks of a stream have the indices of the
whole signal.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .adapters import Adapter
from .audio import CausalDecoder, CausalEncoder, Past, fold_weights_
from .vqvae import VQVAE, Continuous


class StreamingEncoder:
    """Encoder of signals that arrive in chunks.

    A batch of streams runs in step: every chunk has the same number of samples for each of them.

    Args:
        model: a VQ-VAE with a causal encoder, such as `AudioEncoder`. Its weights of now are taken; later changes
            have no effect.
        stages: number of leading codebooks whose indices are returned, of a bottleneck with several; all by default.

    Raises:
        TypeError: the model's encoder is not causal, or its bottleneck needs the whole signal or has no indices.
        ValueError: `stages` is out of range.
    """

    def __init__(self, model: VQVAE, *, stages: int | None = None) -> None:
        if not isinstance(model.encoder, CausalEncoder):
            raise TypeError(f"model: must have a causal encoder, got {type(model.encoder).__name__}")
        self._adapter = _adapter_of_copy(model)
        self._encoder = copy.deepcopy(model.encoder).eval()
        fold_weights_(self._encoder)
        sizes = self._adapter.codebook_size
        most = 1 if isinstance(sizes, int) else len(sizes)
        if stages is not None and not 1 <= stages <= most:
            raise ValueError(f"stages: must lie in [1, {most}], got {stages}")
        self._stages = None if isinstance(sizes, int) else stages
        self.reset()

    @property
    def stride(self) -> int:
        """Number of samples for each index."""
        return self._encoder.stride

    def reset(self) -> None:
        """Forget all samples: the next chunk begins new streams."""
        self._past = Past()
        self._rest: Tensor | None = None

    @torch.no_grad()
    def __call__(self, chunk: Tensor) -> Tensor:
        """Return the indices (B, N) or (B, N, Q) that the samples so far decide and that were not returned yet.

        Args:
            chunk: (B, C, T) for any T, also none; B is that of the first chunk.
        """
        first = self._rest is None
        if chunk.dim() != 3 or chunk.shape[1] != self._encoder.in_channels:
            raise ValueError(f"chunk: must have shape (B, {self._encoder.in_channels}, T), got {tuple(chunk.shape)}")
        if self._rest is not None and chunk.shape[0] != self._rest.shape[0]:
            raise ValueError(f"chunk: must have the {self._rest.shape[0]} streams of the first, got {chunk.shape[0]}")
        samples = chunk if first else torch.cat([self._rest, chunk], -1)  # type: ignore[list-item]
        whole = samples.shape[-1] // self.stride * self.stride
        self._rest = samples[..., whole:].clone()
        if not whole:
            return torch.empty(len(chunk), *self._adapter.index_shape((0,)), dtype=torch.int64)[..., : self._stages]
        _, indices, _ = self._adapter.quantize(self._encoder(samples[..., :whole], self._past))
        return indices.long() if self._stages is None else indices[..., : self._stages].long()

    def flush(self) -> Tensor:
        """Return the index of the samples that fill no stride yet, with zeros after them, if any; then reset."""
        rest = self._rest
        if rest is None:
            raise RuntimeError("flush: there is no stream: give a chunk first")
        padding = -rest.shape[-1] % self.stride
        indices = self(rest.new_zeros(*rest.shape[:-1], padding))
        self.reset()
        return indices


class StreamingDecoder:
    """Decoder of indices that arrive in chunks.

    Args:
        model: a VQ-VAE with a causal decoder, such as `AudioDecoder`. Its weights of now are taken; later changes
            have no effect.

    Raises:
        TypeError: as of `StreamingEncoder`.
    """

    def __init__(self, model: VQVAE) -> None:
        if not isinstance(model.decoder, CausalDecoder):
            raise TypeError(f"model: must have a causal decoder, got {type(model.decoder).__name__}")
        self._adapter = _adapter_of_copy(model)
        self._decoder = copy.deepcopy(model.decoder).eval()
        fold_weights_(self._decoder)
        self.reset()

    @property
    def stride(self) -> int:
        """Number of samples for each index."""
        return self._decoder.stride

    @property
    def delay(self) -> int:
        """Number of samples that a stream is behind its indices; `flush` gives the last ones."""
        return self._decoder.delay

    def reset(self) -> None:
        """Forget all indices: the next chunk begins new streams."""
        self._past = Past()
        self._begun = False

    @torch.no_grad()
    def __call__(self, indices: Tensor) -> Tensor:
        """Return the samples (B, C, N * stride) of indices (B, N) or (B, N, 1 to Q), which follow those before.

        The first call returns `delay` samples fewer.
        """
        if not indices.shape[1]:
            return torch.empty(len(indices), self._decoder.out_channels, 0)
        samples: Tensor = self._decoder(self._adapter.codes(indices, 1), self._past)
        first, self._begun = not self._begun, True
        return samples[..., self.delay :] if first else samples

    @torch.no_grad()
    def flush(self) -> Tensor:
        """Return the last `delay` samples (B, C, delay), then reset.

        Raises:
            RuntimeError: no indices were given.
        """
        if not self._begun:
            raise RuntimeError("flush: there is no stream: give indices first")
        samples: Tensor = self._decoder.rest(self._past)
        self.reset()
        return samples


def _adapter_of_copy(model: VQVAE) -> Adapter:
    """Return the adapter of a copy of the model's bottleneck, in eval mode.

    Raises:
        TypeError: the bottleneck needs the whole signal, or has no indices.
    """
    if isinstance(model.bottleneck, Continuous):
        raise TypeError("model: must have a bottleneck, whose indices are streamed")
    bottleneck = copy.deepcopy(model.bottleneck)
    bottleneck.train(False)
    adapter = VQVAE(model.encoder, bottleneck, model.decoder).adapter
    if adapter.scales is not None:
        raise TypeError(f"model: {type(bottleneck).__name__} quantizes a whole signal at once, not its chunks")
    return adapter
