"""Causal convolutional encoder and decoder for audio, whose output can be computed chunk by chunk.

    waveform -- AudioEncoder --> features, one for `stride` samples -- AudioDecoder --> waveform

An output depends on no later input: a feature on the samples up to the last of its own, a sample on the features up to
its own. Every layer that looks back is a `CausalConv1d`. It takes what it looks back to either from zeros before the
signal, or from a `Past`, which holds the end of the chunk before; see `fastvq.models.streaming`.

Source: SEANet as in Défossez et al., High Fidelity Neural Audio Compression (EnCodec), 2022, section 3.1; Snake and the
choice of dilations as in Kumar et al., High-Fidelity Audio Compression with Improved RVQGAN (DAC), 2023, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = ("elu", "snake")


class Past:
    """The ends of the inputs of all causal layers of one network, from the chunks that it has seen so far.

    A forward pass calls `extend` once for every layer, always in the same order.
    """

    def __init__(self) -> None:
        self._ends: list[Tensor] = []
        self._next = 0

    def begin(self) -> Past:
        """Start with the first layer again, for the next chunk; return self."""
        self._next = 0
        return self

    def end(self) -> Tensor:
        """Return what the last layer looks back to, and make it the next one."""
        self._next = len(self._ends) - 1
        return self._ends[-1]

    def extend(self, x: Tensor, length: int) -> Tensor:
        """Return x (B, C, T) with the last `length` inputs of the layer before it, zeros before the first chunk."""
        if self._next == len(self._ends):
            self._ends.append(x.new_zeros(*x.shape[:-1], length))
        extended = torch.cat([self._ends[self._next], x], -1)
        self._ends[self._next] = extended[..., extended.shape[-1] - length :].clone()
        self._next += 1
        return extended


class CausalConv1d(nn.Module):
    """Weight-normalized convolution of the present and the past.

        y_t = bias + sum_j weight_j x_{stride (t + 1) - 1 - dilation (kernel - 1 - j)},
        weight = magnitude direction / |direction|     for each output channel

    Args:
        in_channels, out_channels: channels of input and output.
        kernel: width, at least `stride`.
        stride: samples of the input for each output.
        dilation: distance of the inputs of an output; 1 if the stride is not.

    Shapes: (B, in_channels, T) -> (B, out_channels, T / stride), for T a multiple of the stride.

    Source: Salimans and Kingma, Weight Normalization, 2016, equation 2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.look_back = dilation * (kernel - 1) - (stride - 1)
        direction = torch.empty(out_channels, in_channels, kernel)
        # Signals keep their size from layer to layer: soft ones would otherwise drown in the biases.
        nn.init.normal_(direction, std=1 / math.sqrt(in_channels * kernel))
        self.direction = nn.Parameter(direction)
        self.magnitude = nn.Parameter(direction.detach().flatten(1).norm(dim=1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.folded: Tensor | None = None
        """The weight, where it was computed once for many calls; (out_channels, kernel in_channels, 1) if dilated."""

    @property
    def weight(self) -> Tensor:
        """The weight (out_channels, in_channels, kernel)."""
        norm = self.direction.flatten(1).norm(dim=1)
        return self.direction * (self.magnitude / norm)[:, None, None]

    @torch.no_grad()
    def start_from_(self, weight: Tensor) -> None:
        """Set the weight (out_channels, in_channels, kernel)."""
        self.direction.copy_(weight)
        self.magnitude.copy_(weight.flatten(1).norm(dim=1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = F.pad(x, (self.look_back, 0)) if past is None else past.extend(x, self.look_back)
        if self.folded is None:
            return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation)
        if self.dilation > 1:
            # Of a short chunk, torch's dilated convolution copies element by element: one product takes a quarter.
            length = x.shape[-1] - self.look_back
            x = torch.cat([x[..., start : start + length] for start in range(0, self.look_back + 1, self.dilation)], 1)
        return F.conv1d(x, self.folded, self.bias, self.stride)


def fold_weights_(network: nn.Module) -> None:
    """Compute the weights of all causal convolutions of a network once, for inference with weights that stay."""
    for module in network.modules():
        if isinstance(module, CausalConv1d):
            weight = module.weight.detach()
            module.folded = weight.transpose(1, 2).flatten(1)[..., None] if module.dilation > 1 else weight


class Snake(nn.Module):
    """`x + sin(alpha x)^2 / alpha` with a learned alpha for each channel, a nonlinearity for periodic signals.

    Shapes: (B, channels, T) -> (B, channels, T).

    Source: Ziyin, Hartwig, Ueda, Neural Networks Fail to Learn Periodic Functions and How to Fix It, 2020.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


class CausalBlock1d(nn.Module):
    """`x + conv_1(f(conv_dilated(f(x))))`, with other channels between the two convolutions.

    Args:
        width: channels of input and output.
        kernel: width of the first convolution.
        dilation: of the first convolution.
        activation: f, one of `ACTIVATIONS`.
        hidden: channels between the two convolutions, half of `width` by default.

    Shapes: (B, width, T) -> (B, width, T).
    """

    def __init__(
        self, width: int, *, kernel: int = 3, dilation: int = 1, activation: str = "elu", hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = hidden or max(1, width // 2)
        self.first = nonlinearity(activation, width)
        self.dilated = CausalConv1d(width, hidden, kernel, dilation=dilation)
        self.second = nonlinearity(activation, hidden)
        self.out = CausalConv1d(hidden, width, 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        hidden = self.dilated(self.first(x), past)
        return x + self.out(self.second(hidden), past)


class CausalEncoder(nn.Module):
    """Encoder of audio by layers in a row, of which an output depends on no later sample.

    Args:
        in_channels: channels of the waveform.
        stride: samples for each feature.
        layers: modules from (B, in_channels, T) to (B, D, T / stride).

    Shapes: (B, in_channels, T) -> (B, D, T / stride).

    Raises:
        ValueError: T is not a multiple of `stride`.
    """

    ndim = 1

    def __init__(self, in_channels: int, stride: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.in_channels, self.stride = in_channels, stride
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[1] != self.in_channels or x.shape[2] == 0 or x.shape[2] % self.stride:
            raise ValueError(
                f"the encoder takes (B, {self.in_channels}, T) with T a multiple of its stride {self.stride}; got x of"
                f" shape {tuple(x.shape)}: pad x first"
            )
        return _run(self.layers, x, past)


class CausalDecoder(nn.Module):
    """Decoder of audio by layers in a row, of which a sample depends on no later code.

    With a delay, a sample depends on the codes of the next `delay` samples as well: the layers give it that much later.
    Without a `past`, the samples of the whole signal are returned in their places.

    Args:
        out_channels: channels of the waveform.
        stride: samples for each code.
        layers: modules from (B, D, N) to (B, out_channels, N * stride).
        delay: in samples, less than `stride`; then the last layer is a `CausalUpsample1d`.

    Shapes: (B, D, N) -> (B, out_channels, N * stride).
    """

    ndim = 1

    def __init__(self, out_channels: int, stride: int, layers: Sequence[nn.Module], *, delay: int = 0) -> None:
        super().__init__()
        self.out_channels, self.stride, self.delay = out_channels, stride, delay
        self.layers = nn.ModuleList(layers)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, whose gradients scale an adversarial loss."""
        last: Any = self.layers[-1]
        return (last.conv if isinstance(last, CausalUpsample1d) else last).direction

    def forward(self, codes: Tensor, past: Past | None = None) -> Tensor:
        if past is not None or not self.delay:
            return _run(self.layers, codes, past)
        hidden = _run(self.layers[:-1], codes, None)
        samples = self.layers[-1](F.pad(hidden, (0, 1)))
        return samples[..., self.delay : self.delay + codes.shape[-1] * self.stride]

    def rest(self, past: Past) -> Tensor:
        """Return the last `delay` samples (B, out_channels, delay) of a signal whose codes have all been decoded."""
        end = past.end()
        if not self.delay:
            return end.new_empty(len(end), self.out_channels, 0)
        return self.layers[-1](torch.zeros_like(end[..., :1]), past)[..., : self.delay]


class AudioEncoder(CausalEncoder):
    """Map a waveform to one feature vector for every `stride` samples.

    A convolution is followed, for each of the strides, by residual blocks of growing dilation and a strided convolution
    twice as wide as its stride, which doubles the channels; a last convolution gives the features.

    Args:
        in_channels: channels of the waveform, 1 for mono, 2 for stereo.
        dim: channels of the features, the D that the quantizer sees.
        strides: of the strided convolutions, from the finest rate to the coarsest.
        width: channels before the first strided convolution.
        dilations: of the residual blocks at each rate, one block for each.
        kernel: width of the first and the last convolution.
        activation: one of `ACTIVATIONS`.

    Shapes: (B, in_channels, T) -> (B, dim, T / stride), with `stride` the product of the strides.

    Raises:
        ValueError: an argument is out of range, or T is not a multiple of `stride`.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        strides: Sequence[int] = (2, 4, 5, 8),
        width: int = 32,
        dilations: Sequence[int] = (1,),
        kernel: int = 7,
        activation: str = "elu",
    ) -> None:
        check_sizes(in_channels=in_channels, dim=dim, strides=strides, width=width, dilations=dilations, kernel=kernel)
        layers: list[nn.Module] = [CausalConv1d(in_channels, width, kernel)]
        for stride in strides:
            layers += [CausalBlock1d(width, dilation=dilation, activation=activation) for dilation in dilations]
            layers += [nonlinearity(activation, width), CausalConv1d(width, 2 * width, 2 * stride, stride=stride)]
            width *= 2
        layers += [nonlinearity(activation, width), CausalConv1d(width, dim, kernel)]
        super().__init__(in_channels, math.prod(strides), layers)


class AudioDecoder(CausalDecoder):
    """Map code vectors back to a waveform: the mirror image of `AudioEncoder`.

    A transposed convolution twice as wide as its stride s sums, for each output, the products of two inputs. It is
    computed as that: a convolution of width 2 with s times the channels, whose results are put one after the other.

    Args:
        dim: channels of the codes.
        out_channels: channels of the waveform.
        strides: those of the encoder, in its order.
        width, dilations, kernel, activation: as in `AudioEncoder`.

    Shapes: (B, dim, N) -> (B, out_channels, N * stride).

    Raises:
        ValueError: an argument is out of range.

    Source of the interleaved convolution: Shi et al., Real-Time Single Image and Video Super-Resolution, 2016.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        strides: Sequence[int] = (2, 4, 5, 8),
        width: int = 32,
        dilations: Sequence[int] = (1,),
        kernel: int = 7,
        activation: str = "elu",
    ) -> None:
        check_sizes(
            out_channels=out_channels, dim=dim, strides=strides, width=width, dilations=dilations, kernel=kernel
        )
        channels = width * 2 ** len(strides)
        layers: list[nn.Module] = [CausalConv1d(dim, channels, kernel)]
        for stride in reversed(strides):
            layers += [nonlinearity(activation, channels), CausalUpsample1d(channels, channels // 2, stride)]
            channels //= 2
            layers += [CausalBlock1d(channels, dilation=dilation, activation=activation) for dilation in dilations]
        layers += [nonlinearity(activation, channels), CausalConv1d(channels, out_channels, kernel)]
        super().__init__(out_channels, math.prod(strides), layers)


class CausalUpsample1d(nn.Module):
    """Transposed convolution as wide as two strides.

    Shapes: (B, in_channels, N) -> (B, out_channels, N * stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalConv1d(in_channels, out_channels * stride, 2)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        phases = self.conv(x, past).unflatten(1, (-1, self.stride))  # [B, C, stride, N]
        return phases.transpose(2, 3).flatten(2)


def _run(layers: Any, x: Tensor, past: Past | None) -> Tensor:
    if past is not None:
        past.begin()
    for layer in layers:
        looks_back = any(isinstance(part, CausalConv1d) for part in layer.modules())
        x = layer(x, past) if looks_back else layer(x)
    return x


def nonlinearity(name: str, channels: int) -> nn.Module:
    """Return one of `ACTIVATIONS` by its name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return nn.ELU() if name == "elu" else Snake(channels)


def check_sizes(**arguments: int | Sequence[int]) -> None:
    """Raise a ValueError that names the argument which is below 1, or is no number of at least 1."""
    for name, value in arguments.items():
        numbers = [value] if isinstance(value, int) else list(value)
        if not numbers or any(not isinstance(number, int) or number < 1 for number in numbers):
            kind = "at least 1" if isinstance(value, int) else "one or more numbers of at least 1"
            raise ValueError(f"{name}: must be {kind}, got {value}")
