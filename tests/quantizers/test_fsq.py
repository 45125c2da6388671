"""FSQ compared with vector_quantize_pytorch's, its exactness, and its additional features."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import vector_quantize_pytorch as vqp

import fastvq
from fastvq.parts.scalar import Bound

from .. import contract
from ..cases import HALF
from ..contract import vectors

OPTIONS = {
    "plain": {},
    "symmetric": {"preserve_symmetry": True},
    "clamped": {"bound_hard_clamp": True},
    "symmetric, clamped": {"preserve_symmetry": True, "bound_hard_clamp": True},
    "projected": {"dim": 7},
    "projected without bias": {"dim": 7, "projection_has_bias": False},
    "codebooks": {"num_codebooks": 3},
    "codebooks, projected": {"num_codebooks": 2, "dim": 6},
    "kept axis": {"keep_num_codebooks_dim": True},
    "channels first": {"channel_first": True, "dim": 5},
    "noise": {"preserve_symmetry": True, "noise_dropout": 0.5},
    "no indices": {"return_indices": False},
    "not forced": {"force_quantization_f32": False},
}
LEVELS = [[8, 5, 5, 5], [3, 4], [7, 6, 64]]


def pair(levels=(8, 5, 5, 5), **options):
    ours, theirs = fastvq.FSQ(list(levels), **options), vqp.FSQ(list(levels), **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_equals_the_peer(kind, levels):
    for training in (True, False):
        ours, theirs = (module.train(training) for module in pair(levels, **OPTIONS[kind]))
        x = vectors(3, 40, ours.dim, scale=1.5)
        contract.assert_steps_agree(ours, theirs, x.transpose(1, 2) if ours.channel_first else x)
        contract.assert_checkpoints_load_both_ways(ours, theirs)


@pytest.mark.parametrize("kind", ["plain", "projected", "codebooks", "channels first"])
@pytest.mark.parametrize("spatial", [(5, 3), (2, 3, 4)], ids=["image", "video"])
def test_images_and_video(kind, spatial):
    ours, theirs = pair(**OPTIONS[kind])
    x = vectors(2, ours.dim, *spatial)
    contract.assert_steps_agree(ours, theirs, x)
    indices = ours(x)[1]
    contract.assert_close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))
    assert torch.equal(ours.indices_to_codes(indices), ours(x)[0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_rotation(symmetric):
    """The peer's `codes_to_indices` ignores the rotation."""
    ours, theirs = pair([5, 5, 5], orthogonal_rotation=True, preserve_symmetry=symmetric)
    x = vectors(3, 40, 3)
    contract.assert_steps_agree(ours, theirs, x)
    quantized, indices = ours(x)
    torch.testing.assert_close(ours.indices_to_codes(indices), quantized)
    assert torch.equal(ours.codes_to_indices(quantized), indices)
    with pytest.warns(UserWarning, match="orthogonal_rotation"):
        fastvq.FSQ([8, 5], orthogonal_rotation=True)


def test_methods_equal_the_peers():
    ours, theirs = pair()
    z, indices = vectors(2, 50, 4, scale=2.0), torch.arange(1000)
    for name in ("quantize", "bound", "symmetry_preserving_bound"):
        for hard in [False, True] if name != "quantize" else [None]:
            options = {} if hard is None else {"hard_clamp": hard}
            contract.assert_close(getattr(ours, name)(z, **options), getattr(theirs, name)(z, **options))
    contract.assert_close(ours.bound(z, eps=0.1), theirs.bound(z, eps=0.1))
    assert torch.equal(ours.indices_to_level_indices(indices.int()), theirs.indices_to_level_indices(indices.int()))
    assert torch.equal(ours.implicit_codebook, theirs.implicit_codebook)
    assert ours.codebook_size == theirs.codebook_size == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize(("levels", "symmetric"), [((8, 5, 5, 5), False), ((7, 2, 16, 3), True), ((200,), True)])
def test_every_code_comes_back(levels, symmetric, dtype):
    layer = fastvq.FSQ(levels, preserve_symmetry=symmetric)
    indices = torch.arange(layer.codebook_size)
    codes = layer.indices_to_codes(indices[None])[0]
    assert torch.equal(layer.codes_to_indices(codes.to(dtype)), indices.int())
    assert len(codes.unique(dim=0)) == layer.codebook_size
    if symmetric:
        assert torch.equal(codes.flip(0), -codes)
        assert codes.abs().amax() == 1


def test_codes_beyond_the_ends_are_the_ends():
    layer = fastvq.FSQ([4, 4], preserve_symmetry=True)
    codes = torch.tensor([[-1.5, -9.0], [1.4, 7.0], [torch.nan, 0.0]])
    assert layer.codes_to_indices(codes).tolist() == [0, 15, -1]


def rounded_by_the_formula(levels, symmetric, hard, z, eps=1e-3):
    """Return the levels in float64, by formula, and the distance of each value from a tie."""
    size, z = np.array(levels, dtype=np.float64), z.double().numpy()
    f, inverse = (lambda t: np.clip(t, -1, 1), lambda t: t) if hard else (np.tanh, np.arctanh)
    if symmetric:
        exact = (size - 1) * (f(z) + 1) / 2
    else:
        half, offset = (size - 1) * (1 + eps) / 2, np.where(size % 2 == 0, 0.5, 0.0)
        exact = f(z + inverse(offset / half)) * half - offset + size // 2
    margin = np.abs((exact - 0.5) - np.round(exact - 0.5))
    return torch.from_numpy(np.floor(exact + 0.5).clip(0, size - 1)), torch.from_numpy(margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_levels_are_those_of_real_numbers(symmetric, hard, dtype):
    """Values include the float32 neighbors of each threshold, where tanh in float32 errs.

    More than 32 levels take another path.
    """
    levels = (8, 5, 3, 31, 100, 1500)
    bound = Bound(levels, symmetric=symmetric, hard=hard)
    near = bound.thresholds.bounds.T
    near = near[near.isfinite().all(1)]
    z = torch.cat([near, near.nextafter(torch.tensor(-9.0)), near.nextafter(torch.tensor(9.0)), vectors(500, 6) * 2])
    z = z.to(dtype)
    expected, margin = rounded_by_the_formula(levels, symmetric, hard, z)
    found = bound(z if dtype == torch.float64 else z.float()).levels
    clear = margin > 1e-11 * 1500
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear].double(), expected[clear])


def test_the_peer_errs_beside_a_threshold():
    """The reason for thresholds: tanh in float32 puts values on wrong sides, and which ones depends on the device."""
    ours, theirs = pair([8, 8, 8], preserve_symmetry=True)
    near = ours._bound.thresholds.bounds[0]
    near = near[near.isfinite()]
    z = torch.cat([near, near.nextafter(torch.tensor(-9.0)), near.nextafter(torch.tensor(9.0))])[:, None].repeat(1, 3)
    expected, margin = rounded_by_the_formula([8, 8, 8], True, False, z)
    clear = (margin > 1e-11).all(1)
    found = ours.indices_to_level_indices(ours(z[None])[1])[0]
    assert torch.equal(found[clear].double(), expected[clear])
    assert not torch.equal(theirs.indices_to_level_indices(theirs(z[None])[1])[0][clear].double(), expected[clear])


def test_ties_are_rounded_up():
    assert fastvq.FSQ([2, 4], preserve_symmetry=True)(torch.tensor([[0.0, -0.0]]))[1].tolist() == [1 + 2 * 2]
    clamped = Bound([3], symmetric=True, hard=True)
    assert clamped(torch.tensor([[-0.5], [0.5], [-2.0], [2.0]])).levels.flatten().tolist() == [1, 2, 0, 2]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [{}, {"force_quantization_f32": False}, {"orthogonal_rotation": True}], ids=str)
def test_half_precision_and_autocast_move_no_index(options, dtype):
    layer = fastvq.FSQ([8, 8, 8, 8], **options)
    x = vectors(4, 300, 4).to(dtype)
    expected = layer(x.float())[1]
    assert torch.equal(layer(x)[1], expected)
    with torch.autocast("cpu", dtype=dtype):
        quantized, indices = layer(x.float())
    assert torch.equal(indices, expected)
    assert quantized.dtype == torch.float32
    assert torch.equal(copy.deepcopy(layer).to(dtype)(x)[1], expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [{"dim": 6}, {"num_codebooks": 2}], ids=str)
def test_modules_in_half_precision(options, dtype):
    contract.assert_half_works(lambda: fastvq.FSQ([8, 5, 5], **options), vectors(2, 9, 6), dtype)


def test_rotation_keeps_its_precision_in_half_modules():
    layer = fastvq.FSQ([5, 5, 5], orthogonal_rotation=True)
    before = layer.orthogonal_rot.clone()
    assert torch.equal(layer.half().orthogonal_rot, before)
    assert layer.state_dict()["orthogonal_rot"].dtype == torch.float32


def test_more_codes_than_int32_can_number():
    """The peer tries to allocate all 4^16 codes."""
    layer = fastvq.FSQ([4] * 16)
    z = vectors(2, 100, 16)
    quantized, indices = layer(z)
    assert (indices.dtype, layer.codebook_size) == (torch.int64, 2**32)
    assert indices.max() > 2**31
    assert torch.equal(layer.indices_to_codes(indices), quantized)
    assert torch.equal(layer.codes_to_indices(quantized), indices)
    assert layer.code_counts.shape == (16, 4)
    assert layer.usage().shape == (16,)
    with pytest.raises(ValueError, match=r"^levels: have"):
        fastvq.FSQ([256] * 9)
    huge = fastvq.FSQ([256] * 9, return_indices=False)
    assert huge(z[..., :9])[1] is None
    assert (huge.code_counts.sum(1) == 200).all()
    last = torch.full((1, 1, 9), 9.0)
    assert fastvq.FSQ([128] * 9)(last)[1].item() == 2**63 - 1


def test_the_peers_indices_round_beyond_float32():
    """2^27 codes fit int32, but the peer sums place values in float32."""
    levels = [8] * 9
    with torch.no_grad():
        quantized, indices = fastvq.FSQ(levels)(vectors(1, 200, 9))
    theirs = vqp.FSQ(levels, return_indices=False)
    theirs.codebook_size = 8**9
    assert not torch.equal(theirs.codes_to_indices(quantized), indices)
    assert torch.equal(fastvq.FSQ(levels).codes_to_indices(quantized), indices)


@pytest.mark.parametrize("probability", [0.1, 0.9])
def test_noise_has_its_probability(probability):
    """The peer's probability is always one half. Indices are those of the codes without noise."""
    layer = fastvq.FSQ([5, 5], preserve_symmetry=True, noise_dropout=probability)
    x = vectors(10, 1000, 2)
    quantized, indices = layer(x)
    codes = layer.indices_to_codes(indices)
    inside = codes.abs() < 0.6  # the others are clamped half of the time
    assert abs((quantized != codes)[inside].float().mean().item() - probability) < 0.02
    assert (quantized - codes).abs().max() <= 0.5
    assert torch.equal(layer.eval()(x)[0], codes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dim": 6},
        {"num_codebooks": 2},
        {"preserve_symmetry": True, "noise_dropout": 0.5},
        {"orthogonal_rotation": True},
    ],
    ids=str,
)
def test_non_finite_rows(options):
    layer = fastvq.FSQ([5, 5, 5], **options)
    x = vectors(2, 6, layer.dim)
    mask, indices, _ = contract.assert_non_finite_rows_are_excluded(layer, x)
    assert (indices[~mask] == -1).all()
    assert torch.equal(indices[mask], layer(x)[1][mask])
    decoded = layer.eval().indices_to_codes(indices)
    assert not decoded[~mask].any()


def test_overflow_in_half_precision_is_a_non_finite_row():
    layer = fastvq.FSQ([5, 5, 5], dim=4).half()
    torch.nn.init.constant_(layer.project_in.weight, 100.0)
    x = vectors(1, 5, 4).half()
    x[0, 2] = 60000.0
    results, x_grad, grads = contract.step(layer, x)
    assert results[1][0, 2] == -1
    assert not results[0][0, 2].any()
    assert all(g.isfinite().all() for g in (x_grad, *grads.values()))


def test_masks():
    layer = fastvq.FSQ([5, 5])
    x, lens = vectors(3, 7, 2), torch.tensor([2, 7, 0])
    quantized, indices = layer(x, lens=lens)
    expected_mask = torch.arange(7) < lens[:, None]
    assert torch.equal(indices >= 0, expected_mask)
    assert torch.equal(quantized, torch.where(expected_mask[..., None], layer(x)[0], 0))
    image = vectors(2, 2, 4, 3)
    mask = vectors(2, 4, 3) > 0
    assert torch.equal(layer(image, mask=mask)[1] >= 0, mask)


def test_health():
    layer = fastvq.FSQ([3, 3], preserve_symmetry=True, bound_hard_clamp=True)
    x = torch.tensor([[-1.0, -1.0], [1.0, 0.8], [1.0, 1.0], [torch.nan, 0.0]])
    layer(x)
    assert layer.code_counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 2]
    close_to = pytest.approx
    assert layer.quantization_error().item() == close_to(0.2**2 / 6)
    assert layer.usage().item() == close_to(2 / 9)
    assert layer.perplexity().item() == close_to(math.exp(math.log(3) - 2 / 3 * math.log(2)))
    layer.eval()(x)
    assert layer.code_counts.sum() == 3
    layer.train()
    layer.encode(x)
    assert layer.code_counts.sum() == 3
    layer.reset_health()
    assert not layer.code_counts.any()


def test_encode():
    layer = fastvq.FSQ([5, 5], dim=4, preserve_symmetry=True, noise_dropout=0.9)
    x = vectors(2, 9, 4)
    assert torch.equal(layer.encode(x), layer.eval()(x)[1])


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 3, 4, 4), (4, 3), (1, 1, 3)], ids=str)
def test_shapes(shape):
    layer = fastvq.FSQ([8, 5, 5])
    quantized, indices = layer(torch.randn(shape).requires_grad_())
    assert quantized.shape == shape
    assert indices.shape == ((shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1])
    quantized.sum().backward()


def test_copies_and_inference_mode():
    layer = fastvq.FSQ([5, 5], dim=4, orthogonal_rotation=True)
    contract.assert_copies_go_on_alike(layer, vectors(2, 9, 4))
    contract.assert_inference_mode_works(layer, vectors(2, 9, 4))


def test_compiled_by_inductor():
    """Indices are equal in a fused kernel with its own tanh, also beside thresholds."""
    layer = fastvq.FSQ([8, 8, 5, 5])
    near = layer._bound.thresholds.bounds[:, :4]
    near = torch.cat([near, near.nextafter(torch.tensor(-9.0)), near.nextafter(torch.tensor(9.0))], 1).T
    contract.assert_compiles(layer, torch.stack([near, vectors(12, 4)]), backend="inductor", modes=(True,))


def test_checkpointing():
    layer = fastvq.FSQ([5, 5, 5], dim=6, preserve_symmetry=True, noise_dropout=0.5)
    contract.assert_checkpointing_changes_nothing(layer, vectors(2, 9, 6))


def test_exported(tmp_path):
    """Many levels take a third path in ONNX, which has no bisection."""
    layer = fastvq.FSQ([8, 5, 50, 3], num_codebooks=2)
    images = torch.cat(
        [vectors(2, 8, 3, 5), layer._bound.thresholds.bounds[2, :30].view(2, 1, 3, 5).repeat(1, 8, 1, 1)]
    )
    contract.assert_exports(layer, images)
    contract.assert_traces_are_saved(layer, images)
    contract.assert_runs_in_onnxruntime(layer, images, tmp_path / "forward.onnx")


def test_compiled_with_all_options():
    layer = fastvq.FSQ([5, 5, 40], num_codebooks=2, preserve_symmetry=True, channel_first=True)
    contract.assert_compiles(layer, vectors(2, 6, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [8, 2]}, "levels: must be a sequence of integers of at least 3, got .*preserve_symmetry"),
        ({"levels": [8, 1], "preserve_symmetry": True}, "levels: must be a sequence of integers of at least 2"),
        ({"levels": []}, "levels: must be"),
        ({"levels": [5.5]}, "levels: must be"),
        ({"num_codebooks": 0}, "num_codebooks: must be an integer of at least 1, got 0"),
        ({"num_codebooks": 2, "keep_num_codebooks_dim": False}, "keep_num_codebooks_dim: must be True"),
        ({"noise_dropout": 0.1}, "noise_dropout: needs preserve_symmetry"),
        ({"noise_dropout": 1.5, "preserve_symmetry": True}, "noise_dropout: must lie in"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fastvq.FSQ(**{"levels": [5, 5], **options})


def test_invalid_input():
    layer = fastvq.FSQ([5, 5])
    with pytest.raises(ValueError, match="must have shape"):
        layer(torch.randn(2, 3, 4))
    with pytest.raises(TypeError, match="floating point"):
        layer(torch.zeros(2, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^zhat: must have shape"):
        layer.codes_to_indices(torch.randn(3, 4))
