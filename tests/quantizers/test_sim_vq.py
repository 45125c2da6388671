"""SimVQ compared with vector_quantize_pytorch's, and its additional features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvq

from ..cases import close, generator
from ..peers import assert_compiles, assert_same_outputs, assert_same_step, assert_travels, pair, vqp

DIM, SIZE = 6, 23


def batch(*shape, seed=0):
    return torch.randn(*(shape or (3, 15, DIM)), generator=generator(seed))


def transform():
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, DIM))


OPTIONS = {
    "plain": {},
    "straight through": {"rotation_trick": False},
    "weights": {"input_to_quantize_commit_loss_weight": 0.7, "commitment_weight": 3.0},
    "no pull on x": {"input_to_quantize_commit_loss_weight": 0.0},
    "another frozen dimension": {"frozen_codebook_dim": 4},
    "a transform": {"codebook_transform": transform, "frozen_codebook_dim": 4},
    "init_fn": {"init_fn": lambda codebook: codebook.clamp(-0.5, 0.5)},
    "channel first": {"channel_first": True},
}
SHAPES = {"channel first": [(3, DIM, 5), (2, DIM, 3, 4), (2, DIM, 2, 2, 3), (7, DIM)]}


def built(kind):
    options = dict(OPTIONS[kind])
    if "codebook_transform" not in options:
        return pair("SimVQ", DIM, SIZE, **options)
    ours, theirs = (pair_transform(module, options) for module in (fastvq, vqp))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def pair_transform(package, options):
    return package.SimVQ(DIM, SIZE, **(options | {"codebook_transform": options["codebook_transform"]()}))


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_steps(kind, training):
    ours, theirs = (module.train(training) for module in built(kind))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (ours, theirs)]
    shapes = SHAPES.get(kind, [(3, 15, DIM), (2, 3, 4, DIM), (7, DIM), (1, 1, DIM)])
    for seed, shape in enumerate(shapes):
        _, indices, _ = assert_same_step(ours, theirs, batch(*shape, seed=seed))
        close(ours.indices_to_codes(indices).detach(), theirs.indices_to_codes(indices).detach())
        for optimizer in optimizers:
            optimizer.step()
    close(ours.codebook, theirs.codebook)


def test_decoding_uses_the_whole_transformed_codebook():
    """A transform need not map rows one by one."""
    sim_vq = fastvq.SimVQ(DIM, SIZE, nn.Softmax(dim=0))
    indices = torch.tensor([[3, 22, 3, -1]])
    expected = sim_vq.frozen_codebook.softmax(0)[indices.clamp_min(0)] * (indices >= 0)[..., None]
    assert torch.equal(sim_vq.indices_to_codes(indices), expected)


def test_decoding_updates_a_batch_norm_once():
    sim_vq = fastvq.SimVQ(DIM, SIZE, nn.BatchNorm1d(DIM))
    sim_vq.indices_to_codes(torch.zeros(2, 3, dtype=torch.int64))
    assert sim_vq.code_transform.num_batches_tracked == 1


def test_indices_are_exact_at_an_offset():
    sim_vq = fastvq.SimVQ(DIM, 100, nn.Linear(DIM, DIM))
    with torch.no_grad():
        sim_vq.code_transform.bias.fill_(1e3)
    x = 1e3 + batch(200, DIM)
    distances = (x.double()[:, None] - sim_vq.codebook.double()).square().sum(-1)
    assert torch.equal(sim_vq(x)[1], distances.argmin(1))


@pytest.mark.parametrize("rotation_trick", [True, False])
def test_non_finite_rows(rotation_trick):
    sim_vq = fastvq.SimVQ(DIM, SIZE, rotation_trick=rotation_trick)
    x = batch()
    good = x.clone().requires_grad_()
    x[0, 3, 2], x[2, 0, 1] = torch.nan, torch.inf
    poisoned = x.requires_grad_()
    quantized, indices, loss = sim_vq(poisoned)
    (quantized.sum() + loss).backward()
    row_mask = torch.ones(3, 15, dtype=torch.bool)
    row_mask[0, 3] = row_mask[2, 0] = False
    weight_grad = sim_vq.code_transform.weight.grad.clone()
    sim_vq.zero_grad()
    expected, expected_indices, expected_loss = sim_vq(good[row_mask])
    (expected.sum() + expected_loss).backward()
    assert torch.equal(indices[row_mask], expected_indices)
    assert (indices[~row_mask] == -1).all()
    assert not quantized[~row_mask].any()
    assert not poisoned.grad[~row_mask].any()
    close(loss.detach(), expected_loss.detach())
    close(poisoned.grad[row_mask], good.grad[row_mask])
    torch.testing.assert_close(weight_grad, sim_vq.code_transform.weight.grad, rtol=1e-4, atol=1e-6)


def test_empty_batch():
    quantized, indices, loss = fastvq.SimVQ(DIM, SIZE)(torch.zeros(0, 4, DIM))
    assert quantized.shape == (0, 4, DIM)
    assert indices.shape == (0, 4)
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    ours, _theirs = pair("SimVQ", DIM, SIZE)
    x = batch().to(dtype)
    quantized, indices, loss = ours(x)
    assert quantized.dtype == dtype
    assert loss.dtype == torch.float32
    exact = ours(x.float())
    assert torch.equal(indices, exact[1])
    close(quantized.float(), exact[0], dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.float())[1], exact[1])
    before = ours.frozen_codebook.clone()
    ours.to(dtype)
    assert ours.code_transform.weight.dtype == dtype
    assert ours(x)[0].dtype == dtype
    assert torch.equal(ours.frozen_codebook, before)
    assert ours.state_dict()["frozen_codebook"].dtype == torch.float32


def test_health():
    sim_vq = fastvq.SimVQ(DIM, SIZE)
    x = batch()
    quantized, indices, _ = sim_vq(x)
    sim_vq.eval()(x)
    assert torch.equal(sim_vq.code_counts, indices.flatten().bincount(minlength=SIZE))
    close(sim_vq.quantization_error(), (x - quantized).square().mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastvq.SimVQ(0, 4), "dim: must be"),
        (lambda: fastvq.SimVQ(4, 0), "codebook_size: must be"),
        (lambda: fastvq.SimVQ(4, 4, frozen_codebook_dim=0), "frozen_codebook_dim: must be"),
        (lambda: fastvq.SimVQ(4, 4, input_to_quantize_commit_loss_weight=-1), "input_to_quantize_commit_loss_weight"),
        (lambda: fastvq.SimVQ(4, 4)(torch.zeros(2, 5)), "x: must have shape"),
        (lambda: fastvq.SimVQ(4, 4)(torch.zeros(2, 4, dtype=torch.int64)), "x: must be floating"),
        (lambda: fastvq.SimVQ(4, 4, nn.Linear(4, 5))(torch.zeros(2, 4)), "codebook: must have the dimension"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


def test_compiled_training_step():
    assert_compiles(fastvq.SimVQ(DIM, SIZE, transform(), frozen_codebook_dim=4), batch())


def test_travels():
    assert_travels(fastvq.SimVQ(DIM, SIZE), batch())


def test_the_peers_example():
    ours, theirs = pair("SimVQ", dim=16, codebook_size=64, rotation_trick=True, channel_first=True)
    x = batch(1, 16, 8, 8)
    assert_same_outputs(ours(x), theirs(x))
    assert torch.equal(ours(x)[0], ours.indices_to_codes(ours(x)[1]))


def test_masks():
    layer = fastvq.SimVQ(6, 10)
    x = torch.randn(2, 5, 6)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    quantized, indices, loss = layer(x, mask=mask)
    assert (indices[~mask] == -1).all()
    assert not quantized[~mask].any()
    close(loss, layer(x[mask])[2])
    for one, other in zip(layer(x, lens=torch.tensor([3, 5])), (quantized, indices, loss), strict=True):
        assert torch.equal(one, other)
