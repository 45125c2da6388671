"""Encoder, decoder and the VQ-VAE: shapes, exchangeable bottlenecks, and decoding from indices alone."""

from __future__ import annotations

from typing import Any

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


NETWORKS = [
    {"multipliers": (1, 1)}, {"level_blocks": 1}, {"groups": 2}, {"attention": True},
    {"multipliers": (1, 2), "level_blocks": 2, "groups": 4, "attention": True},
]  # fmt: skip


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_networks_of_every_setting_keep_shapes_and_learn(ndim: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"width": 8, "residual_width": 4, "residual_blocks": 1, "ndim": ndim, **options}
    model = VQVAE(Encoder(3, 6, **sizes), NoBottleneck(), Decoder(6, 3, **sizes))
    x = torch.randn(2, 3, *SIZES[ndim])
    output = model(x).reconstruction
    assert output.shape == x.shape
    (output - x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # The softmax is the same whatever is added to all keys.
        assert parameter.grad.abs().sum() > 0 or name.endswith("qkv.bias"), name


def test_plain_networks_are_what_they_were() -> None:
    names = [name for name, _ in Encoder(1, 4, width=8, residual_blocks=1).named_parameters()]
    assert names == [
        f"layers.{layer}.{kind}" for layer in (0, 2, "3.branch.1", "3.branch.3", 5) for kind in ("weight", "bias")
    ]


def test_attention_sees_the_whole_grid() -> None:
    torch.manual_seed(0)
    sizes = {"width": 8, "residual_width": 4, "residual_blocks": 0}
    x = torch.randn(1, 1, 32, 32)
    other = x.clone()
    other[..., 0, 0] += 1
    for attention in (False, True):
        encoder = Encoder(1, 4, **sizes, attention=attention)
        changed = (encoder(x) - encoder(other)).abs().amax(1) > 0
        assert bool(changed[0, -1, -1]) == attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": (1, 2, 3)}, r"multipliers: must be 2 numbers of at least 1, got \(1, 2, 3\)"),
        ({"multipliers": (1, 0)}, "multipliers: must be 2 numbers of at least 1"),
        ({"groups": 3}, "groups: must divide the 128 channels of every layer, got 3"),
    ],
)
def test_networks_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(1, 4, **options)
    with pytest.raises(ValueError, match=message):
        Decoder(4, 1, **options)


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
