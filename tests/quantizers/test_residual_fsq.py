"""ResidualFSQ and GroupedResidualFSQ compared with their peers, and fine stages that the peers round away."""

from __future__ import annotations

import pytest
import torch
import vector_quantize_pytorch as vqp

import fastvq

from .. import contract
from ..cases import HALF, close
from ..contract import vectors

SETTINGS = {"levels": [8, 5, 4, 3], "num_quantizers": 3}
OPTIONS = {
    "plain": {},
    "projected": {"dim": 7},
    "tanh": {"bound_hard_clamp": False},
    "soft clamp": {"bound_hard_clamp": False, "soft_clamp_input_value": 2.0},
    "soft clamps": {"bound_hard_clamp": False, "soft_clamp_input_value": [1.0, 2.0, 3.0, 1.5]},
    "channels first": {"is_channel_first": True, "dim": 6},
    "noise": {"noise_dropout": 0.5},
    "one level": {"num_quantizers": 1, "quantize_dropout": True},
}


def pair(**options):
    ours, theirs = fastvq.ResidualFSQ(**SETTINGS | options), vqp.ResidualFSQ(**SETTINGS | options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_equals_the_peer(kind, training):
    ours, theirs = (module.train(training) for module in pair(**OPTIONS[kind]))
    x = vectors(3, 40, ours.dim)
    contract.assert_steps_agree(ours, theirs, x.transpose(1, 2) if ours.is_channel_first else x)
    contract.assert_checkpoints_load_both_ways(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"quantize_dropout_cutoff_index": 2}, {"quantize_dropout_multiple_of": 2}])
def test_quantize_dropout(options):
    ours, theirs = pair(num_quantizers=5, quantize_dropout=True, **options)
    x, kept = vectors(2, 9, 4), set()
    for seed in range(8):
        actual = ours(x, True, seed)
        for one, other in zip(actual, theirs(x, True, seed), strict=True):
            close(one, other.to(one.dtype))  # theirs turns to int64 where levels are dropped
        assert actual[1].dtype == torch.int32
        kept.add(int((actual[1][0, 0] >= 0).sum()))
    assert len(kept) > 1
    assert (ours.encode(x) >= 0).all()
    assert (ours.eval()(x)[1] >= 0).all()


def test_inactive_stages_are_not_counted():
    layer = fastvq.ResidualFSQ(**SETTINGS, quantize_dropout=True)
    layer(vectors(2, 9, 4).requires_grad_(), rand_quantize_dropout_fixed_seed=1)
    assert layer.code_counts.sum(1).tolist() == [18, 0, 0]
    assert layer.usage().shape == layer.quantization_error().shape == (3,)


def test_attributes_equal_the_peers():
    ours, theirs = pair()
    close(ours.scales, theirs.scales)
    close(ours.soft_clamp_input_value, theirs.soft_clamp_input_value)
    close(ours.codebooks, theirs.codebooks)
    assert ours.codebook_size == theirs.codebook_size


@pytest.mark.parametrize("options", [{}, {"dim": 7}, {"orthogonal_rotation": True}], ids=str)
@pytest.mark.filterwarnings("ignore:orthogonal_rotation")
def test_decoding(options):
    layer = fastvq.ResidualFSQ(**SETTINGS | {"num_quantizers": 8}, **options).eval()
    x = vectors(2, 50, layer.dim)
    quantized, indices, codes = layer(x, return_all_codes=True)
    decoded = layer.get_output_from_indices(indices)
    close(decoded, quantized)
    if not options.get("orthogonal_rotation"):
        assert torch.equal(decoded, quantized)
    assert codes.shape == (8, 2, 50, 4)
    close(layer.project_out(codes.sum(0)), quantized)
    close(layer.get_codes_from_indices(indices[..., :2])[:2], codes[:2])
    assert not layer.get_codes_from_indices(indices[..., :2])[2:].any()
    assert torch.equal(layer.encode(x), indices)


@pytest.mark.parametrize("spatial", [(3,), (3, 4), (3, 2, 5)], ids=str)
def test_channels_first(spatial):
    """Q equals a spatial size, so that shapes alone would not reveal swapped axes."""
    layer = fastvq.ResidualFSQ(**SETTINGS, dim=5, is_channel_first=True)
    last = fastvq.ResidualFSQ(**SETTINGS, dim=5)
    last.load_state_dict(layer.state_dict())
    x = vectors(2, 5, *spatial)
    quantized, indices, codes = layer(x, return_all_codes=True)
    expected, expected_indices, expected_codes = last(x.movedim(1, -1), return_all_codes=True)
    assert torch.equal(indices.movedim(1, -1), expected_indices)
    close(quantized.movedim(1, -1), expected)
    close(codes, expected_codes)
    close(layer.get_output_from_indices(indices), quantized)


def test_fine_stages_are_not_rounding_noise():
    """Float32 residuals lose fine stages; in float64 the error keeps falling with the scales."""
    layer = fastvq.ResidualFSQ(levels=[8, 8], num_quantizers=8).eval()
    x = vectors(1, 1000, 2)
    indices = layer(x)[1]
    exact = (x.double() / layer.soft_clamp_input_value.double()).tanh() * layer.soft_clamp_input_value.double()
    total = torch.zeros_like(exact)
    for level, (codes, scale) in enumerate(zip(layer._codes(indices), layer.scales, strict=True)):
        total += codes
        assert (exact - total).abs().max() <= 1.01 * scale.max() / 7, level
    theirs = vqp.ResidualFSQ(levels=[8, 8], num_quantizers=8).eval()
    assert not torch.equal(theirs(x)[1][..., -1], indices[..., -1])
    assert torch.equal(theirs(x)[1][..., :3], indices[..., :3])


@pytest.mark.parametrize("options", [{}, {"dim": 6}, {"noise_dropout": 0.5}], ids=str)
def test_non_finite_rows(options):
    layer = fastvq.ResidualFSQ(**SETTINGS, **options)
    mask, indices, twin = contract.assert_non_finite_rows_are_excluded(layer, vectors(2, 6, layer.dim))
    assert (indices[~mask] == -1).all()
    assert (indices[mask] >= 0).all()
    assert torch.equal(layer.code_counts, twin.code_counts)
    assert not layer.get_output_from_indices(indices)[~mask].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_and_autocast(dtype):
    layer = fastvq.ResidualFSQ(**SETTINGS)
    x = vectors(4, 50, 4).to(dtype)
    expected = layer(x.float())[1]
    assert torch.equal(layer(x)[1], expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x.float())[1], expected)
    contract.assert_half_works(lambda: fastvq.ResidualFSQ(**SETTINGS, dim=6), vectors(2, 9, 6), dtype)
    assert layer.to(dtype).scales.dtype == torch.float32
    assert torch.equal(layer(x)[1], expected)


def test_shapes_and_copies():
    layer = fastvq.ResidualFSQ(**SETTINGS, dim=6)
    for shape in [(0, 5, 6), (2, 0, 6), (4, 6), (2, 3, 4, 6)]:
        quantized, indices = layer(torch.randn(shape))
        assert (quantized.shape, indices.shape) == (shape, (*shape[:-1], 3))
    contract.assert_copies_go_on_alike(layer, vectors(2, 9, 6))
    contract.assert_inference_mode_works(layer, vectors(2, 9, 6))


def test_compiled():
    contract.assert_compiles(fastvq.ResidualFSQ(**SETTINGS, dim=6), vectors(2, 9, 6), modes=(False,))
    layer = fastvq.ResidualFSQ(**SETTINGS, quantize_dropout=True)
    contract.assert_compiles(layer, vectors(2, 9, 4), modes=(True,), rand_quantize_dropout_fixed_seed=1)


def test_checkpointing():
    layer = fastvq.ResidualFSQ(**SETTINGS, dim=6, quantize_dropout=True)
    contract.assert_checkpointing_changes_nothing(layer, vectors(2, 9, 6))


def test_exported():
    layer = fastvq.ResidualFSQ(**SETTINGS, dim=6)
    contract.assert_exports(layer, vectors(2, 9, 6))
    contract.assert_traces_are_saved(layer, vectors(2, 9, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [8, 1]}, "levels: must be"),
        ({"num_quantizers": 0}, "num_quantizers: must be an integer of at least 1"),
        ({"soft_clamp_input_value": 2.0}, "soft_clamp_input_value: follows"),
        (
            {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
            "quantize_dropout_cutoff_index: must be an integer in",
        ),
        ({"return_indices": False}, "return_indices: cannot be set"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fastvq.ResidualFSQ(**SETTINGS | options)


def test_invalid_indices():
    with pytest.raises(ValueError, match=r"^indices: must have 1 to 3 stages"):
        fastvq.ResidualFSQ(**SETTINGS).get_codes_from_indices(torch.zeros(2, 5, 4, dtype=torch.int64))


@pytest.mark.parametrize("options", [{}, {"quantize_dropout": True}], ids=str)
def test_groups_equal_the_peer(options):
    settings = {"dim": 12, "groups": 3, **SETTINGS, **options}
    ours, theirs = fastvq.GroupedResidualFSQ(**settings), vqp.GroupedResidualFSQ(**settings)
    x = vectors(2, 9, 12)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if not options:
        contract.assert_steps_agree(ours, theirs, x)
    contract.assert_checkpoints_load_both_ways(ours, theirs)
    quantized, indices, codes = ours(x, return_all_codes=True)
    expected = theirs.eval()(x, return_all_codes=True)
    if options:
        assert len({tuple(group) for group in (indices >= 0).flatten(1, -2).all(1).tolist()}) == 1
        quantized, indices, codes = ours.eval()(x, return_all_codes=True)
    close(quantized, expected[0])
    assert torch.equal(indices, expected[1])
    close(codes, expected[2])
    close(ours.get_output_from_indices(indices), quantized)
    close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    close(ours.codebooks, theirs.codebooks)
    assert ours.codebook_size == theirs.codebook_size
    assert torch.equal(ours.encode(x), indices)
    assert ours.usage().shape == (3, 3)


@pytest.mark.parametrize("options", [{"is_channel_first": True}, {"accept_image_fmap": True}])
def test_groups_of_images(options):
    layer = fastvq.GroupedResidualFSQ(dim=6, groups=2, levels=[5, 5, 5], num_quantizers=2, **options)
    x = vectors(2, 6, 3, 4)
    quantized, indices = layer(x, mask=torch.ones(2, 3, 4, dtype=torch.bool))
    assert (quantized.shape, indices.shape) == (x.shape, (2, 2, 2, 3, 4))
    close(layer.get_output_from_indices(indices), quantized)
    with pytest.raises(ValueError, match="dim=6 as its second size"):
        layer(vectors(2, 3, 4, 6))
