"""Encoder and decoder of audio over the coefficients of short blocks: most layers run at the rate of the indices.

    waveform -- lapped transform --> Compand --> blocks --> features
    features --> blocks --> gains --> Expand -- inverse transform --> waveform

Both begin as a codec without learning: a modified discrete cosine transform, of which the features are the lowest
coefficients, companded. From there, transforms and residual blocks learn. Blocks overlap by half of their length, so
that decoded samples are this much later than their indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio import (
    CausalBlock1d,
    CausalConv1d,
    CausalDecoder,
    CausalEncoder,
    CausalUpsample1d,
    Past,
    check_sizes,
    nonlinearity,
)

_MU = 1000.0
"""Levels below -60 dB are nearly linear, those above nearly logarithmic."""
_LEAST = 1e-12
_POWER = 0.75
"""The exponent of AAC; 1 keeps waveforms better, 1/2 has less noise between tones."""
_LINEAR = 1e-4
_GAIN_SCALE = 8.0
"""Nats for each unit of what a gain's layers give, so that a few hundred steps of training reach -60 dB."""
_LARGEST_GAIN = 0.5
"""Natural logarithm, 4 dB: gains are there to soften, and sounds unlike the training data must not grow."""
_FIRST_GAIN = 0.003
"""Norm of the rows of the last weight of a block and of gains before training: both begin near the identity."""
_FIRST_NOISE = 1e-5


class Compand(nn.Module):
    """Narrow the range of levels of vectors, and that of the coefficients within each.

    A vector x of root mean square r becomes  F(r) w / rms(w)  with

        F(r) = ln(1 + mu r) / ln(1 + mu),   mu = 1000
        w = sign(x) (|x| / r)^(3/4)     for each coefficient

    so that noise which is added here is softer where the vector is soft, and beside a strong coefficient.

    Shapes: (B, C, T) -> (B, C, T), vectors along C.

    Source: ITU-T Recommendation G.711, Pulse Code Modulation of Voice Frequencies, for the law of the levels; Bosi et
    al., ISO/IEC MPEG-2 Advanced Audio Coding, 1997, for a power law of the coefficients.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # in which `_LEAST` is zero
            return self(x.float()).half()
        level = _root_mean_square(x)
        relative = x / level
        # Nearly linear below -40 dB, as the slope of a root is infinite at zero.
        narrow = relative * (relative.square() + _LINEAR).pow((_POWER - 1) / 2)
        return narrow * ((_MU * level).log1p() / (math.log1p(_MU) * _root_mean_square(narrow)))


class Expand(nn.Module):
    """Inverse of `Compand`; levels above 1 are expanded to 1.

    Shapes: (B, C, T) -> (B, C, T).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            return self(x.float()).half()
        narrow = _root_mean_square(x)
        level = (math.log1p(_MU) * narrow.clamp_max(1)).expm1() / _MU
        relative = x / narrow
        wide = relative * (relative.square() + _LEAST).pow((1 / _POWER - 1) / 2)
        return wide * (level / _root_mean_square(wide))


class CausalGain1d(nn.Module):
    """`x exp(8 conv_1(f(conv(f(x)))))`: each channel is made softer or louder, where the others and the past say so.

    A sum cannot silence the noise of quantization in channels that should be soft; a product can.

    Args:
        width: channels of input and output.
        hidden: channels between the two convolutions.
        kernel: width of the first convolution.
        activation: f, one of `fastvq.models.audio.ACTIVATIONS`.

    Shapes: (B, width, T) -> (B, width, T).
    """

    def __init__(self, width: int, hidden: int, *, kernel: int, activation: str) -> None:
        super().__init__()
        self.first = nonlinearity(activation, width)
        self.conv = CausalConv1d(width, hidden, kernel)
        self.second = nonlinearity(activation, hidden)
        self.out = CausalConv1d(hidden, width, 1)
        nn.init.constant_(self.out.magnitude, _FIRST_GAIN / _GAIN_SCALE)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        hidden = self.conv(self.first(x), past)
        return x * (_GAIN_SCALE * self.out(self.second(hidden), past)).clamp_max(_LARGEST_GAIN).exp()


def _root_mean_square(x: Tensor) -> Tensor:
    return (x.square().mean(1, keepdim=True) + _LEAST).sqrt()


class TransformEncoder(CausalEncoder):
    """Map a waveform to one feature vector for each block of `stride` samples.

    Before training, with `dim` of `in_channels * stride` or more, encoder and decoder reproduce the waveform nearly.

    Args:
        in_channels: channels of the waveform, 1 for mono, 2 for stereo.
        dim: channels of the features, the D that the quantizer sees.
        strides: their product is the length of a block, which should be even.
        width: channels within the residual blocks.
        dilations: of the residual blocks, one for each.
        kernel: width of their first and of the last convolution, in blocks.
        activation: one of `fastvq.models.audio.ACTIVATIONS`.

    Shapes: (B, in_channels, T) -> (B, dim, T / stride).

    Raises:
        ValueError: an argument is out of range, or T is not a multiple of `stride`.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        strides: Sequence[int] = (128,),
        width: int = 256,
        dilations: Sequence[int] = (1, 2, 4),
        kernel: int = 3,
        activation: str = "elu",
    ) -> None:
        check_sizes(in_channels=in_channels, dim=dim, strides=strides, width=width, dilations=dilations, kernel=kernel)
        stride = math.prod(strides)
        inner = in_channels * stride
        transform = CausalConv1d(in_channels, inner, 2 * stride, stride=stride)
        transform.start_from_(_noisy(_of_channels(lapped_cosines(stride), in_channels)))
        last = CausalConv1d(inner, dim, kernel)
        last.start_from_(_noisy(_present(dim, inner, kernel)))
        blocks = _blocks(inner, width, dilations, kernel, activation)
        super().__init__(in_channels, stride, [transform, Compand(), *blocks, last])


class TransformDecoder(CausalDecoder):
    """Map code vectors back to a waveform: the mirror image of `TransformEncoder`.

    Args:
        dim: channels of the codes.
        out_channels: channels of the waveform.
        strides, width, dilations, kernel, activation: as in `TransformEncoder`.

    Shapes: (B, dim, N) -> (B, out_channels, N * stride).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        strides: Sequence[int] = (128,),
        width: int = 256,
        dilations: Sequence[int] = (1, 2, 4),
        kernel: int = 3,
        activation: str = "elu",
    ) -> None:
        check_sizes(
            out_channels=out_channels, dim=dim, strides=strides, width=width, dilations=dilations, kernel=kernel
        )
        stride = math.prod(strides)
        inner = out_channels * stride
        first = CausalConv1d(dim, inner, kernel)
        first.start_from_(_noisy(_present(inner, dim, kernel)))
        inverse = CausalUpsample1d(inner, out_channels, stride)
        overlap = overlap_of(stride)
        basis = _of_channels(lapped_cosines(stride), out_channels)[..., stride - overlap :]
        # What a block gives at once, and what it adds to the samples of the next one.
        halves = F.pad(basis, (0, stride - overlap)).unflatten(2, (2, stride))
        inverse.conv.start_from_(_noisy(halves.permute(1, 3, 0, 2).flatten(0, 1).flip(2)))
        blocks = _blocks(inner, width, dilations, kernel, activation)
        gain = CausalGain1d(inner, width, kernel=kernel, activation=activation)
        super().__init__(out_channels, stride, [first, *blocks, gain, Expand(), inverse], delay=overlap)


def overlap_of(length: int) -> int:
    """Return the number of samples that a block shares with the one before: half of its length, rounded to even."""
    return length // 4 * 2


def lapped_cosines(length: int) -> Tensor:
    """Return the modified discrete cosine transform with blocks of N samples, (N, 2 N), a row for each frequency.

        row_k(t) = w(t') sqrt(2 / N) cos(pi / N (t' + 1/2 + N/2) (k + 1/2)),   t' = t + (N - L) / 2

    A window w rises over the L samples that a block shares with the one before, as a sine, is 1, and falls over the
    last L samples. With the rows in their places, blocks add up to the signal.

    Source: Princen, Johnson, Bradley, Subband/Transform Coding Using Filter Bank Designs Based on Time Domain Aliasing
    Cancellation, 1987.
    """
    overlap = overlap_of(length)
    flat = (length - overlap) // 2
    time, frequency = torch.arange(2 * length, dtype=torch.float64), torch.arange(length, dtype=torch.float64)
    rise = (math.pi / 2 * (torch.arange(overlap, dtype=torch.float64) + 0.5) / max(1, overlap)).sin()
    zeros = torch.zeros(flat, dtype=torch.float64)
    ones = torch.ones(2 * length - 2 * flat - 2 * overlap, dtype=torch.float64)
    window = torch.cat([zeros, rise, ones, rise.flip(0), zeros])
    angles = math.pi / length * (frequency[:, None] + 0.5) * (time + 0.5 + length / 2)
    rows = window * math.sqrt(2 / length) * angles.cos()
    # The window ends with the present block.
    return F.pad(rows[:, : 2 * length - flat], (flat, 0)).float()


def _of_channels(rows: Tensor, channels: int) -> Tensor:
    """Return rows (N, 2 N) for each of several channels, (N channels, channels, 2 N), in the order of frequencies."""
    return torch.einsum("kt,cd->kcdt", rows, torch.eye(channels)).flatten(0, 1)


def _blocks(inner: int, width: int, dilations: Sequence[int], kernel: int, activation: str) -> list[CausalBlock1d]:
    blocks = [
        CausalBlock1d(inner, kernel=kernel, dilation=dilation, activation=activation, hidden=width)
        for dilation in dilations
    ]
    for block in blocks:
        nn.init.constant_(block.out.magnitude, _FIRST_GAIN)
    return blocks


def _present(out_channels: int, in_channels: int, kernel: int) -> Tensor:
    """Return the weight (out_channels, in_channels, kernel) that keeps the first channels of the present."""
    weight = torch.zeros(out_channels, in_channels, kernel)
    weight[:, :, -1] = torch.eye(out_channels, in_channels)
    return weight


def _noisy(weight: Tensor) -> Tensor:
    """Return a weight without rows of zeros, which have no direction."""
    return weight + _FIRST_NOISE * torch.randn_like(weight)
