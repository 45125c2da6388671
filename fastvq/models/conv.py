"""Strided convolutional encoder and decoder for signals, images and volumes.

The network of van den Oord et al. 2017 (Neural Discrete Representation Learning, section 4.1), as DeepMind's Sonnet
implements it in nets/vqvae.py: strided 4-wide convolutions halve the grid, residual blocks follow at the coarsest grid,
and the decoder is the mirror image. `ndim` selects 1-D, 2-D or 3-D convolutions; nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def check_positive(**sizes: int) -> None:
    """Raise a ValueError that names a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_ndim(ndim: int) -> None:
    if ndim not in _CONV:
        raise ValueError(f"ndim must be 1, 2 or 3, got {ndim}")


def stage_widths(width: int, downsamples: int, multipliers: Sequence[int] | None = None) -> list[int]:
    """Return the channels at each grid, from the finest to the coarsest, which has `width`.

    By default each finer grid has half as many; `multipliers` gives other proportions.

    Raises:
        ValueError: there are not as many multipliers as grids, or one is below 1.
    """
    if multipliers is None:
        return [max(1, width >> (downsamples - 1 - stage)) for stage in range(downsamples)]
    if len(multipliers) != downsamples or min(multipliers) < 1:
        raise ValueError(f"multipliers: must be {downsamples} numbers of at least 1, got {tuple(multipliers)}")
    return [max(1, width * multiplier // multipliers[-1]) for multiplier in multipliers]


def norm_layers(channels: int, groups: int, kind: type[nn.GroupNorm] = nn.GroupNorm) -> list[nn.Module]:
    """Return a GroupNorm, or one of its kinds, as a list, which is empty for no groups.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    if groups and channels % groups:
        raise ValueError(f"groups: must divide the {channels} channels of every layer, got {groups}")
    return [kind(groups, channels)] if groups else []


@dataclass(frozen=True)
class Layers:
    """Constructors of the layers of which `encoder_layers` and `decoder_layers` build networks for a kind of signal.

    Attributes:
        plain: a convolution that keeps the grid, from (channels, channels after it, an odd size).
        down, up: a strided or transposed convolution, from (channels, channels after it, level 1, 2, ...).
        block: a residual block of the given number of channels.
        norm: a normalization of them, or none.
        attention: an attention over them at the coarsest grid, or none.
    """

    plain: Callable[[int, int, int], nn.Module]
    down: Callable[[int, int, int], nn.Module]
    up: Callable[[int, int, int], nn.Module]
    block: Callable[[int], nn.Module]
    norm: Callable[[int], list[nn.Module]]
    attention: Callable[[int], list[nn.Module]] = lambda width: []


def encoder_layers(
    layers: Layers, in_channels: int, dim: int, widths: Sequence[int], residual_blocks: int, level_blocks: int
) -> nn.Sequential:
    """Return the layers of an `Encoder` whose grids have `widths` channels, from the finest to the coarsest."""
    stack: list[nn.Module] = []
    channels = in_channels
    for level, next_channels in enumerate(widths, start=1):
        stack.append(layers.down(channels, next_channels, level))
        channels = next_channels
        # The first residual block starts with its own nonlinearity.
        if level < len(widths):
            stack += [layers.block(channels) for _ in range(level_blocks)]
            stack.append(nn.GELU())
    stack += [layers.block(channels) for _ in range(residual_blocks)]
    stack += [*layers.attention(channels), *layers.norm(channels)]
    return nn.Sequential(*stack, nn.GELU(), layers.plain(channels, dim, 1))


def decoder_layers(
    layers: Layers, dim: int, out_channels: int, widths: Sequence[int], residual_blocks: int, level_blocks: int
) -> nn.Sequential:
    """Return the layers of a `Decoder` whose grids have `widths` channels, from the finest to the coarsest."""
    channels = widths[-1]
    stack: list[nn.Module] = [layers.plain(dim, channels, 3)]
    stack += [layers.block(channels) for _ in range(residual_blocks)]
    stack += [*layers.attention(channels), *layers.norm(channels)]
    for level, next_channels in enumerate([*widths[-2::-1], out_channels], start=1):
        stack += [nn.GELU(), layers.up(channels, next_channels, level)]
        if level < len(widths):
            stack += [layers.block(next_channels) for _ in range(level_blocks)]
        channels = next_channels
    return nn.Sequential(*stack)


class ResidualBlock(nn.Module):
    """`x + conv1(gelu(conv3(gelu(x))))`: a 3-wide convolution into `hidden` channels, a 1-wide one back.

    Args:
        width: channels of the input and the output.
        hidden: channels between the two convolutions.
        ndim: spatial dimensions, 1, 2 or 3.
        groups: of a GroupNorm before each nonlinearity; 0 for none.

    Shapes: (B, width, *grid) -> (B, width, *grid).
    """

    def __init__(self, width: int, hidden: int, *, ndim: int = 2, groups: int = 0) -> None:
        super().__init__()
        _check_ndim(ndim)
        check_positive(width=width, hidden=hidden)
        conv = _CONV[ndim]
        first = [*norm_layers(width, groups), nn.GELU(), conv(width, hidden, 3, padding=1)]
        self.branch = nn.Sequential(*first, *norm_layers(hidden, groups), nn.GELU(), conv(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class GridAttention(nn.Module):
    """`x + out(softmax(q k^T / sqrt(width)) v)` over all positions of a grid, with one head.

    Args:
        width: channels. ndim: spatial dimensions, 1, 2 or 3.
        groups: of a GroupNorm before the attention; 0 for none.

    Shapes: (B, width, *grid) -> (B, width, *grid).

    Source: the attention block of Esser, Rombach, Ommer, Taming Transformers (VQGAN), 2020, at the coarsest grid.
    """

    def __init__(self, width: int, *, ndim: int = 2, groups: int = 0) -> None:
        super().__init__()
        self.norm = nn.Sequential(*norm_layers(width, groups))
        self.qkv, self.out = _CONV[ndim](width, 3 * width, 1), _CONV[ndim](width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # With an axis for the one head, without which the attention has no ONNX form.
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(attended.unflatten(2, x.shape[2:]))


def _layers(ndim: int, residual_width: int, groups: int, attention: bool) -> Layers:
    """Return the layers of `Encoder` and `Decoder` for signals of some spatial dimensions."""
    _check_ndim(ndim)
    conv, conv_transpose = _CONV[ndim], _CONV_TRANSPOSE[ndim]
    return Layers(
        plain=lambda channels, after, size: conv(channels, after, size, padding=size // 2),
        down=lambda channels, after, level: conv(channels, after, 4, stride=2, padding=1),
        up=lambda channels, after, level: conv_transpose(channels, after, 4, stride=2, padding=1),
        block=lambda channels: ResidualBlock(channels, residual_width, ndim=ndim, groups=groups),
        norm=lambda channels: norm_layers(channels, groups),
        attention=lambda channels: [GridAttention(channels, ndim=ndim, groups=groups)] if attention else [],
    )


class Encoder(nn.Module):
    """Map a signal to a grid of feature vectors, `2**downsamples` times smaller along every axis.

    Args:
        in_channels: channels of the signal.
        dim: channels of the features, the D that the quantizer sees.
        width: channels at the coarsest grid; each finer grid has half as many.
        residual_width: channels inside a residual block.
        residual_blocks: number of residual blocks after the strided convolutions.
        downsamples: number of strided convolutions, at least 1.
        ndim: spatial dimensions of the signal, 1, 2 or 3.
        multipliers: proportions of the channels at the grids, from the finest to the coarsest, instead of halves.
        level_blocks: number of residual blocks after each strided convolution but the last.
        groups: of a GroupNorm before each nonlinearity but those of plain strided convolutions; 0 for none.
        attention: attend over all positions of the coarsest grid, after the residual blocks.

    Shapes: (B, in_channels, *size) -> (B, dim, *grid) with `grid = size / stride`.

    Raises:
        ValueError: an argument is out of range, or a spatial size is not a multiple of `stride`: a strided convolution
            would drop the remainder, and the reconstruction would have another size than its original.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        width: int = 128,
        residual_width: int = 32,
        residual_blocks: int = 2,
        downsamples: int = 2,
        ndim: int = 2,
        multipliers: Sequence[int] | None = None,
        level_blocks: int = 0,
        groups: int = 0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, dim=dim, width=width, downsamples=downsamples)
        layers = _layers(ndim, residual_width, groups, attention)
        widths = stage_widths(width, downsamples, multipliers)
        self.layers = encoder_layers(layers, in_channels, dim, widths, residual_blocks, level_blocks)
        self.ndim = ndim
        self.stride = 2**downsamples

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        if len(size) != self.ndim or any(n == 0 or n % self.stride for n in size):
            raise ValueError(
                f"the encoder takes (B, C, ...) with {self.ndim} spatial sizes, each a multiple of its stride"
                f" {self.stride}; got x of shape {tuple(x.shape)}: resize or pad x first"
            )
        return self.layers(x)


class Decoder(nn.Module):
    """Map a grid of code vectors back to a signal: the mirror image of `Encoder`.

    Args:
        dim: channels of the codes.
        out_channels: channels of the signal.
        width, residual_width, residual_blocks, ndim, multipliers, groups, attention: as in `Encoder`.
        upsamples: number of transposed convolutions, each doubling the grid, at least 1.
        level_blocks: number of residual blocks after each transposed convolution but the last.

    Shapes: (B, dim, *grid) -> (B, out_channels, *size) with `size = grid * 2**upsamples`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        width: int = 128,
        residual_width: int = 32,
        residual_blocks: int = 2,
        upsamples: int = 2,
        ndim: int = 2,
        multipliers: Sequence[int] | None = None,
        level_blocks: int = 0,
        groups: int = 0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        check_positive(out_channels=out_channels, dim=dim, width=width, upsamples=upsamples)
        layers = _layers(ndim, residual_width, groups, attention)
        widths = stage_widths(width, upsamples, multipliers)
        self.layers = decoder_layers(layers, dim, out_channels, widths, residual_blocks, level_blocks)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, whose gradients scale an adversarial loss."""
        return next(self.layers[-1].parameters())

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes)
