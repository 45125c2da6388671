"""torch.export, AOTInductor and TorchScript traces of layers in eval mode: saved, loaded, run at other batch sizes."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import fastvq
from fastvq import models

from ..every import QUANTIZERS, batch_for, make, tensors

DIM = 8

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


class Model(nn.Module):
    """Encoder of a VQ-VAE, followed by a layer for images and a stack of codebooks."""

    def __init__(self):
        super().__init__()
        self.encoder = models.Encoder(1, DIM, width=8, residual_width=4, residual_blocks=1)
        self.layer = fastvq.VectorQuantize(DIM, 32, codebook_dim=4, accept_image_fmap=True)
        self.stack = fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=16, accept_image_fmap=True)

    def forward(self, image):
        features = self.encoder(image)
        return features, *self.layer(features), *self.stack(features)


def check(model, outputs):
    """Check that the indices, outputs and losses belong to the features that the same program computed."""
    features, *quantized = outputs
    expected = (*model.layer(features), *model.stack(features))
    for ours, other in zip(quantized, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
    for indices in (1, 4):
        assert torch.equal(quantized[indices], expected[indices])


def test_export_and_ahead_of_time_compilation(tmp_path):
    """One program is saved, loaded and compiled.

    The compiled one runs in a process that imports fastvq but not the model.
    """
    model = Model().eval()
    example, other = torch.randn(3, 1, 16, 16), torch.randn(5, 1, 16, 16)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    outputs = loaded.module()(other)
    torch.testing.assert_close(outputs[0], model(other)[0])
    check(model, outputs)

    package = torch._inductor.aoti_compile_and_package(loaded, package_path=str(tmp_path / "compiled.pt2"))
    torch.save(other, tmp_path / "other.pt")
    code = (
        "import torch, fastvq\n"
        f"run = torch._inductor.aoti_load_package({package!r})\n"
        f"torch.save(run(torch.load({str(tmp_path / 'other.pt')!r})), {str(tmp_path / 'outputs.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    compiled = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(compiled[0], outputs[0], rtol=1e-4, atol=1e-5)
    check(model, compiled)


LAYERS = {
    "plain": lambda: fastvq.VectorQuantize(DIM, 20),
    "projected": lambda: fastvq.VectorQuantize(DIM, 20, codebook_dim=4),
    "cosine": lambda: fastvq.VectorQuantize(DIM, 20, use_cosine_sim=True),
    "residual": lambda: fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=20),
    "residual, sizes": lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=(20, 30), codebook_dim=4),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("strict", [True, False])
def test_layers_export(kind, strict):
    layer = LAYERS[kind]().eval()
    program = torch.export.export(
        layer, (torch.randn(2, 5, DIM),), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},), strict=strict
    )
    x = torch.randn(3, 7, DIM)
    x[1, 2, 3] = torch.nan
    for ours, expected in zip(program.module()(x), layer(x), strict=True):
        assert torch.equal(ours, expected)


# These take the number of vectors of the example: their searches go over the rows in pieces.
ONE_SIZE = ("residual, beam", "residual, implicit", "residual, implicit, preselected")


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer_exports(kind):
    layer = make(kind).eval()
    axes = {0: Dim("batch"), 2 if kind == "LatentQuantize" else 1: Dim("length")}
    shapes = None if kind in ONE_SIZE else (axes,)
    program = torch.export.export(layer, (batch_for(kind),), dynamic_shapes=shapes).module()
    x = batch_for(kind, seed=1) if kind in ONE_SIZE else batch_for(kind, rows=3, length=7, seed=1)
    ours, expected = tensors(program(x)), tensors(layer(x))
    assert len(ours) == len(expected)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("kind", LAYERS)
def test_traces_are_saved(kind):
    layer = LAYERS[kind]().eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(2, 5, DIM))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = torch.randn(3, 7, DIM)
    for ours, expected in zip(torch.jit.load(file)(x), layer(x), strict=True):
        assert torch.equal(ours, expected)


def test_the_specification_exports():
    """A traced program runs on the backend that serves in its process."""
    layer = LAYERS["residual"]().eval()
    program = torch.export.export(layer, (torch.randn(2, 5, DIM),)).module()
    x = torch.randn(2, 5, DIM)
    with fastvq.use_backend("reference"):
        indices = program(x)[1]
    assert torch.equal(indices, program(x)[1])
