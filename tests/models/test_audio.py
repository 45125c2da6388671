"""Causal networks for audio: shapes, causality, weights, and settings that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastvq
from fastvq.models import VQVAE, AudioDecoder, AudioEncoder, TransformDecoder, TransformEncoder
from fastvq.models.audio import ACTIVATIONS, CausalConv1d, Past, fold_weights_

SMALL: dict[str, Any] = {"strides": (2, 4), "width": 4, "dilations": (1, 3), "kernel": 5}
STRIDE = 8
NETWORKS: dict[str, tuple[Any, Any]] = {
    "seanet": (AudioEncoder, AudioDecoder),
    "transform": (TransformEncoder, TransformDecoder),
}


def tiny_codec(channels: int = 1, *, network: str = "seanet", bottleneck: Any = None, **settings: Any) -> VQVAE:
    torch.manual_seed(0)
    settings = SMALL | settings
    encoder, decoder = NETWORKS[network]
    return VQVAE(
        encoder(channels, 6, **settings),
        bottleneck or fastvq.ResidualVQ(dim=6, num_quantizers=3, codebook_size=16, kmeans_init=True),
        decoder(6, channels, **settings),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels", [1, 2])
def test_shapes_and_gradients(channels: int, network: str, activation: str) -> None:
    model = tiny_codec(channels, network=network, activation=activation)
    x = torch.randn(4, channels, 10 * STRIDE)
    output = model(x)
    assert output.reconstruction.shape == x.shape
    assert output.indices.shape == (4, 10, 3)
    ((output.reconstruction - x).square().mean() + output.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    model.eval()
    assert torch.equal(model.decode(model.encode(x)), model(x).reconstruction)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_depends_on_what_follows(activation: str, network: str) -> None:
    model = tiny_codec(network=network, activation=activation).double()
    x = torch.randn(1, 1, 12 * STRIDE, dtype=torch.float64)
    z = model.encoder(x)
    for frame in (0, 3, 11):
        changed = x.clone()
        changed[..., STRIDE * (frame + 1) :] += 1
        assert torch.equal(model.encoder(changed)[..., : frame + 1], z[..., : frame + 1])
        changed = x.clone()
        changed[..., STRIDE * (frame + 1) - 1] += 1  # the last sample of its own
        assert not torch.allclose(model.encoder(changed)[..., frame], z[..., frame])
        later, own = z.clone(), z.clone()
        later[..., frame + 1 :] += 1
        own[..., frame] += 1
        y, end = model.decoder(z), STRIDE * (frame + 1) - model.decoder.delay
        assert torch.equal(model.decoder(later)[..., :end], y[..., :end])
        block = slice(max(0, end - STRIDE), end)
        assert not torch.allclose(model.decoder(own)[..., block], y[..., block])


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (5, 1, 1), (3, 1, 3), (8, 4, 1), (4, 4, 1)])
def test_a_causal_convolution_is_its_formula(kernel: int, stride: int, dilation: int) -> None:
    conv = CausalConv1d(2, 3, kernel, stride=stride, dilation=dilation).double()
    x = torch.randn(1, 2, 20, dtype=torch.float64)
    y = conv(x)
    assert y.shape == (1, 3, 20 // stride)
    weight = conv.weight
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), conv.magnitude)
    expected = conv.bias.detach()[:, None].repeat(1, 20 // stride)
    for t in range(20 // stride):
        for j in range(kernel):
            place = stride * (t + 1) - 1 - dilation * (kernel - 1 - j)
            if place >= 0:
                expected[:, t] += weight[:, :, j].detach() @ x[0, :, place]
    torch.testing.assert_close(y[0], expected)


def test_weights_keep_their_direction_and_copies_are_independent() -> None:
    model = tiny_codec()
    names = set(model.state_dict())
    assert "encoder.layers.0.direction" in names
    assert "encoder.layers.0.magnitude" in names
    twin = copy.deepcopy(model)
    fold_weights_(twin)
    assert set(twin.state_dict()) == names
    x = torch.randn(2, 1, 4 * STRIDE)
    torch.testing.assert_close(twin.encoder(x), model.encoder(x))
    with torch.no_grad():
        model.encoder.layers[0].magnitude.mul_(2)
    assert not torch.allclose(twin.encoder(x), model.encoder(x))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_past_holds_what_each_layer_looks_back_to(network: str) -> None:
    encoder = tiny_codec(network=network).double().encoder
    x = torch.randn(3, 1, 12 * STRIDE, dtype=torch.float64)
    past = Past()
    chunks = [encoder(chunk, past) for chunk in x.split([STRIDE, 4 * STRIDE, 7 * STRIDE], -1)]
    torch.testing.assert_close(torch.cat(chunks, -1), encoder(x))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_last_weight_belongs_to_the_last_layer(network: str) -> None:
    model = tiny_codec(network=network)
    output = model(torch.randn(2, 1, 4 * STRIDE)).reconstruction
    (gradient,) = torch.autograd.grad(output.square().mean(), model.decoder.last_weight)
    assert gradient.abs().sum() > 0
    assert model.decoder.last_weight.shape[0] == {"seanet": 1, "transform": STRIDE}[network]


@pytest.mark.parametrize("network", [AudioEncoder, AudioDecoder, TransformEncoder, TransformDecoder])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strides": ()}, "strides: must be one or more numbers of at least 1"),
        ({"strides": (2, 0)}, "strides: must be one or more numbers of at least 1, got \\(2, 0\\)"),
        ({"width": 0}, "width: must be at least 1, got 0"),
        ({"dilations": (1, -1)}, "dilations: must be"),
        ({"kernel": 0}, "kernel: must be at least 1"),
        ({"activation": "relu"}, "activation: must be one of elu, snake, got 'relu'"),
    ],
)
def test_settings_are_checked(network: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(1, 4, **settings)


@pytest.mark.parametrize("shape", [(1, 1, 12), (1, 2, 16), (1, 16), (1, 1, 0)])
def test_a_length_between_strides_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(B, 1, T\) with T a multiple of its stride 8; got x of shape"):
        tiny_codec().encoder(torch.zeros(shape))
