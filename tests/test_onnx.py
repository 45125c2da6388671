"""ONNX files of layers, run by onnxruntime: the indices are the exact ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import fastvq
from fastvq import models
from fastvq.backends import reference

from .cases import ADVERSARIAL, FLOAT64_ONLY, METRICS, close, generator

pytest.importorskip("onnxscript", reason="onnxscript isn't installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed")

import fastvq.onnx as fastvq_onnx  # noqa: E402

# More codes than are compared at once, and not a multiple of that.
N, K, D = 40, fastvq_onnx.CODES_AT_ONCE + 60, 7

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run(path, *arguments):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {i.name: a.detach().numpy() for i, a in zip(session.get_inputs(), arguments, strict=True)}
    return [torch.from_numpy(np.array(result)) for result in session.run(None, feed)]


class Searches(nn.Module):
    """Both metrics of x (N, D) among codes (K, D), and residual search."""

    def forward(self, x, codebook, codebooks, mask):
        return (
            *(fastvq.search(x, codebook, metric=metric, mask=m) for metric in METRICS for m in (None, mask)),
            fastvq.residual_search(x, codebooks),
            fastvq.search(torch.stack([x, x.flip(0)]), torch.stack([codebook, codebook.flip(0)])),
        )


def of_searches(x, codebook, codebooks, mask):
    return (
        *(
            reference.search(x, codebook, metric=metric).masked_fill(~m, -1)
            for metric in METRICS
            for m in (torch.ones_like(mask), mask)
        ),
        reference.residual_search(x, codebooks),
        torch.stack([reference.search(x, codebook), reference.search(x.flip(0), codebook.flip(0))]),
    )


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """Return the file of `Searches` in a dtype, written once."""
    written = {}

    def path(dtype):
        if dtype not in written:
            written[dtype] = tmp_path_factory.mktemp("onnx") / f"{dtype}.onnx"
            example = torch.zeros(N, D, dtype=dtype), torch.zeros(K, D, dtype=dtype), torch.zeros(2, K, D, dtype=dtype)
            shapes = [{0: Dim.DYNAMIC}, None, None, {0: Dim.DYNAMIC}]
            mask = torch.ones(N, dtype=torch.bool)
            fastvq_onnx.export(Searches().eval(), (*example, mask), written[dtype], dynamic_shapes=shapes)
        return written[dtype]

    return path


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [(torch.float32, ADVERSARIAL), (torch.float64, FLOAT64_ONLY)],
    ids=["float32", "float64"],
)
def test_searches_agree_on_adversarial_data(searches, dtype, cases):
    wrong = []
    for name, data in cases.items():
        x, codebook = (t.to(dtype) for t in data(N, K, D, generator()))
        codebooks = torch.stack([codebook, codebook * 0.25])
        mask = torch.rand(N, generator=generator(1)) < 0.7
        arguments = (x, codebook, codebooks, mask)
        for i, (ours, expected) in enumerate(
            zip(run(searches(dtype), *arguments), of_searches(*arguments), strict=True)
        ):
            if not torch.equal(ours, expected):
                wrong.append(f"{name}, output {i}: {int((ours != expected).sum())} indices")
    assert wrong == []


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_any_number_of_rows(searches, n):
    x, codebook = ADVERSARIAL["non_finite_vectors"](n, K, D, generator())
    arguments = (x, codebook, codebook.repeat(2, 1, 1), torch.ones(n, dtype=torch.bool))
    for ours, expected in zip(run(searches(torch.float32), *arguments), of_searches(*arguments), strict=True):
        assert torch.equal(ours, expected)


LAYERS = {
    "projected": lambda: fastvq.VectorQuantize(D, 30, codebook_dim=4),
    "cosine": lambda: fastvq.VectorQuantize(D, 30, use_cosine_sim=True),
    "residual": lambda: fastvq.ResidualVQ(dim=D, num_quantizers=3, codebook_size=30),
    "residual, sizes": lambda: fastvq.ResidualVQ(dim=D, codebook_size=(30, 20), codebook_dim=5),
    "SimVQ": lambda: fastvq.SimVQ(D, 30),
    "bits": lambda: fastvq.LFQ(dim=D, codebook_size=16, orthogonal_rotation=True),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(tmp_path, kind):
    """Encoding and decoding, at another batch size and length; a non-finite row and a masked code."""
    layer = LAYERS[kind]().eval()
    shapes = [{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}]
    fastvq_onnx.export(layer, torch.randn(2, 5, D), tmp_path / "forward.onnx", dynamic_shapes=shapes)
    x = torch.randn(3, 8, D, generator=generator())
    x[1, 2, 3] = torch.nan
    quantized, indices, loss = run(tmp_path / "forward.onnx", x)
    expected = layer(x)
    close(quantized, expected[0].detach())
    assert torch.equal(indices, expected[1])
    assert (indices[1, 2] == -1).all()
    close(loss, expected[2].detach())

    if kind == "residual":
        return
    decode = "get_output_from_indices" if hasattr(layer, "get_output_from_indices") else "indices_to_codes"
    fastvq_onnx.export(layer, indices, tmp_path / "decode.onnx", method=decode, dynamic_shapes=shapes)
    indices = indices.flip(0)[:2]
    (decoded,) = run(tmp_path / "decode.onnx", indices)
    close(decoded, getattr(layer, decode)(indices).detach())


def test_a_model_around_a_layer(tmp_path):
    """The encoder's output may differ from torch's in the last digit; the indices of that output may not."""
    encoder = models.Encoder(1, 8, width=8, residual_width=4, residual_blocks=1)

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.quantizer = encoder, fastvq.VectorQuantize(8, 32, accept_image_fmap=True)

        def forward(self, image):
            features = self.encoder(image)
            return features, *self.quantizer(features)[:2]

    model = Codes().eval()
    fastvq_onnx.export(model, torch.randn(2, 1, 16, 16), tmp_path / "model.onnx", output_names=["z", "q", "codes"])
    features, quantized, indices = run(tmp_path / "model.onnx", torch.randn(5, 1, 16, 16))
    assert torch.equal(indices, model.quantizer(features)[1])
    assert torch.equal(quantized, model.quantizer(features)[0])


def test_networks_with_attention_and_group_norm(tmp_path):
    """The networks of the preset vqgan, around a scalar quantizer."""
    torch.manual_seed(0)
    network = {"width": 16, "residual_width": 8, "residual_blocks": 1, "groups": 4, "attention": True}
    encoder, decoder = models.Encoder(3, 8, downsamples=1, **network), models.Decoder(8, 3, upsamples=1, **network)
    model = models.VQVAE(encoder, fastvq.FSQ([8, 5, 5], dim=8), decoder).eval()
    x = torch.rand(5, 3, 8, 12)
    path = tmp_path / "model.onnx"
    fastvq_onnx.export(model, x[:2], path, method="reconstruct")
    torch.testing.assert_close(run(path, x)[0], model.reconstruct(x), atol=1e-5, rtol=0)


def test_half_precision_codes_and_vectors(tmp_path):
    class Half(nn.Module):
        def forward(self, x, codebook):
            return fastvq.search(x.bfloat16(), codebook.half())

    shapes = [{0: Dim.DYNAMIC}, None]
    fastvq_onnx.export(
        Half().eval(), (torch.zeros(N, D), torch.zeros(K, D)), tmp_path / "half.onnx", dynamic_shapes=shapes
    )
    for name, data in ADVERSARIAL.items():
        x, codebook = data(N, K, D, generator())
        expected = reference.search(x.bfloat16(), codebook.half())
        assert torch.equal(run(tmp_path / "half.onnx", x, codebook)[0], expected), name


def test_the_file_holds_the_codebook_alone(tmp_path):
    layer = fastvq.VectorQuantize(64, 2048).eval()
    fastvq_onnx.export(layer, torch.randn(1, 4, 64), tmp_path / "layer.onnx")
    assert (tmp_path / "layer.onnx").stat().st_size < 1.2 * 4 * 64 * 2048
    names = [i.name for i in onnxruntime.InferenceSession(tmp_path / "layer.onnx").get_inputs()]
    assert names == ["x"]


def test_refusals(tmp_path):
    layer = fastvq.VectorQuantize(D, 8)
    with pytest.raises(ValueError, match="module: must be in eval mode"):
        fastvq_onnx.export(layer, torch.randn(2, 3, D), tmp_path / "layer.onnx")
    with pytest.raises(TypeError, match="method: must name a method of VectorQuantize, got 'encod'"):
        fastvq_onnx.export(layer.eval(), torch.randn(2, 3, D), tmp_path / "layer.onnx", method="encod")
    assert list(tmp_path.iterdir()) == []
