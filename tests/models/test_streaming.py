"""Streams have the indices and the samples of the whole signal, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastvq
from fastvq.models import VQVAE, Decoder, Encoder, NoBottleneck, StreamingDecoder, StreamingEncoder
from fastvq.models.audio import Past

from .test_audio import STRIDE, tiny_codec

SAMPLES = 40 * STRIDE
ROUNDING = 2e-5
"""Bound on the difference of float32 features that differently shaped products cause, relative to the largest one."""
BOTTLENECKS = {
    "vq": lambda: fastvq.VectorQuantize(6, 16, kmeans_init=True),
    "heads": lambda: fastvq.VectorQuantize(6, 16, heads=2, kmeans_init=True),
    "rvq": lambda: fastvq.ResidualVQ(dim=6, num_quantizers=3, codebook_size=16, kmeans_init=True),
    "grouped": lambda: fastvq.GroupedResidualVQ(dim=6, groups=2, num_quantizers=2, codebook_size=16),
    "fsq": lambda: fastvq.FSQ([8, 5, 5], dim=6),
    "latent": lambda: fastvq.LatentQuantize([5, 5, 8], 6),
}


def trained(bottleneck: str, batch: int, channels: int = 1, *, network: str = "seanet") -> tuple[VQVAE, Tensor]:
    """Return a model in training mode whose codebooks have seen a batch, and another batch."""
    model = tiny_codec(channels, bottleneck=BOTTLENECKS[bottleneck](), network=network)
    model(torch.randn(8, channels, SAMPLES))
    return model, torch.randn(batch, channels, SAMPLES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("network", "bottleneck"), [*(("seanet", name) for name in BOTTLENECKS), ("transform", "rvq")])
@pytest.mark.parametrize(
    ("batch", "channels", "size"), [(1, 2, 1), (8, 1, STRIDE), (3, 2, 3 * STRIDE + 1), (1, 1, SAMPLES)]
)
def test_chunks_have_the_indices_of_the_whole(
    network: str, bottleneck: str, batch: int, channels: int, size: int
) -> None:
    """The features are in float64, so that no rounding brings a vector nearer to another code."""
    model, x = trained(bottleneck, batch, channels, network=network)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = model.double().encode(x.double())
    encoder = StreamingEncoder(model)
    found = [encoder(chunk) for chunk in x.double().split(size, -1)]
    assert all(one.dtype == torch.int64 for one in found)
    assert torch.equal(torch.cat(found, 1), whole)
    decoder = StreamingDecoder(model.float())
    restored = torch.cat([decoder(part) for part in found] + [decoder.flush()], -1)
    expected = model.eval().decode(whole).detach()
    torch.testing.assert_close(restored, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [STRIDE, 4 * STRIDE, 11 * STRIDE])
def test_only_rounding_may_change_an_index_in_float32(size: int) -> None:
    model, x = trained("rvq", 4)
    with torch.no_grad():
        whole, past = model.encoder(x), Past()
        features = torch.cat([model.encoder(chunk, past) for chunk in x.split(size, -1)], -1)
    torch.testing.assert_close(features, whole, rtol=0, atol=ROUNDING * float(whole.abs().max()))
    encoder = StreamingEncoder(model)
    indices = torch.cat([encoder(chunk) for chunk in x.split(size, -1)], 1)
    same = (features == whole).all(1)
    assert torch.equal(indices[same], model.encode(x)[same])


def test_an_index_comes_with_the_last_of_its_samples() -> None:
    model, x = trained("rvq", 2)
    encoder = StreamingEncoder(model)
    assert encoder.stride == STRIDE
    assert encoder(x[..., : STRIDE - 1]).shape == (2, 0, 3)
    assert encoder(x[..., STRIDE - 1 : STRIDE]).shape == (2, 1, 3)
    assert encoder(x[..., STRIDE : 4 * STRIDE + 3]).shape == (2, 3, 3)
    assert encoder(x[..., :0]).shape == (2, 0, 3)


def test_flush_pads_the_rest_and_ends_the_stream() -> None:
    model, x = trained("rvq", 2)
    short = x[..., : 2 * STRIDE + 3]
    padded = torch.nn.functional.pad(short, (0, STRIDE - 3))
    encoder = StreamingEncoder(model)
    for _ in range(2):  # the second stream starts from nothing, as the first
        found = torch.cat([encoder(short), encoder.flush()], 1)
        assert torch.equal(found, model.encode(padded))
    encoder(x[..., :STRIDE])
    assert encoder.flush().shape == (2, 0, 3)
    with pytest.raises(RuntimeError, match="there is no stream"):
        encoder.flush()


def test_reset_forgets() -> None:
    model, x = trained("vq", 1)
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)
    first = encoder(x)
    encoder(x[..., : STRIDE + 1])
    encoder.reset()
    assert torch.equal(encoder(x), first)
    samples = decoder(first)
    decoder(first[:, :3])
    decoder.reset()
    assert torch.equal(decoder(first), samples)
    assert decoder(first[:, :0]).shape == (1, 1, 0)


def test_the_first_stages_alone() -> None:
    model, x = trained("rvq", 2)
    indices = StreamingEncoder(model, stages=2)(x)
    assert torch.equal(indices, model.encode(x)[..., :2])
    decoder = StreamingDecoder(model)
    coarse = torch.cat([decoder(part) for part in indices.split(7, 1)], -1)
    torch.testing.assert_close(coarse, model.eval().decode(indices), rtol=0, atol=1e-5)


def test_a_stream_keeps_the_weights_that_it_began_with() -> None:
    model, x = trained("rvq", 2)
    encoder = StreamingEncoder(model)
    expected = model.encode(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    assert torch.equal(encoder(x), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: StreamingEncoder(m)(x[0]), ValueError, r"chunk: must have shape \(B, 1, T\), got \(1, 320\)"),
        (lambda m, x: StreamingEncoder(m)(x.expand(2, 2, -1)), ValueError, "chunk: must have shape"),
        (lambda m, x: StreamingEncoder(m, stages=4), ValueError, r"stages: must lie in \[1, 3\], got 4"),
        (lambda m, x: StreamingEncoder(m, stages=0), ValueError, r"stages: must lie in \[1, 3\], got 0"),
        (lambda m, x: _twice(StreamingEncoder(m), x), ValueError, "chunk: must have the 2 streams of the first, got 1"),
    ],
)
def test_refuses(call: Any, error: type[Exception], message: str) -> None:
    model, x = trained("rvq", 2)
    with pytest.raises(error, match=message):
        call(model, x)


def _twice(encoder: StreamingEncoder, x: Tensor) -> None:
    encoder(x)
    encoder(x[:1])


def test_models_that_need_the_whole_signal_are_refused() -> None:
    sizes = {"width": 8, "ndim": 1}
    plain = VQVAE(Encoder(1, 6, **sizes), fastvq.VectorQuantize(6, 16), Decoder(6, 1, **sizes))
    with pytest.raises(TypeError, match="must have a causal encoder, got Encoder"):
        StreamingEncoder(plain)
    with pytest.raises(TypeError, match="must have a causal decoder, got Decoder"):
        StreamingDecoder(plain)
    with pytest.raises(TypeError, match="must have a bottleneck"):
        StreamingEncoder(tiny_codec(bottleneck=NoBottleneck()))
    scales = fastvq.HierarchicalVQ(dim=6, scales=[(2,), (4,)], codebook_size=16)
    with pytest.raises(TypeError, match="HierarchicalVQ quantizes a whole signal at once"):
        StreamingEncoder(tiny_codec(bottleneck=scales))
