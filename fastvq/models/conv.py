"""Strided convolutional encoder and decoder for signals, images and volumes.

The network of van den Oord et al. 2017 (Neural Discrete Representation Learning, section 4.1), as DeepMind's Sonnet
implements it in nets/vqvae.py: strided 4-wide convolutions halve the grid, residual blocks follow at the coarsest grid,
and the decoder is the mirror image. `ndim` selects 1-D, 2-D or 3-D convolutions; nothing else depends on it.
"""

from __future__ import annotations

from torch import Tensor, nn

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_ndim(ndim: int) -> None:
    if ndim not in _CONV:
        raise ValueError(f"ndim must be 1, 2 or 3, got {ndim}")


def _stage_widths(width: int, downsamples: int) -> list[int]:
    """Return the channels after each strided convolution: larger grids get fewer channels."""
    return [max(1, width >> (downsamples - 1 - stage)) for stage in range(downsamples)]


class ResidualBlock(nn.Module):
    """`x + conv1(gelu(conv3(gelu(x))))`: a 3-wide convolution into `hidden` channels, a 1-wide one back.

    Args:
        width: channels of the input and the output.
        hidden: channels between the two convolutions.
        ndim: spatial dimensions, 1, 2 or 3.

    Shapes: (B, width, *grid) -> (B, width, *grid).
    """

    def __init__(self, width: int, hidden: int, *, ndim: int = 2) -> None:
        super().__init__()
        _check_ndim(ndim)
        _check_positive(width=width, hidden=hidden)
        conv = _CONV[ndim]
        self.branch = nn.Sequential(nn.GELU(), conv(width, hidden, 3, padding=1), nn.GELU(), conv(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


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
    ) -> None:
        super().__init__()
        _check_ndim(ndim)
        _check_positive(in_channels=in_channels, dim=dim, width=width, downsamples=downsamples)
        self.ndim = ndim
        self.stride = 2**downsamples
        conv = _CONV[ndim]
        layers: list[nn.Module] = []
        channels = in_channels
        for stage_width in _stage_widths(width, downsamples):
            layers += [conv(channels, stage_width, 4, stride=2, padding=1), nn.GELU()]
            channels = stage_width
        # The first residual block starts with its own nonlinearity.
        layers.pop()
        layers += [ResidualBlock(width, residual_width, ndim=ndim) for _ in range(residual_blocks)]
        layers += [nn.GELU(), conv(width, dim, 1)]
        self.layers = nn.Sequential(*layers)

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
        width, residual_width, residual_blocks, ndim: as in `Encoder`.
        upsamples: number of transposed convolutions, each doubling the grid, at least 1.

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
    ) -> None:
        super().__init__()
        _check_ndim(ndim)
        _check_positive(out_channels=out_channels, dim=dim, width=width, upsamples=upsamples)
        layers: list[nn.Module] = [_CONV[ndim](dim, width, 3, padding=1)]
        layers += [ResidualBlock(width, residual_width, ndim=ndim) for _ in range(residual_blocks)]
        channels = width
        for next_channels in [*_stage_widths(width, upsamples)[-2::-1], out_channels]:
            layers += [nn.GELU(), _CONV_TRANSPOSE[ndim](channels, next_channels, 4, stride=2, padding=1)]
            channels = next_channels
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes)
