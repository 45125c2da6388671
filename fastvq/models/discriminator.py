"""Discriminator of patches, for adversarial training of a decoder."""

from __future__ import annotations

from torch import Tensor, nn

_SLOPE = 0.2
_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Map images to a grid of logits, each of which says how real a patch looks.

    Strided 4-wide convolutions halve the grid, with leaky rectifiers between them; two plain 3-wide ones follow. The
    channels double up to eight times `width`. GroupNorm stands where the original has batch normalization, so that a
    logit does not depend on the other images of a batch.

    Args:
        channels: channels of the images.
        width: channels after the first convolution, a multiple of 8.
        layers: number of strided convolutions, at least 1.

    Shapes: (B, channels, H, W) -> (B, 1, H / 2^layers, W / 2^layers), rounded down.

    Raises:
        ValueError: an invalid argument, by name.

    Source: Isola et al., Image-to-Image Translation with Conditional Adversarial Networks, 2017, section 3.2.2.
    """

    def __init__(self, channels: int, *, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        if width < 1 or width % _GROUPS:
            raise ValueError(f"width: must be a multiple of {_GROUPS}, got {width}")
        if layers < 1:
            raise ValueError(f"layers: must be at least 1, got {layers}")
        stack: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        inner = width
        for layer in range(1, layers + 1):
            outer = width * min(2**layer, 8)
            kernel, stride = (3, 1) if layer == layers else (4, 2)
            stack.append(nn.Conv2d(inner, outer, kernel, stride=stride, padding=1, bias=False))
            stack += [nn.GroupNorm(_GROUPS, outer), nn.LeakyReLU(_SLOPE)]
            inner = outer
        stack.append(nn.Conv2d(inner, 1, 3, padding=1))
        self.layers = nn.Sequential(*stack)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
