"""Causal encoder and decoder for video.

The network is that of `conv`, in three dimensions, except that time has a stride of its own and that no layer sees
later frames: all padding in time lies before the first frame. With a stride of t in time, the first frame has a
position of its own on the grid and each later position holds t frames. The first frame alone, a still image, has the
same features as in a video.

Source: Yu et al., Language Model Beats Diffusion (MAGVIT-v2), 2023, section 3.2: causal 3-D convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import Layers, check_positive, decoder_layers, encoder_layers, norm_layers, stage_widths


class CausalConv(nn.Conv3d):
    """3-D convolution of which a frame sees itself and earlier ones.

    Args:
        in_channels, out_channels: as in `nn.Conv3d`.
        kernel: sizes in time and in space. stride: in time and in space.

    Shapes: (B, in_channels, T, H, W) -> (B, out_channels, 1 + (T - 1) // time stride, H / stride, W / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)
    ) -> None:
        (time, space), (time_stride, space_stride) = kernel, stride
        super().__init__(
            in_channels,
            out_channels,
            (time, space, space),
            stride=(time_stride, space_stride, space_stride),
            padding=(0, (space - 1) // 2, (space - 1) // 2),
        )
        self.past = time - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.past, 0)) if self.past else x)


class CausalUpsample3d(nn.ConvTranspose3d):
    """Transposed 3-D convolution that doubles height and width and, on request, the frames after the first.

    A frame sees the position that holds it and the one before.

    Args:
        in_channels, out_channels: as in `nn.ConvTranspose3d`.
        time_stride: 1 or 2.

    Shapes: (B, in_channels, T, H, W) -> (B, out_channels, 1 + (T - 1) time_stride, 2 H, 2 W).
    """

    def __init__(self, in_channels: int, out_channels: int, time_stride: int) -> None:
        time = 4 if time_stride == 2 else 1
        super().__init__(in_channels, out_channels, (time, 4, 4), stride=(time_stride, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        up = super().forward(x, output_size)
        return up if self.stride[0] == 1 else up[:, :, 1 : 2 * x.shape[2]]


class FrameNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself: statistics over all frames would let a frame see later ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class CausalBlock3d(nn.Module):
    """`x + conv1(gelu(conv3(gelu(x))))` like `ResidualBlock`, causal in time.

    Args:
        width: channels of the input and the output.
        hidden: channels between the two convolutions.
        groups: of a `FrameNorm` before each nonlinearity; 0 for none.

    Shapes: (B, width, T, H, W) -> (B, width, T, H, W).
    """

    def __init__(self, width: int, hidden: int, *, groups: int = 0) -> None:
        super().__init__()
        check_positive(width=width, hidden=hidden)
        first = [*norm_layers(width, groups, FrameNorm), nn.GELU(), CausalConv(width, hidden, (3, 3))]
        self.branch = nn.Sequential(
            *first, *norm_layers(hidden, groups, FrameNorm), nn.GELU(), CausalConv(hidden, width, (1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _layers(residual_width: int, groups: int, downsamples: int, time_downsamples: int) -> Layers:
    """Return the layers of `VideoEncoder` and `VideoDecoder`; the coarsest levels halve or double time as well."""

    def down(channels: int, after: int, level: int) -> CausalConv:
        halved = level > downsamples - time_downsamples
        return CausalConv(channels, after, (4 if halved else 1, 4), (2 if halved else 1, 2))

    return Layers(
        plain=lambda channels, after, size: CausalConv(channels, after, (size, size)),
        down=down,
        up=lambda channels, after, level: CausalUpsample3d(channels, after, 2 if level <= time_downsamples else 1),
        block=lambda channels: CausalBlock3d(channels, residual_width, groups=groups),
        norm=lambda channels: norm_layers(channels, groups, FrameNorm),
    )


class VideoEncoder(nn.Module):
    """Map a video to a grid of feature vectors, smaller along time and along height and width.

    Args:
        in_channels: channels of the video.
        dim: channels of the features, the D that the quantizer sees.
        width: channels at the coarsest grid; each finer grid has half as many.
        residual_width: channels inside a residual block.
        residual_blocks: number of residual blocks after the strided convolutions.
        downsamples: number of strided convolutions, at least 1, each of which halves height and width.
        time_downsamples: number of these, the last ones, that halve the frames after the first as well.
        multipliers, level_blocks: as in `fastvq.models.Encoder`.
        groups: of a `FrameNorm` before each nonlinearity but those of plain strided convolutions; 0 for none.

    Attributes:
        strides: along time, height and width: (t, s, s) with `t = 2**time_downsamples` and `s = 2**downsamples`.
        first: how many values along each axis have a position of their own, before those that share one: one frame.

    Shapes: (B, in_channels, T, H, W) -> (B, dim, 1 + (T - 1) / t, H / s, W / s).

    Raises:
        ValueError: an argument is out of range, height or width is not a multiple of s, or the number of frames is not
            1 plus a multiple of t.
    """

    ndim = 3
    first = (1, 0, 0)

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        width: int = 128,
        residual_width: int = 32,
        residual_blocks: int = 2,
        downsamples: int = 2,
        time_downsamples: int = 2,
        multipliers: Sequence[int] | None = None,
        level_blocks: int = 0,
        groups: int = 0,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, dim=dim, width=width, downsamples=downsamples)
        self.strides = _strides(downsamples, time_downsamples)
        layers = _layers(residual_width, groups, downsamples, time_downsamples)
        widths = stage_widths(width, downsamples, multipliers)
        self.layers = encoder_layers(layers, in_channels, dim, widths, residual_blocks, level_blocks)

    def forward(self, x: Tensor) -> Tensor:
        time, _, space = self.strides
        if x.dim() != 5 or not all(x.shape[2:]) or (x.shape[2] - 1) % time or any(n % space for n in x.shape[3:]):
            raise ValueError(
                f"the encoder takes (B, C, T, H, W) with T 1 plus a multiple of {time}, H and W multiples of {space};"
                f" got x of shape {tuple(x.shape)}"
            )
        return self.layers(x)


class VideoDecoder(nn.Module):
    """Map a grid of code vectors back to a video: the mirror image of `VideoEncoder`.

    A frame depends on its own position of the grid and on earlier ones.

    Args:
        dim: channels of the codes.
        out_channels: channels of the video.
        width, residual_width, residual_blocks, multipliers, groups: as in `VideoEncoder`.
        upsamples: number of transposed convolutions, at least 1, each of which doubles height and width.
        time_upsamples: number of these, the first ones, that double the frames after the first as well.
        level_blocks: number of residual blocks after each transposed convolution but the last.

    Shapes: (B, dim, T, H, W) -> (B, out_channels, 1 + (T - 1) t, H s, W s) with the strides t and s of the encoder.

    Raises:
        ValueError: an argument is out of range.
    """

    ndim = 3

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        width: int = 128,
        residual_width: int = 32,
        residual_blocks: int = 2,
        upsamples: int = 2,
        time_upsamples: int = 2,
        multipliers: Sequence[int] | None = None,
        level_blocks: int = 0,
        groups: int = 0,
    ) -> None:
        super().__init__()
        check_positive(out_channels=out_channels, dim=dim, width=width, upsamples=upsamples)
        self.strides = _strides(upsamples, time_upsamples)
        layers = _layers(residual_width, groups, upsamples, time_upsamples)
        widths = stage_widths(width, upsamples, multipliers)
        self.layers = decoder_layers(layers, dim, out_channels, widths, residual_blocks, level_blocks)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, whose gradients scale an adversarial loss."""
        return next(self.layers[-1].parameters())

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes)


def _strides(downsamples: int, time_downsamples: int) -> tuple[int, int, int]:
    if not 0 <= time_downsamples <= downsamples:
        raise ValueError(f"time_downsamples must be between 0 and downsamples = {downsamples}, got {time_downsamples}")
    return 2**time_downsamples, 2**downsamples, 2**downsamples
