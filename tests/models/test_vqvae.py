"""Encoder, decoder and the VQ-VAE: shapes, exchangeable bottlenecks, and decoding from indices alone."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.models import VQVAE, Decoder, Encoder, NoBottleneck

SIZES = {1: (24,), 2: (8, 12), 3: (4, 8, 4)}


def tiny_vqvae(ndim: int = 2, *, channels: int = 3, bottleneck: object | None = None) -> VQVAE:
    torch.manual_seed(0)
    sizes = {"width": 8, "residual_width": 4, "residual_blocks": 1, "ndim": ndim}
    return VQVAE(
        Encoder(channels, 6, **sizes),
        bottleneck or fastvq.VectorQuantize(6, 16, kmeans_init=True),
        Decoder(6, channels, **sizes),
    )


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_shapes(ndim: int) -> None:
    model = tiny_vqvae(ndim)
    x = torch.randn(5, 3, *SIZES[ndim])
    reconstruction, indices, loss = model(x)
    assert reconstruction.shape == x.shape
    assert indices.shape == (5, *(size // 4 for size in SIZES[ndim]))
    assert indices.dtype == torch.int64
    assert loss.shape == ()


@pytest.mark.parametrize("downsamples", [1, 2, 3])
def test_grid_is_size_over_stride(downsamples: int) -> None:
    encoder = Encoder(1, 4, width=8, downsamples=downsamples)
    decoder = Decoder(4, 1, width=8, upsamples=downsamples)
    z = encoder(torch.randn(2, 1, 16, 24))
    assert encoder.stride == 2**downsamples
    assert z.shape == (2, 4, 16 // encoder.stride, 24 // encoder.stride)
    assert decoder(z).shape == (2, 1, 16, 24)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_decoding_the_indices_gives_the_reconstruction(ndim: int) -> None:
    model = tiny_vqvae(ndim)
    x = torch.randn(5, 3, *SIZES[ndim])
    model(x)
    model.eval()
    reconstruction, indices, _ = model(x)
    assert torch.equal(model.encode(x), indices)
    assert torch.equal(model.decode(indices), reconstruction)


def test_encode_in_training_mode_leaves_the_codebook_alone() -> None:
    model = tiny_vqvae()
    x = torch.randn(4, 3, 8, 8)
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counts = model.bottleneck.code_counts.clone()
    model.encode(x)
    assert model.bottleneck.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.bottleneck.code_counts, counts)


def test_gradients_reach_every_parameter_through_the_bottleneck() -> None:
    model = tiny_vqvae()
    x = torch.randn(4, 3, 8, 8)
    output = model(x)
    ((output.reconstruction - x).square().mean() + output.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_no_bottleneck_is_the_plain_autoencoder() -> None:
    model = tiny_vqvae(bottleneck=NoBottleneck())
    x = torch.randn(2, 3, 8, 12)
    reconstruction, indices, loss = model(x)
    assert torch.equal(reconstruction, model.decoder(model.encoder(x)))
    assert indices.shape == (2, 2, 3, 0)
    assert loss.item() == 0
    with pytest.raises(RuntimeError, match="no codes to decode"):
        model.decode(indices)


def test_a_bottleneck_with_several_stages_keeps_them_on_the_last_axis() -> None:
    class TwoStages(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = torch.nn.ModuleList([fastvq.VectorQuantize(6, 16), fastvq.VectorQuantize(6, 8)])

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            coarse, first, loss = self.stages[0](x)
            fine, second, more = self.stages[1](x - coarse)
            return coarse + fine, torch.stack([first, second], -1), loss + more

        def get_output_from_indices(self, indices: torch.Tensor) -> torch.Tensor:
            return sum(stage.get_output_from_indices(indices[..., q]) for q, stage in enumerate(self.stages))

    model = tiny_vqvae(bottleneck=TwoStages()).eval()
    x = torch.randn(2, 3, 8, 12)
    indices = model.encode(x)
    assert indices.shape == (2, 2, 3, 2)
    torch.testing.assert_close(model.decode(indices), model(x).reconstruction)


@pytest.mark.parametrize(("height", "width"), [(27, 28), (28, 30), (27, 30), (28, 32)])
def test_sizes_that_the_stride_does_not_divide_are_refused(height: int, width: int) -> None:
    model = tiny_vqvae(channels=1)
    x = torch.randn(1, 1, height, width)
    if height % 4 == 0 and width % 4 == 0:
        assert model(x).reconstruction.shape == x.shape
    else:
        with pytest.raises(ValueError, match=r"stride 4; got x of shape \(1, 1, "):
            model(x)


def test_a_signal_of_another_number_of_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="1 spatial sizes"):
        Encoder(1, 4, width=8, ndim=1)(torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["in_channels", "dim", "width", "downsamples", "residual_width"])
def test_sizes_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="hidden" if name == "residual_width" else name):
        Encoder(**{"in_channels": 1, "dim": 4, name: 0})


def test_ndim_is_checked() -> None:
    with pytest.raises(ValueError, match="ndim must be 1, 2 or 3, got 4"):
        Decoder(4, 1, ndim=4)
