"""Causal networks for video: shapes, what a frame depends on, and VQ-VAEs of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastvq
from fastvq.models import VQVAE, NoBottleneck, VideoDecoder, VideoEncoder

SIZES = {"width": 8, "residual_width": 4, "residual_blocks": 1}


def networks(times: int = 1, halvings: int = 2, **options: Any) -> tuple[VideoEncoder, VideoDecoder]:
    """Return an encoder and a decoder that halve time `times` times."""
    torch.manual_seed(0)
    options = SIZES | options
    return (
        VideoEncoder(3, 6, downsamples=halvings, time_downsamples=times, **options),
        VideoDecoder(6, 3, upsamples=halvings, time_upsamples=times, **options),
    )


@pytest.mark.parametrize(("halvings", "times"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("positions", [0, 1, 3])
def test_the_first_frame_has_a_position_and_groups_of_the_others_have_one(
    halvings: int, times: int, positions: int
) -> None:
    encoder, decoder = networks(times, halvings)
    time, space = 2**times, 2**halvings
    assert encoder.strides == decoder.strides == (time, space, space)
    x = torch.randn(2, 3, 1 + positions * time, space, 2 * space)
    z = encoder(x)
    assert z.shape == (2, 6, 1 + positions, 1, 2)
    assert decoder(z).shape == x.shape


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "level_blocks": 1, "multipliers": (1, 2)}], ids=str)
def test_no_position_sees_later_frames(times: int, options: dict[str, Any]) -> None:
    encoder, decoder = networks(times, **options)
    time, frames = 2**times, 1 + 2 * 2**times
    x = torch.randn(1, 3, frames, 8, 8)
    z = encoder(x)
    y = decoder(100 * z)
    for frame in range(frames):
        other = x.clone()
        other[:, :, frame:] += torch.randn_like(other[:, :, frame:])
        position = -(-frame // time)
        changed = encoder(other)
        torch.testing.assert_close(changed[:, :, :position], z[:, :, :position])
        assert (changed[:, :, position] - z[:, :, position]).abs().max() > 1e-3
        # The frames of the positions before are decoded without it.
        before = 1 + (position - 1) * time if position else 0
        restored = decoder(100 * torch.cat([z[:, :, :position], changed[:, :, position:]], 2))
        torch.testing.assert_close(restored[:, :, :before], y[:, :, :before])
        assert (restored[:, :, before] - y[:, :, before]).abs().max() > 1e-3


def test_a_still_image_is_encoded_like_a_first_frame() -> None:
    encoder, decoder = networks(2)
    x = torch.randn(2, 3, 5, 8, 8)
    first = encoder(x[:, :, :1])
    torch.testing.assert_close(first, encoder(x)[:, :, :1])
    torch.testing.assert_close(decoder(first), decoder(encoder(x))[:, :, :1])


@pytest.mark.parametrize("options", [{}, {"groups": 2, "level_blocks": 1, "multipliers": (1, 1)}], ids=str)
def test_a_vqvae_of_video_learns_and_decodes_its_indices(options: dict[str, Any]) -> None:
    encoder, decoder = networks(2, **options)
    x = torch.randn(2, 3, 9, 8, 12)
    plain = VQVAE(encoder, NoBottleneck(), decoder)
    (plain(x).reconstruction - x).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert decoder.last_weight is decoder.layers[-1].weight
    for bottleneck, more in (
        (fastvq.VectorQuantize(6, 16), ()),
        (fastvq.ResidualVQ(dim=6, num_quantizers=2, codebook_size=8), (2,)),
    ):
        model = VQVAE(encoder, bottleneck, decoder).eval()
        reconstruction, indices, _ = model(x)
        assert indices.shape == (2, 3, 2, 3, *more)
        torch.testing.assert_close(model.decode(model.encode(x)), reconstruction)


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 8, 8), (2, 3, 5, 8, 6), (2, 3, 5, 6, 8), (3, 5, 8, 8), (2, 3, 0, 8, 8), (2, 3, 5, 0, 8)]
)
def test_sizes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    encoder, _ = networks(2)
    expected = rf"T 1 plus a multiple of 4, H and W multiples of 4; got x of shape \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=expected):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": 3}, "time_downsamples must be between 0 and downsamples = 2, got 3"),
        ({"times": -1}, "time_downsamples must be between 0 and downsamples = 2, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"residual_width": 0}, "hidden must be at least 1, got 0"),
        ({"groups": 3}, "groups: must divide the 8 channels of every layer, got 3"),
        ({"multipliers": (1, 2, 3)}, "multipliers: must be 2 numbers of at least 1"),
    ],
)
def test_networks_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        networks(**options)
