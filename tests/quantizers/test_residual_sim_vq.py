"""ResidualSimVQ compared with vector_quantize_pytorch's, and its additional features."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator
from ..peers import assert_compiles, assert_same_step, assert_travels, pair

DIM, SIZE, LEVELS = 6, 17, 4


def batch(*shape, seed=0):
    return torch.randn(*(shape or (3, 15, DIM)), generator=generator(seed))


def residual_sim_vq(**options):
    torch.manual_seed(0)
    return fastvq.ResidualSimVQ(dim=DIM, num_quantizers=LEVELS, codebook_size=SIZE, **options)


OPTIONS = {
    "plain": {},
    "one level": {"num_quantizers": 1, "quantize_dropout": True},
    "straight through": {"rotation_trick": False},
    "another frozen dimension": {"frozen_codebook_dim": 4},
    "weights": {"input_to_quantize_commit_loss_weight": 0.7, "commitment_weight": 3.0},
    "channel first": {"channel_first": True},
    "dropout": {"quantize_dropout": True},
    "dropout from the third": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 2},
    "dropout by twos": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    "dropout, channel first": {"quantize_dropout": True, "channel_first": True},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_steps(kind, training):
    options = {"dim": DIM, "num_quantizers": LEVELS, "codebook_size": SIZE} | OPTIONS[kind]
    ours, theirs = (module.train(training) for module in pair("ResidualSimVQ", **options))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (ours, theirs)]
    shape = (2, DIM, 3, 4) if "channel first" in kind else (2, 11, DIM)
    for seed in range(5):
        quantized, indices, _, codes = assert_same_step(
            ours, theirs, batch(*shape, seed=seed), seed=seed, return_all_codes=True
        )
        close(codes.sum(0).detach(), quantized.detach())
        close(ours.get_output_from_indices(indices).detach(), theirs.get_output_from_indices(indices).detach())
        for optimizer in optimizers:
            optimizer.step()
    close(ours.codebooks.detach(), theirs.codebooks.detach())
    assert (ours.codebook_size, ours.codebook_dim) == (SIZE, DIM)


@pytest.mark.parametrize("seed", range(4))
def test_a_given_seed_decides_the_dropout(seed):
    options = {"dim": DIM, "num_quantizers": LEVELS, "codebook_size": SIZE, "quantize_dropout": True}
    ours, theirs = pair("ResidualSimVQ", **options)
    assert_same_step(ours, theirs, batch(), rand_quantize_dropout_fixed_seed=seed)


@pytest.mark.parametrize("shape", [(DIM,), (3, 4, DIM), (2, 3, 2, DIM)])
@pytest.mark.parametrize("channel_first", [True, False])
def test_dropout_with_any_spatial_axes(shape, channel_first):
    """The peer's shapes disagree for channels last, except for sequences."""
    ours = residual_sim_vq(quantize_dropout=True, channel_first=channel_first)
    x = batch(5, *shape)
    x = x.movedim(-1, 1) if channel_first else x
    quantized, indices, losses, codes = ours(x, return_all_codes=True, rand_quantize_dropout_fixed_seed=1)
    kept = int((losses != 0).sum())
    assert 0 < kept < LEVELS
    assert indices.shape == (5, *shape[:-1], LEVELS)
    assert quantized.shape == x.shape
    assert (indices[..., kept:] == -1).all()
    assert (indices[..., :kept] >= 0).all()
    assert not codes[kept:].any()
    assert codes.shape == (LEVELS, *x.shape)
    close(ours.get_output_from_indices(indices[..., :kept]).detach(), quantized.detach())
    (quantized.sum() + losses.sum()).backward()
    for level, layer in enumerate(ours.layers):
        assert (layer.code_transform.weight.grad is not None) == (level < kept)


def test_coarse_indices_decode_without_dropout_too():
    ours = residual_sim_vq().eval()
    indices = ours(batch())[1][..., :2]
    expected = sum(layer.indices_to_codes(indices[..., level]) for level, layer in enumerate(ours.layers[:2]))
    close(ours.get_output_from_indices(indices).detach(), expected.detach())


def test_non_finite_rows():
    ours = residual_sim_vq()
    x = batch()
    x[1, 4, 0] = torch.nan
    x.requires_grad_()
    quantized, indices, losses = ours(x)
    (quantized.sum() + losses.sum()).backward()
    assert (indices[1, 4] == -1).all()
    assert not quantized[1, 4].any()
    assert not x.grad[1, 4].any()
    counts = torch.ones(3, 15, dtype=torch.bool)
    counts[1, 4] = False
    expected, expected_indices, expected_losses = ours(x.detach()[counts])
    assert torch.equal(indices[counts], expected_indices)
    assert torch.equal(quantized[counts], expected)
    close(losses.detach(), expected_losses.detach())
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    ours = residual_sim_vq()
    x = batch().to(dtype)
    quantized, indices, losses = ours(x)
    exact, exact_indices, exact_losses = ours(x.float())
    assert quantized.dtype == dtype
    assert torch.equal(indices, exact_indices)
    close(quantized, exact.to(dtype))
    close(losses, exact_losses)
    assert ours.to(dtype)(x)[0].dtype == dtype


def test_health():
    ours = residual_sim_vq(quantize_dropout=True)
    x = batch()
    indices = ours(x, rand_quantize_dropout_fixed_seed=1)[1]
    counts = torch.stack([level[level >= 0].bincount(minlength=SIZE) for level in indices.flatten(0, -2).T])
    assert torch.equal(ours.code_counts, counts)
    assert ours.usage().shape == ours.quantization_error().shape == (LEVELS,)
    ours.reset_health()
    assert not ours.code_counts.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: residual_sim_vq(heads=2), "heads: must be 1"),
        (lambda: residual_sim_vq(quantize_dropout_cutoff_index=4), "quantize_dropout_cutoff_index: must be an"),
        (lambda: residual_sim_vq(quantize_dropout_multiple_of=0), "quantize_dropout_multiple_of: must be"),
        (lambda: fastvq.ResidualSimVQ(dim=4, num_quantizers=0, codebook_size=4), "num_quantizers: must be"),
        (lambda: residual_sim_vq()(torch.zeros(2, 3, 5)), "x: must have shape"),
        (lambda: residual_sim_vq().get_codes_from_indices(torch.zeros(2, 5).long()), "indices: must have 1 to"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_compiled_training_step():
    """With dropout the graph contains all stages and has as many active as eager mode."""
    assert_compiles(residual_sim_vq(quantize_dropout=True), batch())


def test_travels():
    assert_travels(residual_sim_vq(quantize_dropout=True), batch())
