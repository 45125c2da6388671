"""ResidualLFQ and GroupedResidualLFQ compared with vector_quantize_pytorch's, and their additional features."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator
from ..peers import assert_compiles, assert_same_step, assert_travels, pair, vqp

BITS, STAGES = 4, 3
# Rounding of the residuals counts 2 inv_temperature = 200 times as much in the logits of the entropies.
COARSE = {"rtol": 2e-3, "atol": 3e-4}


def batch(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def residual_lfq(**options):
    torch.manual_seed(0)
    settings = {"dim": BITS, "num_quantizers": STAGES, "codebook_size": 2**BITS} | options
    return fastvq.ResidualLFQ(**settings)


OPTIONS = {
    "plain": {},
    "projected": {"dim": 7},
    "one level": {"num_quantizers": 1, "quantize_dropout": True},
    "soft clamp": {"soft_clamp_input_value": 2.0},
    "spherical": {"spherical": True},
    "rotated": {"orthogonal_rotation": True},
    "commitment": {"dim": 7, "commitment_loss_weight": 0.5, "entropy_loss_weight": 0.0},
    "diversity": {"diversity_gamma": 2.0},
    "a share": {"frac_per_sample_entropy": 0.5},
    "dropout": {"dim": 7, "quantize_dropout": True},
    "dropout from the second": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "dropout by twos": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    "axis for codebooks": {"keep_num_codebooks_dim": True},
}
DECODED_OTHERWISE = ("spherical", "rotated")  # the peer decodes without either


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_steps(kind, training):
    options = {"dim": BITS, "num_quantizers": STAGES, "codebook_size": 2**BITS} | OPTIONS[kind]
    ours, theirs = (module.train(training) for module in pair("ResidualLFQ", **options))
    optimizers = [
        torch.optim.SGD([*m.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=0.05) for m in (ours, theirs)
    ]
    for seed in range(4):
        theirs.load_state_dict(ours.state_dict())
        x = batch(2, 11, ours.dim, seed=seed)
        quantized, indices, losses = assert_same_step(ours, theirs, x, seed=seed, tolerance=COARSE)
        assert losses.shape == (ours.num_quantizers,)
        codes = ours.get_codes_from_indices(indices)
        output = ours.get_output_from_indices(indices)
        if kind not in DECODED_OTHERWISE:
            close(codes, theirs.get_codes_from_indices(indices))
            close(output.detach(), theirs.get_output_from_indices(indices).detach().view_as(output))
            close(ours.codebooks, theirs.codebooks)
        close(output.detach(), quantized.detach())
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("options", [{}, {"spherical": True}, {"orthogonal_rotation": True}, {"dim": 6}])
def test_codes_sum_to_the_output(options):
    ours = residual_lfq(quantize_dropout=True, **options)
    x = batch(3, 9, ours.dim)
    quantized, indices, _, codes = ours(x, return_all_codes=True, rand_quantize_dropout_fixed_seed=1)
    close(codes, ours.get_codes_from_indices(indices))
    for level, table in enumerate(ours.codebooks):
        chosen = indices[..., level]
        expected = torch.where((chosen >= 0)[..., None], table[chosen.clamp_min(0)], 0)
        assert torch.equal(codes[level], expected)
    close(ours.project_out(codes.sum(0)).detach(), quantized.detach())
    kept = int((indices[0, 0] >= 0).sum())
    assert 0 < kept < STAGES
    close(ours.get_output_from_indices(indices[..., :kept]).detach(), quantized.detach())


@pytest.mark.parametrize("dim", [BITS, 7])
def test_images(dim):
    """The peer takes images only without projections, and decodes them with the channels last."""
    ours = residual_lfq(dim=dim)
    x = batch(2, dim, 3, 5)
    quantized, indices, losses, codes = ours(x, return_all_codes=True)
    expected, expected_indices, expected_losses = ours(x.flatten(2).transpose(1, 2))
    assert indices.shape == (2, 3, 5, STAGES)
    assert codes.shape == (STAGES, 2, 3, 5, BITS)
    assert torch.equal(indices.flatten(1, 2), expected_indices)
    close(quantized.flatten(2).transpose(1, 2).detach(), expected.detach())
    close(losses.detach(), expected_losses.detach())
    close(ours.get_output_from_indices(indices).detach(), quantized.detach())
    if dim == BITS:
        theirs = vqp.ResidualLFQ(dim=BITS, num_quantizers=STAGES, codebook_size=2**BITS)
        assert_same_step(ours, theirs, x, tolerance=COARSE)


@pytest.mark.parametrize("dim", [BITS, 7])
def test_masks_and_non_finite_rows(dim):
    ours = residual_lfq(dim=dim, commitment_loss_weight=1.0)
    x = batch(2, 9, dim)
    mask = torch.rand(2, 9, generator=generator()) < 0.6
    row_mask = mask.clone()
    row_mask[0, 0] = False
    poisoned = x.clone()
    poisoned[0, 0, 1] = torch.nan
    good = x[row_mask][None].clone().requires_grad_()
    poisoned.requires_grad_()
    grads = []
    for leaf, given in ((good, None), (poisoned, mask)):
        ours.zero_grad()
        quantized, indices, losses = ours(leaf, mask=given)
        (quantized.sum() + losses.sum()).backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    _, expected_indices, expected_losses = ours(good)
    assert torch.equal(indices[row_mask], expected_indices[0])
    assert (indices[~row_mask] == -1).all()
    assert not quantized[~row_mask].any()
    assert not poisoned.grad[~row_mask].any()
    torch.testing.assert_close(losses, expected_losses, **COARSE)
    torch.testing.assert_close(poisoned.grad[row_mask], good.grad[0], **COARSE)
    close(ours.get_output_from_indices(indices).detach(), quantized.detach())
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **COARSE)


def test_half():
    ours = residual_lfq()
    x = batch(2, 9, BITS).bfloat16()
    quantized, indices, losses = ours(x)
    exact, exact_indices, exact_losses = ours(x.float())
    assert (quantized.dtype, losses.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(indices, exact_indices)
    close(quantized, exact.bfloat16())
    close(losses, exact_losses)
    projected = residual_lfq(dim=7).bfloat16()
    assert projected(batch(2, 9, 7).bfloat16())[0].dtype == torch.bfloat16


def test_health():
    ours = residual_lfq(quantize_dropout=True)
    indices = ours(batch(2, 9, BITS), rand_quantize_dropout_fixed_seed=1)[1]
    counts = torch.stack([stage[stage >= 0].bincount(minlength=2**BITS) for stage in indices.flatten(0, -2).T])
    assert torch.equal(ours.code_counts, counts)
    assert ours.quantization_error().shape == (STAGES,)


GROUPS = {
    "plain": {},
    "projected": {"dim": 14},
    "dropout": {"dim": 14, "quantize_dropout": True},
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("training", [True, False])
def test_groups(kind, training):
    options = {"dim": 2 * BITS, "groups": 2, "num_quantizers": STAGES, "codebook_size": 2**BITS} | GROUPS[kind]
    ours, theirs = (module.train(training) for module in pair("GroupedResidualLFQ", **options))
    for seed in range(3):
        x = batch(2, 11, ours.dim, seed=seed)
        quantized, indices, _ = assert_same_step(ours, theirs, x, seed=seed, tolerance=COARSE)
        close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
        close(ours.get_output_from_indices(indices).detach(), quantized.detach())
    *_, codes = ours(x, return_all_codes=True)
    *_, theirs_codes = theirs(x, return_all_codes=True)
    assert len(codes) == len(theirs_codes) == 2
    assert codes[0].shape == theirs_codes[0].shape
    close(ours.codebooks, theirs.codebooks)


def test_groups_of_images():
    torch.manual_seed(0)
    options = {"dim": 2 * BITS, "groups": 2, "num_quantizers": STAGES, "codebook_size": 2**BITS}
    ours = fastvq.GroupedResidualLFQ(**options, accept_image_fmap=True)
    theirs = vqp.GroupedResidualLFQ(**options, accept_image_fmap=True)
    x = batch(2, 2 * BITS, 3, 5)
    quantized, indices, _ = assert_same_step(ours, theirs, x, tolerance=COARSE)
    assert indices.shape == (2, 2, 3, 5, STAGES)
    assert torch.equal(ours.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: residual_lfq(codebook_size=12), "codebook_size: must be a power of 2"),
        (lambda: residual_lfq(num_quantizers=0), "num_quantizers: must be an integer of at least 1"),
        (lambda: residual_lfq(num_codebooks=2), "num_codebooks: must be left"),
        (lambda: residual_lfq(quantize_dropout_cutoff_index=3), "quantize_dropout_cutoff_index: must be an"),
        (lambda: residual_lfq()(torch.zeros(2, 3, 5)), "x: must have shape"),
        (lambda: residual_lfq().get_codes_from_indices(torch.zeros(2, 5).long()), "indices: must have 1 to"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_compiled_training_step():
    assert_compiles(residual_lfq(dim=7, quantize_dropout=True), batch(2, 9, 7), rand_quantize_dropout_fixed_seed=1)


def test_travels():
    assert_travels(residual_lfq(dim=7), batch(2, 9, 7))
