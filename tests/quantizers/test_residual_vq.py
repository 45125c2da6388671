"""ResidualVQ beside vector_quantize_pytorch's on equal codebooks, and what must hold on its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import vector_quantize_pytorch
from torch import nn

import fastvq
from fastvq.backends import reference

from ..cases import close, flags_as_numbers, generator

SETTINGS = [
    {},
    {"rotation_trick": False},
    {"commitment_weight": 0.25, "decay": 0.99},
    {"codebook_dim": 6},
    {"shared_codebook": True},
    {"codebook_size": (32, 16, 7)},
    {"use_cosine_sim": True},
    {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
]


def pair(**settings):
    """Return this layer and the peer's, in the same state."""
    arguments = {"dim": 12, "num_quantizers": 3, "codebook_size": 32, **settings}
    theirs = vector_quantize_pytorch.ResidualVQ(**arguments)
    ours = fastvq.ResidualVQ(**arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def ids(settings):
    return ",".join(f"{k}={v}" for k, v in settings.items()) or "defaults"


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_training_steps_equal_the_peer(settings):
    ours, theirs = pair(**settings)
    for step in range(4):
        x, y = (vectors(2, 50, 12, seed=step).requires_grad_() for _ in range(2))
        seed = {"rand_quantize_dropout_fixed_seed": step} if settings.get("quantize_dropout") else {}
        quantized, indices, losses = ours(x, **seed)
        expected, expected_indices, expected_losses = theirs(y, **seed)
        assert torch.equal(indices, expected_indices)
        close(quantized, expected)
        close(losses, expected_losses.flatten())
        weights = vectors(2, 50, 12, seed=9)
        ((quantized * weights).sum() + losses.sum()).backward()
        ((expected * weights).sum() + expected_losses.sum()).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
        state, expected_state = ours.state_dict(), flags_as_numbers(theirs.state_dict())
        assert state.keys() == expected_state.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected_state[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_eval_and_decoding_equal_the_peer(settings):
    ours, theirs = (layer.eval() for layer in pair(**settings))
    x = vectors(2, 50, 12)
    quantized, indices, losses, codes = ours(x, return_all_codes=True)
    expected, expected_indices, _, expected_codes = theirs(x, return_all_codes=True)
    assert torch.equal(indices, expected_indices)
    close(quantized, expected)
    close(codes, expected_codes)
    assert not losses.any()
    close(ours.get_output_from_indices(indices), expected)
    assert torch.equal(ours.encode(x), indices)
    theirs.load_state_dict(ours.state_dict())  # and back


def test_images_are_sequences_of_their_pixels():
    """The peer's own accept_image_fmap fails in 1.32.0."""
    images = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=32, codebook_dim=6, accept_image_fmap=True)
    sequences = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=32, codebook_dim=6)
    sequences.load_state_dict(images.state_dict())
    x = vectors(2, 12, 5, 4)
    quantized, indices, losses, codes = images(x, return_all_codes=True)
    flat, flat_indices, flat_losses = sequences(x.flatten(2).transpose(1, 2))
    assert torch.equal(indices, flat_indices.reshape(2, 5, 4, 3))
    assert codes.shape == (3, 2, 5, 4, 6)
    close(quantized, flat.transpose(1, 2).reshape(x.shape))
    close(losses, flat_losses)
    images.eval()
    close(images.get_output_from_indices(images.encode(x)), images(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_codes_are_those_of_residuals_in_float32(dtype):
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=4, codebook_size=32).eval()
    x = vectors(2, 50, 12).to(dtype)
    quantized, indices, _ = layer(x)
    expected = reference.residual_search(x.flatten(0, 1), layer.codebooks).reshape(2, 50, 4)
    assert torch.equal(indices, expected)
    assert quantized.dtype == dtype


def test_non_finite_and_masked_rows_change_nothing():
    layer = pair()[0]
    x = vectors(2, 50, 12)
    mask = torch.rand(2, 50, generator=generator()) < 0.7
    other = copy.deepcopy(layer)
    dirty = x.masked_fill(~mask[..., None], torch.nan)
    results = [layer(x, mask), other(dirty)]
    for a, b in zip(results[0], results[1], strict=True):
        close(a, b)
    assert (results[0][1][~mask] == -1).all()
    assert not results[0][0][~mask].any()
    for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_kmeans_goes_stage_by_stage():
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=16, kmeans_init=True, decay=1.0)
    x = vectors(4, 100, 12)
    layer(x)
    residual, errors = x.flatten(0, 1), []
    for codebook in layer.codebooks:
        residual = residual - codebook[reference.search(residual, codebook)]
        errors.append(residual.square().mean().item())
    assert errors[0] < 0.8
    assert errors[2] < 0.85 * errors[1] < 0.75 * errors[0]


def test_dropout_keeps_a_prefix_and_rounds_up():
    layer = fastvq.ResidualVQ(
        dim=12, num_quantizers=8, codebook_size=16, quantize_dropout=True, quantize_dropout_multiple_of=4
    )
    kept = set()
    for _ in range(20):
        _, indices, losses = layer(vectors(1, 10, 12))
        present = (indices >= 0).all(dim=(0, 1))
        kept.add(int(present.sum()))
        assert present.tolist() == sorted(present.tolist(), reverse=True)
        assert not losses[~present].any()
    assert kept == {4, 8}
    layer.eval()
    _, indices, _ = layer(vectors(1, 10, 12))
    coarse = layer.get_output_from_indices(indices[..., :3])
    close(coarse, layer.get_codes_from_indices(indices)[:3].sum(0))


BY_STAGE = {"quant_grad_frac": 0.5}
"""A setting that has the stages run one after the other."""


OPTIONS = [{}, BY_STAGE, {"use_cosine_sim": True}, {"codebook_dim": 5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_each_item_has_the_results_of_its_number_of_stages(options, training):
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=4, codebook_size=16, **options).train(training)
    x = vectors(3, 10, 12).requires_grad_()
    numbers = torch.tensor([1, 4, 2])
    quantized, indices, losses = copy.deepcopy(layer)(x, n_quantizers=numbers)
    for row, number in enumerate(numbers.tolist()):
        own = x.detach()[row : row + 1].requires_grad_()
        expected, few, _ = copy.deepcopy(layer)(own, n_quantizers=number)
        assert torch.equal(few, indices[row : row + 1])
        assert ((few >= 0).sum(-1) == number).all()
        close(quantized[row], expected[0])
        if training:
            wanted = torch.autograd.grad(expected.square().sum(), own)[0]
            close(torch.autograd.grad(quantized[row].square().sum(), x, retain_graph=True)[0][row], wanted[0])
        else:
            assert torch.equal(layer.encode(own, n_quantizers=number), few)
            close(layer.get_output_from_indices(few[..., :number]), expected)
    if not training:
        assert torch.equal(layer.encode(x, n_quantizers=numbers), indices)
        assert not losses.any()


def test_codes_learn_from_the_items_of_their_stage_alone():
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=4, codebook_size=16)
    codebooks, x, numbers = layer.codebooks.clone(), vectors(3, 10, 12), torch.tensor([1, 4, 2])
    _, indices, losses = layer(x, n_quantizers=numbers)
    residual = x.clone()
    for place, stage in enumerate(layer.layers):
        rows = numbers > place
        codes = nn.functional.embedding(indices[rows][..., place], codebooks[place])
        close(losses[place], (residual[rows] - codes).square().mean())
        residual[rows] -= codes
        assert torch.equal(stage.code_counts, torch.bincount(indices[rows][..., place].flatten(), minlength=16))


def test_a_stage_without_rows_does_not_decay():
    for options in ({}, BY_STAGE):
        layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=16, **options)
        before = copy.deepcopy(layer.layers[2].state_dict())
        layer(vectors(2, 10, 12), n_quantizers=torch.tensor([2, 1]))
        assert all(torch.equal(value, before[name]) for name, value in layer.layers[2].state_dict().items())
        assert not torch.equal(layer.layers[1]._codebook.cluster_size, torch.ones(1, 16))


@pytest.mark.parametrize("options", [{}, BY_STAGE], ids=str)
def test_dropout_draws_a_number_for_each_item(options):
    layer = fastvq.ResidualVQ(
        dim=12, num_quantizers=6, codebook_size=16, quantize_dropout=True, quantize_dropout_per_item=True, **options
    )
    x = vectors(40, 5, 12)
    twin = copy.deepcopy(layer)
    quantized, indices, losses = layer(x, rand_quantize_dropout_fixed_seed=7)
    numbers = (indices[:, 0] >= 0).sum(-1)
    assert ((indices >= 0).sum(-1) == numbers[:, None]).all()
    assert set(numbers.tolist()) == {1, 2, 3, 4, 5, 6}
    for result, expected in zip((quantized, indices, losses), twin(x, n_quantizers=numbers), strict=True):
        assert torch.equal(result, expected)
    layer.eval()
    assert (layer(x)[1] >= 0).all()
    grouped = fastvq.GroupedResidualVQ(
        dim=12, groups=2, num_quantizers=3, codebook_size=16, quantize_dropout=True, quantize_dropout_per_item=True
    )
    first, second = grouped(x)[1] >= 0
    assert torch.equal(first, second)  # all groups leave out the same
    assert len(first[:, 0].sum(-1).unique()) > 1
    assert torch.equal((grouped(x, n_quantizers=2)[1] >= 0).sum(-1), torch.full((2, 40, 5), 2))


def test_dropout_of_items_compiles():
    layer = fastvq.ResidualVQ(
        dim=12, num_quantizers=4, codebook_size=16, quantize_dropout=True, quantize_dropout_per_item=True
    )
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = vectors(6, 10, 12)
    for result, expected in zip(
        compiled(x, rand_quantize_dropout_fixed_seed=2), layer(x, rand_quantize_dropout_fixed_seed=2), strict=True
    ):
        close(result, expected)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (0, ValueError, r"n_quantizers: must lie in \[1, 3\], got 0"),
        (4, ValueError, r"n_quantizers: must lie in \[1, 3\], got 4"),
        (1.0, TypeError, "n_quantizers: must be an int or a tensor of ints, got 1.0"),
        (True, TypeError, "n_quantizers: must be an int or a tensor of ints, got True"),
        (torch.tensor([1, 4]), ValueError, r"n_quantizers: must lie in \[1, 3\], got \[1, 4\]"),
        (torch.tensor([1, 2, 3]), ValueError, r"n_quantizers: must have shape \(B,\) = \(2,\), got \(3,\)"),
        (torch.tensor([1.0, 2.0]), TypeError, "n_quantizers: must be an int or a tensor of ints, got torch.float32"),
    ],
)
def test_numbers_of_stages_that_are_refused(number, error, message):
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=16)
    for call in (layer, layer.encode):
        with pytest.raises(error, match=message):
            call(vectors(2, 5, 12), n_quantizers=number)


def test_items_of_several_numbers_have_no_beams_and_no_targets():
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=16, beam_size=2).eval()
    x = vectors(2, 5, 12)
    assert ((layer(x, n_quantizers=2)[1] >= 0).sum(-1) == 2).all()
    assert torch.equal(layer.encode(x, n_quantizers=2), layer(x, n_quantizers=2)[1])
    with pytest.raises(ValueError, match="n_quantizers: must be one number for all items beside beam_size=2"):
        layer(x, n_quantizers=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="quantize_dropout_per_item: must be False beside beam_size=2"):
        fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=16, beam_size=2, quantize_dropout_per_item=True)
    with pytest.raises(ValueError, match="n_quantizers: must be None beside indices"):
        layer(x, indices=torch.zeros(2, 5, 3, dtype=torch.int64), n_quantizers=2)


def test_encode_takes_lengths():
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=16).eval()
    x, lens = vectors(2, 5, 12), torch.tensor([5, 2])
    assert torch.equal(layer.encode(x, lens=lens), layer(x, lens=lens)[1])


def test_frozen_is_frozen():
    for frozen, options in (({"freeze_codebook": True}, {}), ({}, {"freeze_codebook": True})):
        layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=32, **frozen)
        before = copy.deepcopy(layer.state_dict())
        layer(vectors(2, 50, 12), **options)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(training):
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=32).train(training)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True)
    x = vectors(2, 50, 12)
    for a, b in zip(layer(x), compiled(x), strict=True):
        close(a, b)
    for a, b in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        close(a.float(), b.float())


def test_survives_pickling_empty_batches_and_autocast():
    layer = pickle.loads(pickle.dumps(fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=32)))
    quantized, indices, losses = layer(vectors(0, 5, 12))
    assert (quantized.shape, indices.shape) == ((0, 5, 12), (0, 5, 3))
    assert not losses.any()
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, losses = layer(vectors(2, 5, 12).bfloat16())
    assert quantized.dtype == torch.bfloat16
    assert all(layer.codebook.dtype == torch.float32 for layer in layer.layers)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_quantizers": None}, ValueError, "num_quantizers: must be given"),
        ({"num_quantizers": 0}, ValueError, "num_quantizers: must be an integer of at least 1"),
        ({"codebook_size": (4, 5)}, ValueError, "num_quantizers: must be the number of stages"),
        ({"codebook_size": (4, 5, 6), "shared_codebook": True}, ValueError, "codebook_size: must be one number"),
        ({"quantize_dropout_cutoff_index": 3}, ValueError, "quantize_dropout_cutoff_index: must be an integer in"),
        (
            {"quantize_dropout_multiple_of": 0},
            ValueError,
            "quantize_dropout_multiple_of: must be an integer of at least 1",
        ),
        ({"beam_size": 0}, ValueError, "beam_size: must be an integer of at least 1"),
        ({"eval_beam_size": 2}, ValueError, "beam_size: must be given beside eval_beam_size"),
        ({"beam_score_quantizer_weights": [1.0]}, ValueError, "beam_score_quantizer_weights: must be 3 numbers"),
        ({"quant_grad_frac": 2.0}, ValueError, "quant_grad_frac: must lie in"),
        ({"heads": 2}, ValueError, "heads: must be 1"),
        ({"unheard_of": 1}, TypeError, "unheard_of"),
        ({"decay": 2.0}, ValueError, "decay: must lie in"),
    ],
)
def test_refuses_by_name(change, error, message):
    with pytest.raises(error, match=message):
        fastvq.ResidualVQ(**{"dim": 12, "num_quantizers": 3, "codebook_size": 32, **change})


def test_refuses_inputs_by_name():
    layer = fastvq.ResidualVQ(dim=12, num_quantizers=3, codebook_size=32)
    with pytest.raises(ValueError, match=r"x: must have shape \(B, N, dim\)"):
        layer(vectors(2, 50, 11))
    with pytest.raises(TypeError, match="x: must be floating point"):
        layer(torch.zeros(2, 5, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask: must have shape"):
        layer(vectors(2, 50, 12), torch.ones(2, 49, dtype=torch.bool))
    with pytest.raises(ValueError, match="indices: must have 1 to"):
        layer.get_codes_from_indices(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("ends_by_a_step", [True, False])
def test_held_updates_of_stages_that_some_items_leave_out(ends_by_a_step):
    """A stage learns if any of the batches reached it, and else stays to the bit."""
    kept = fastvq.ResidualVQ(dim=6, num_quantizers=3, codebook_size=10)
    whole, x = copy.deepcopy(kept), torch.randn(4, 9, 6)
    numbers = torch.tensor([1, 2, 1, 1])
    kept(x[:2], n_quantizers=numbers[:2], accum_ema_update=True)
    kept(x[2:], n_quantizers=numbers[2:], accum_ema_update=not ends_by_a_step)
    kept.commit_ema_update()
    unused = copy.deepcopy(whole.layers[2].state_dict())
    whole(x, n_quantizers=numbers)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], value)
    for name, value in kept.layers[2].state_dict().items():
        assert torch.equal(value, unused[name]), name


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"use_cosine_sim": True}], ids=str)
def test_updates_held_for_a_commit(options):
    """The statistics of several batches, coded by the same codebooks, make one step."""
    kept = fastvq.ResidualVQ(dim=6, num_quantizers=3, codebook_size=10, **options)
    whole = copy.deepcopy(kept)
    batches = torch.randn(3, 2, 9, 6)
    before = copy.deepcopy(kept.state_dict())
    for x in batches:
        kept(x, accum_ema_update=True)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, before[name]), name
    kept.commit_ema_update()
    assert not torch.equal(kept.layers[0].codebook, before["layers.0._codebook.embed"][0])
    if not options.get("shared_codebook"):  # whose stages take turns when they learn from one batch
        whole(batches.flatten(0, 1))
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(kept.state_dict()[name], value)
    moved = copy.deepcopy(kept.state_dict())
    kept.commit_ema_update()
    for name, value in kept.state_dict().items():
        assert torch.equal(value, moved[name])


def test_lens_are_a_mask():
    layer = fastvq.ResidualVQ(dim=6, num_quantizers=2, codebook_size=10).eval()
    x = torch.randn(2, 5, 6)
    indices = layer(x, lens=torch.tensor([3, 5]))[1]
    assert torch.equal(indices, layer(x, torch.arange(5) < torch.tensor([[3], [5]]))[1])
    assert (indices[0, 3:] == -1).all()


def test_arguments_of_a_call_that_cannot_be():
    layer = fastvq.ResidualVQ(dim=6, num_quantizers=2, codebook_size=10)
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"^beam_size: must be an integer of at least 1, got 0"):
        layer(x, beam_size=0)
    for shape in ((2, 5), (2, 5, 3)):
        with pytest.raises(ValueError, match=r"^indices: must have shape \(\.\.\., Q=2\)"):
            layer(x, indices=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("settings", [{}, {"codebook_size": (32, 16, 7)}, {"num_quantizers": 20}, {"codebook_dim": 5}])
def test_decoding_has_the_bits_of_the_output(settings):
    torch.manual_seed(0)
    layer = fastvq.ResidualVQ(**{"dim": 12, "num_quantizers": 3, "codebook_size": 32, **settings}).eval()
    x = vectors(2, 9, 12)
    x[0, 3, 0] = torch.nan
    quantized, indices, _ = layer(x)
    assert torch.equal(layer.get_output_from_indices(indices), quantized)
    coarse = layer.get_output_from_indices(indices[..., :2].int())
    close(
        coarse, layer.get_output_from_indices(nn.functional.pad(indices[..., :2], (0, indices.shape[-1] - 2), value=-1))
    )
    indices[1, 4, 1] = 99
    with pytest.raises(IndexError, match=r"^indices: must lie in \[-1, \d+\) at stage 1, got 99"):
        layer.get_output_from_indices(indices)


def test_decoding_is_differentiable_in_the_codes():
    torch.manual_seed(0)
    layer = fastvq.ResidualVQ(dim=6, num_quantizers=3, codebook_size=8, learnable_codebook=True, ema_update=False)
    layer.layers[0]._codebook.embed.requires_grad_(False)
    indices = torch.tensor([[1, 2, 3], [1, -1, 0]])
    layer.get_output_from_indices(indices).sum().backward()
    grads = [stage._codebook.embed.grad for stage in layer.layers]
    assert grads[0] is None
    assert torch.equal(grads[1].nonzero()[:, 1].unique(), torch.tensor([2]))
    assert torch.equal(grads[2].nonzero()[:, 1].unique(), torch.tensor([0, 3]))


@pytest.mark.parametrize("sizes", [(32, 32, 32), (32, 16, 7)])
def test_any_write_to_a_codebook_is_seen(sizes):
    """No form of the codes outlives a call, whatever writes to one stage."""
    torch.manual_seed(0)
    layer = fastvq.ResidualVQ(dim=6, codebook_size=sizes).eval()
    x = vectors(1, 40, 6)

    def check():
        expected = reference.residual_search(x[0], [stage.codebook for stage in layer.layers])
        assert torch.equal(layer.encode(x)[0], expected)
        assert torch.equal(layer(x)[1][0], expected)

    check()
    embed = layer.layers[1]._codebook.embed
    embed.data.mul_(-1)
    check()
    embed.numpy()[:] += 1
    check()
    layer.layers[1]._codebook.embed = torch.randn_like(embed)
    check()
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()}, assign=True)
    check()
    layer = copy.deepcopy(layer).half().float()
    layer.layers[0]._codebook.embed.data = torch.randn(1, 6, sizes[0]).mT
    check()
