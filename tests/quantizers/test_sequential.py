"""Sequential: one quantizer of any kind among other modules."""

from __future__ import annotations

import copy

import pytest
import torch
import vector_quantize_pytorch as vqp
from torch import nn

import fastvq

from ..cases import close
from ..contract import vectors

QUANTIZERS = {
    "VectorQuantize": lambda: fastvq.VectorQuantize(8, 16),
    "ResidualVQ": lambda: fastvq.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2),
    "FSQ": lambda: fastvq.FSQ([5, 5, 5], dim=8),
    "ResidualFSQ": lambda: fastvq.ResidualFSQ(levels=[5, 5], num_quantizers=2, dim=8),
    "FSP": lambda: fastvq.FSP([5, 5], dim=8),
    "BinaryMapper": lambda: fastvq.BinaryMapper(8),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer(name):
    quantizer = QUANTIZERS[name]().eval()
    before, x = nn.Linear(8, 8), vectors(2, 9, 8)
    layer = fastvq.Sequential(before, nn.GELU(), quantizer, nn.LazyLinear(3))
    torch.manual_seed(1)
    output, *others = layer(x)
    torch.manual_seed(1)
    quantized, *expected = quantizer(nn.functional.gelu(before(x)))
    close(output, layer.fns[3](quantized))
    assert type(layer(x)) is tuple
    assert len(others) == len(expected)
    assert torch.equal(others[0], expected[0])


def test_equals_the_peer():
    ours = fastvq.Sequential(nn.Linear(8, 8), fastvq.VectorQuantize(8, 16), nn.Linear(8, 8))
    theirs = vqp.Sequential(nn.Linear(8, 8), vqp.VectorQuantize(8, 16), nn.Linear(8, 8))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, mask = vectors(2, 9, 8), vectors(2, 9) > 0
    for one, other in zip(ours(x, mask=mask), theirs(x, mask=mask), strict=True):
        close(one.detach(), other.detach())
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_a_quantizer_that_returns_one_tensor():
    """The peer unpacks the batch."""

    class Indices(fastvq.FSQ):
        def forward(self, z):
            return super().forward(z)[1]

    x = vectors(3, 4, 2)
    (output,) = fastvq.Sequential(Indices([5, 5]))(x)
    assert torch.equal(output, fastvq.FSQ([5, 5])(x)[1])


@torch.no_grad()
def test_encodes_decodes_and_learns_through_its_modules():
    torch.manual_seed(0)
    chain = fastvq.Sequential(nn.Linear(6, 4), nn.Tanh(), fastvq.VectorQuantize(4, 16), nn.Linear(4, 6)).eval()
    x, lens = vectors(3, 40, 6), torch.tensor([40, 0, 7])
    output, indices, _ = chain(x)
    assert torch.equal(chain.encode(x), indices)
    assert torch.equal(chain.encode(x, lens=lens), chain(x, lens=lens)[1])
    assert (chain.encode(x, lens=lens)[1] == -1).all()
    close(chain.get_output_from_indices(indices), output)
    twin = copy.deepcopy(chain)
    torch.manual_seed(1)
    fitted = chain.fit([x, x])
    torch.manual_seed(1)
    latents = twin.fns[1](twin.fns[0](x))
    assert torch.equal(fitted.errors, twin.quantizer.fit([latents, latents]).errors)
    assert torch.equal(chain.quantizer.codebook, twin.quantizer.codebook)
    chain.resize_(8)
    assert chain.encode(x).max() < 8
    chain.decay = 0.5
    assert chain.quantizer.decay == chain.decay == 0.5


@pytest.mark.parametrize("name", ["decay", "freeze_codebook"])
def test_what_the_quantizer_does_not_have_cannot_be_assigned(name):
    chain = fastvq.Sequential(nn.Linear(2, 2), fastvq.FSQ([5, 5]))
    with pytest.raises(AttributeError, match=f"^{name}: FSQ has no such attribute"):
        setattr(chain, name, 0.5)
    assert not hasattr(chain.quantizer, name)


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one(count):
    with pytest.raises(ValueError, match=r"^fns: must contain exactly one quantizer, got (none|FSQ, FSQ)"):
        fastvq.Sequential(nn.Linear(2, 2), *[fastvq.FSQ([5, 5]) for _ in range(count)])


def test_health_is_the_quantizers():
    quantizer = fastvq.VectorQuantize(8, 16)
    chain = fastvq.Sequential(torch.nn.Identity(), quantizer)
    chain(torch.randn(2, 5, 8))
    assert int(chain.code_counts.sum()) == 10
    assert chain.usage() == quantizer.usage() > 0
    chain.reset_health()
    assert chain.usage().isnan(), "nothing was counted"
