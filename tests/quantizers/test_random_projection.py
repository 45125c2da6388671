"""RandomProjectionQuantizer compared with vector_quantize_pytorch's, and its additional features."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator
from ..peers import assert_travels, pair

DIM = 12


def batch(*shape, seed=0):
    return torch.randn(*(shape or (3, 15, DIM)), generator=generator(seed))


def quantizer(**options):
    torch.manual_seed(0)
    return fastvq.RandomProjectionQuantizer(**({"dim": DIM, "codebook_size": 20, "codebook_dim": 4} | options))


OPTIONS = [{}, {"num_codebooks": 3}, {"norm": False}, {"num_codebooks": 2, "commitment_weight": 0.25}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_indices_and_cross_entropy(options, training):
    ours, theirs = pair("RandomProjectionQuantizer", dim=DIM, codebook_size=20, codebook_dim=4, **options)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    for seed in range(3):
        x = batch(seed=seed)
        found = ours.train(training)(x)
        assert torch.equal(found, theirs.train(training)(x))
        targets = torch.randint(20, found.shape, generator=generator(seed))
        targets[0, 0] = -1
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss, expected = ours(leaf, targets), theirs(other, targets)
        close(loss.detach(), expected.detach())
        (own_grad,), (peer_grad,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, other)
        close(own_grad, peer_grad)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name])


def test_non_finite_rows():
    ours = quantizer(num_codebooks=2)
    x = batch()
    expected = ours(x)
    x[1, 3, 0] = torch.nan
    found = ours(x)
    assert (found[1, 3] == -1).all()
    found[1, 3] = expected[1, 3]
    assert torch.equal(found, expected)


def test_codes_do_not_depend_on_offset_or_scale():
    ours = quantizer()
    x = batch()
    close(ours(x * 8 + 32), ours(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    """Projections and codes keep their dtype."""
    ours = quantizer()
    x = batch().to(dtype)
    exact = ours(x.float())
    assert torch.equal(ours(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.float()), exact)
    assert torch.equal(ours.to(dtype)(x), exact)
    assert ours.rand_projs.dtype == torch.float32


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_health(num_codebooks):
    ours = quantizer(num_codebooks=num_codebooks)
    found = ours(batch())
    ours.eval()(batch())
    counts = torch.stack([h.flatten().bincount(minlength=20) for h in found.view(3, 15, -1).unbind(-1)])
    assert torch.equal(ours.code_counts, counts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantizer(dim=0), "dim: must be"),
        (lambda: quantizer(codebook_dim=0), "codebook_dim: must be"),
        (lambda: quantizer(num_codebooks=0), "num_codebooks: must be"),
        (lambda: quantizer(codebook_size=0), "codebook_size: must be"),
        (lambda: quantizer()(torch.zeros(2, 3, DIM + 1)), "x: must have shape"),
        (lambda: quantizer()(torch.zeros(2, 3, DIM).long()), "x: must be floating"),
        (lambda: quantizer()(torch.zeros(2, 3, DIM), torch.zeros(2, 4).long()), "indices: must have shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


def test_compiled():
    torch.compiler.reset()
    ours = quantizer(num_codebooks=2)
    step = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(batch()), ours(batch()))


def test_travels():
    assert_travels(quantizer(num_codebooks=2), batch())


def test_masks_and_lengths():
    layer = fastvq.RandomProjectionQuantizer(dim=8, codebook_size=16, codebook_dim=4, num_codebooks=2)
    x, lens = torch.randn(2, 5, 8), torch.tensor([3, 5])
    mask = torch.arange(5) < lens[:, None]
    assert torch.equal(layer(x, mask=mask), layer(x).masked_fill(~mask[..., None], -1))
    assert torch.equal(layer(x, lens=lens), layer(x, mask=mask))
    targets = layer(x)
    torch.testing.assert_close(layer(x, targets, lens=lens), layer(x, targets.masked_fill(~mask[..., None], -1)))
