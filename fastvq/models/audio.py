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
        """The weight, where it was computed once for many calls."""

    @property
    def weight(self) -> Tensor:
        """The weight (out_channels, in_channels, kernel)."""
        norm = self.direction.flatten(1).norm(dim=1)
        return self.direction * (self.magnitude / norm)[:, None, None]

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = F.pad(x, (self.look_back, 0)) if past is None else past.extend(x, self.look_back)
        weight = self.weight if self.folded is None else self.folded
        return F.conv1d(x, weight, self.bias, self.stride, 0, self.dilation)


def fold_weights_(network: nn.Module) -> None:
    """Compute the weights of all causal convolutions of a network once, for inference with weights that stay."""
    for module in network.modules():
        if isinstance(module, CausalConv1d):
            module.folded = module.weight.detach()


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
    """`x + conv_1(f(conv_dilated(f(x))))`, with half the channels between the two convolutions.

    Args:
        width: channels of input and output.
        kernel: width of the first convolution.
        dilation: of the first convolution.
        activation: f, one of `ACTIVATIONS`.

    Shapes: (B, width, T) -> (B, width, T).
    """

    def __init__(self, width: int, *, kernel: int = 3, dilation: int = 1, activation: str = "elu") -> None:
        super().__init__()
        hidden = max(1, width // 2)
        self.first = _activation(activation, width)
        self.dilated = CausalConv1d(width, hidden, kernel, dilation=dilation)
        self.second = _activation(activation, hidden)
        self.out = CausalConv1d(hidden, width, 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        hidden = self.dilated(self.first(x), past)
        return x + self.out(self.second(hidden), past)


class AudioEncoder(nn.Module):
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

    ndim = 1

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
        super().__init__()
        _check(in_channels=in_channels, dim=dim, strides=strides, width=width, dilations=dilations, kernel=kernel)
        self.in_channels = in_channels
        self.stride = math.prod(strides)
        layers: list[nn.Module] = [CausalConv1d(in_channels, width, kernel)]
        for stride in strides:
            layers += [CausalBlock1d(width, dilation=dilation, activation=activation) for dilation in dilations]
            layers += [_activation(activation, width), CausalConv1d(width, 2 * width, 2 * stride, stride=stride)]
            width *= 2
        layers += [_activation(activation, width), CausalConv1d(width, dim, kernel)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[1] != self.in_channels or x.shape[2] == 0 or x.shape[2] % self.stride:
            raise ValueError(
                f"the encoder takes (B, {self.in_channels}, T) with T a multiple of its stride {self.stride}; got x of"
                f" shape {tuple(x.shape)}: pad x first"
            )
        return _run(self.layers, x, past)


class AudioDecoder(nn.Module):
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

    ndim = 1

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
        super().__init__()
        _check(out_channels=out_channels, dim=dim, strides=strides, width=width, dilations=dilations, kernel=kernel)
        self.out_channels = out_channels
        self.stride = math.prod(strides)
        channels = width * 2 ** len(strides)
        layers: list[nn.Module] = [CausalConv1d(dim, channels, kernel)]
        for stride in reversed(strides):
            layers += [_activation(activation, channels), CausalUpsample1d(channels, channels // 2, stride)]
            channels //= 2
            layers += [CausalBlock1d(channels, dilation=dilation, activation=activation) for dilation in dilations]
        layers += [_activation(activation, channels), CausalConv1d(channels, out_channels, kernel)]
        self.layers = nn.ModuleList(layers)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, whose gradients scale an adversarial loss."""
        last: CausalConv1d = self.layers[-1]  # type: ignore[assignment]
        return last.direction

    def forward(self, codes: Tensor, past: Past | None = None) -> Tensor:
        return _run(self.layers, codes, past)


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


def _run(layers: nn.ModuleList, x: Tensor, past: Past | None) -> Tensor:
    if past is not None:
        past.begin()
    for layer in layers:
        x = layer(x, past) if isinstance(layer, CausalConv1d | CausalBlock1d | CausalUpsample1d) else layer(x)
    return x


def _activation(name: str, channels: int) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return nn.ELU() if name == "elu" else Snake(channels)


def _check(**arguments: int | Sequence[int]) -> None:
    for name, value in arguments.items():
        numbers = [value] if isinstance(value, int) else list(value)
        if not numbers or any(not isinstance(number, int) or number < 1 for number in numbers):
            kind = "at least 1" if isinstance(value, int) else "one or more numbers of at least 1"
            raise ValueError(f"{name}: must be {kind}, got {value}")
