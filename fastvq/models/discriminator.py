"""Discriminators of images and of audio, for adversarial training of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

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


class SpectrogramDiscriminator(nn.Module):
    """Judges of spectrograms at several resolutions, each of which gives features and logits.

    Real and imaginary parts of a short-time Fourier transform are the channels of an image of frequency by time.
    Convolutions halve its frequencies, with dilations of 1, 2 and 4 in time between them.

    Args:
        channels: channels of the waveforms.
        width: channels of the convolutions.
        windows: in samples, one for each resolution; hops are a quarter of them.

    Shapes: (B, channels, T) -> for each window a list of the outputs of all layers, the last of which are the logits
    (B, 1, frequencies, frames).

    Raises:
        ValueError: an invalid argument, by name.

    Source: Défossez et al., High Fidelity Neural Audio Compression (EnCodec), 2022, section 3.4 and appendix A.
    """

    def __init__(self, channels: int, *, width: int = 16, windows: Sequence[int] = (256, 512, 1024)) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: must be at least 1, got {width}")
        self.windows = tuple(windows)
        self.judges = nn.ModuleList([self._judge(2 * channels, width) for _ in windows])

    @staticmethod
    def _judge(channels: int, width: int) -> nn.ModuleList:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, (9, 3), padding=(4, 1))]
        layers += [
            nn.Conv2d(width, width, (9, 3), stride=(2, 1), padding=(4, dilation), dilation=(1, dilation))
            for dilation in (1, 2, 4)
        ]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)]
        return nn.ModuleList([weight_norm(layer) for layer in layers])

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        found = []
        for window, judge in zip(self.windows, self.judges, strict=True):
            taper = torch.hann_window(window, device=x.device) * (4 / window)
            padded = F.pad(x.flatten(0, 1), (window // 2, window // 2))
            spectrum = torch.stft(padded, window, window // 4, window=taper, center=False, return_complex=True)
            hidden = torch.view_as_real(spectrum).unflatten(0, x.shape[:2]).permute(0, 1, 4, 2, 3).flatten(1, 2)
            outputs: list[Tensor] = []
            for layer in judge:  # type: ignore[attr-defined]
                hidden = layer(F.leaky_relu(hidden, _SLOPE) if outputs else hidden)
                outputs.append(hidden)
            found.append(outputs)
        return found
