"""FSP compared with its peer, its distributions, and its moments."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import vector_quantize_pytorch as vqp
from vector_quantize_pytorch import finite_scalar_perturbation as theirs_module

import fastvq
from fastvq.parts import losses as moments
from fastvq.parts.scalar import CUMULATIVE, SYMMETRIC
from fastvq.quantizers import fsp

from .. import contract
from ..cases import HALF, close
from ..contract import vectors

LEVELS = [8, 5, 5, 4]
OPTIONS = {
    "plain": {},
    "projected": {"dim": 7},
    "projected without bias": {"dim": 7, "projection_has_bias": False},
    "channels first": {"channel_first": True, "dim": 5},
    "inverse": {"need_inv_act": True},
    "half": {"quantize_rate": 0.5},
    "half, inverse": {"quantize_rate": 0.5, "need_inv_act": True},
    "quantized": {"quantize_rate": 1.0},
    **{name: {"act_name": name} for name in CUMULATIVE},
    **{f"{name}, inverse": {"act_name": name, "need_inv_act": True} for name in CUMULATIVE},
    **{f"norm {name}": {"vector_norm": name} for name in moments.PRESETS},
}


def pair(**options):
    ours, theirs = fastvq.FSP(LEVELS, **options), vqp.FSP(LEVELS, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_the_norm_has_the_presets_of_the_peer():
    ours, theirs = (inspect.signature(module.VectorNorm).parameters for module in (moments, theirs_module))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_equals_the_peer(kind, training):
    ours, theirs = (module.train(training) for module in pair(**OPTIONS[kind]))
    x = vectors(3, 40, ours.dim)
    contract.assert_steps_agree(ours, theirs, x.transpose(1, 2) if ours.channel_first else x)
    contract.assert_checkpoints_load_both_ways(ours, theirs)


def test_eps_equals_the_peers():
    ours, theirs = (module.eval() for module in pair(need_inv_act=True))
    x = 3 * vectors(3, 40, 4)
    contract.assert_steps_agree(ours, theirs, x, eps=0.23)
    assert not torch.equal(ours(x)[1], ours(x, eps=0.23)[1])


def test_methods_equal_the_peers():
    ours, theirs = pair()
    indices = torch.arange(800)[None]
    levels = theirs.indices_to_level_indices(indices)
    assert torch.equal(ours.indices_to_level_indices(indices), levels)
    assert torch.equal(ours.level_indices_to_indices(levels), theirs.level_indices_to_indices(levels))
    assert torch.equal(ours.level_indices_to_indices(levels.float()), indices.int())
    close(ours.indices_to_act_value(indices), theirs.indices_to_act_value(indices))
    close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))
    p = torch.rand(20, 4)
    for one, other in zip(ours.quantize_act_value(p, 1e-6), theirs.quantize_act_value(p, 1e-6), strict=True):
        close(one, other)
    assert repr(ours).startswith("FSP(levels=[8, 5, 5, 4], codebook_size=800")


@pytest.mark.parametrize("name", CUMULATIVE)
def test_distributions(name):
    f = CUMULATIVE[name]
    act, inverse = fsp.build_cdf_act(name)
    z = torch.tensor([-4.0, -2.0, -0.3, 0.0, 0.3, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    p = act(z)
    close(inverse(p), z.detach())
    close(p, theirs_module.build_cdf_act(name)[0](z).detach())
    (slope,) = torch.autograd.grad(p.sum(), z)
    close(f.slope(z, p).detach(), slope)
    assert slope[3] > 0  # the peer's Laplace has none at zero
    assert p[3] == 0.5


@pytest.mark.parametrize("name", SYMMETRIC)
def test_slopes(name):
    f = SYMMETRIC[name]
    z = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.9, 1.0, 1.1], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f.apply(z).sum(), z)
    close(f.slope(z, f.apply(z)).detach(), slope)


def test_moments_against_numbers_known():
    batch = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [4.0, 4.0]])
    found = moments.batch_stats(batch)
    close(found.mean, torch.tensor([1.0, 2.5]))
    close(found.variance, torch.tensor([4.0, 5 / 3]))
    close(found.skewness, torch.tensor([(3 * -1 + 27) / 8 / 4, 0.0]))
    close(found.kurtosis, torch.tensor([(3 + 81) / 16 / 4 - 3, 2 * (1.5**4 + 0.5**4) / 4 / (5 / 3) ** 2 - 3]))
    for one, other in zip(found, theirs_module.batch_stats(batch), strict=True):
        close(one, other)


@pytest.mark.parametrize("rows", [0, 1, 3], ids=lambda rows: f"{rows} rows")
def test_moments_without_spread_have_finite_gradients(rows):
    """The peer's loss is NaN for one row, and its gradient for equal rows."""
    layer = fastvq.FSP(LEVELS, vector_norm="kurt")
    x = torch.ones(1, rows, 4, requires_grad=True)
    _, _, loss, _ = layer(x)
    loss.backward()
    assert x.grad.isfinite().all()
    assert (loss > 0) == (rows > 1)


def test_perturbation_stays_within_half_a_bin():
    layer = fastvq.FSP(LEVELS)
    x = vectors(50, 100, 4)
    quantized, indices, _, details = layer(x)
    p = quantized * fsp.UNIT + 0.5
    assert ((p - CUMULATIVE["tanh"].apply(x)).abs() <= 0.5 / layer._levels + 1e-6).all()
    assert ((p > 0) & (p < 1)).all()
    assert 0.9 < details["p_accept_prob"] < 1
    assert torch.equal(indices, layer.eval()(x)[1])


@pytest.mark.parametrize("name", CUMULATIVE)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_moves_no_index(name, dtype):
    layer = fastvq.FSP(LEVELS, act_name=name)
    x = vectors(4, 300, 4).to(dtype)
    expected = layer(x.float())[1]
    assert torch.equal(layer(x)[1], expected)
    assert torch.equal(copy.deepcopy(layer).to(dtype)(x)[1], expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x.float())[1], expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_modules_in_half_precision(dtype):
    results = contract.assert_half_works(lambda: fastvq.FSP(LEVELS, dim=6), vectors(2, 9, 6), dtype)
    assert results[2].dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"dim": 6}, {"need_inv_act": True, "quantize_rate": 0.5}], ids=str)
def test_non_finite_rows(options):
    layer = fastvq.FSP(LEVELS, **options)
    mask, indices, twin = contract.assert_non_finite_rows_are_excluded(layer, vectors(2, 6, layer.dim))
    assert (indices[~mask] == -1).all()
    assert (indices[mask] >= 0).all()
    assert torch.equal(layer.code_counts, twin.code_counts)
    assert not layer.indices_to_codes(indices)[~mask].any()


def test_masked_rows_are_in_no_moment():
    layer, x = fastvq.FSP(LEVELS, vector_norm="kurt"), vectors(2, 6, 4)
    x[:, 4:] = 100
    _, indices, loss, details = layer(x, lens=torch.tensor([4, 4]))
    expected = layer(x[:, :4])
    close(loss, expected[2])
    assert torch.equal(indices[:, :4], expected[1])
    assert (details["level_indices"][:, 4:] == -1).all()


def test_more_codes_than_int32_can_number():
    layer = fastvq.FSP([16] * 9)
    x = vectors(1, 50, 9)
    _, indices, _, details = layer(x)
    assert indices.dtype == torch.int64
    assert torch.equal(layer.indices_to_level_indices(indices), details["level_indices"].long())
    assert layer.usage().shape == (9,)


def test_health():
    layer = fastvq.FSP([2], quantize_rate=1.0)
    layer(torch.tensor([[[-math.atanh(0.5)], [0.0], [math.atanh(0.5)]]]))
    assert layer.code_counts.tolist() == [1, 2]
    assert layer.quantization_error().item() == pytest.approx(0.0625 / 3)


def test_shapes_and_copies():
    layer = fastvq.FSP(LEVELS, dim=6)
    for shape in [(0, 5, 6), (2, 0, 6), (4, 6), (2, 3, 4, 6)]:
        quantized, indices, loss, details = layer(torch.randn(shape))
        assert (quantized.shape, indices.shape, loss.shape) == (shape, shape[:-1], ())
        assert details["level_indices"].shape == (*shape[:-1], 4)
    contract.assert_copies_go_on_alike(layer, vectors(2, 9, 6))
    contract.assert_inference_mode_works(layer, vectors(2, 9, 6))


def test_checkpointing():
    contract.assert_checkpointing_changes_nothing(fastvq.FSP(LEVELS, dim=6, quantize_rate=0.5), vectors(2, 9, 6))


def test_exported():
    contract.assert_exports(fastvq.FSP(LEVELS, dim=6), vectors(2, 9, 6))


def test_compiled():
    contract.assert_compiles(fastvq.FSP(LEVELS, dim=6, quantize_rate=1.0), vectors(2, 9, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_rate": 1.5}, "quantize_rate: must lie in"),
        ({"act_name": "gumbel"}, "act_name: must be one of tanh, sigmoid, normal, laplace, cauchy, got 'gumbel'"),
        ({"vector_norm": "mean"}, "vector_norm: must be one of none, var"),
        ({"levels": [0]}, "levels: must be"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fastvq.FSP(**{"levels": LEVELS, **options})
