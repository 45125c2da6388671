"""LFQ compared with vector_quantize_pytorch's, and its additional features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastvq
from fastvq.parts.losses import random_subset

from ..cases import close, generator
from ..peers import assert_compiles, assert_same_outputs, assert_same_step, assert_travels, pair


def batch(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


BITS = {"dim": 5, "codebook_size": 32}
OPTIONS = {
    "plain": BITS,
    "from dim alone": {"dim": 5},
    "from codebook_size alone": {"codebook_size": 32},
    "projected": {"dim": 7, "codebook_size": 32},
    "projected without bias": {"dim": 7, "codebook_size": 32, "projection_has_bias": False},
    "projected though it needn't be": BITS | {"has_projections": True},
    "cosine projection": {"dim": 7, "codebook_size": 32, "cosine_sim_project_in": True, "codebook_scale": 1.5},
    "scaled cosines": {
        "dim": 7,
        "codebook_size": 32,
        "cosine_sim_project_in": True,
        "cosine_sim_project_in_scale": 3.0,
    },
    "several codebooks": {"dim": 6, "codebook_size": 8, "num_codebooks": 2},
    "several codebooks from dim": {"dim": 3, "num_codebooks": 2},
    "kept codebooks dim": BITS | {"keep_num_codebooks_dim": True},
    "scale": BITS | {"codebook_scale": 0.5},
    "soft clamp": BITS | {"soft_clamp_input_value": 1.25},
    "spherical": BITS | {"spherical": True},
    "spherical, scaled": BITS | {"spherical": True, "codebook_scale": 2.0},
    "rotated": BITS | {"orthogonal_rotation": True},
    "rotated, spherical, several": {
        "dim": 9,
        "codebook_size": 8,
        "num_codebooks": 2,
        "orthogonal_rotation": True,
        "spherical": True,
    },
    "commitment": BITS | {"commitment_loss_weight": 0.25},
    "no entropy": BITS | {"entropy_loss_weight": 0.0},
    "diversity": BITS | {"diversity_gamma": 3.0, "entropy_loss_weight": 1.0},
    "softplus": BITS | {"experimental_softplus_entropy_loss": True, "entropy_loss_offset": 0.5},
    "activation": BITS | {"straight_through_activation": nn.Tanh()},
    "a share of the vectors": BITS | {"frac_per_sample_entropy": 0.4},
    "quantized as it comes": BITS | {"force_quantization_f32": False},
    "channel first": BITS | {"channel_first": True},
    "channel last": BITS | {"channel_first": False},
}
SHAPES = {"channel first": [(3, -1, 7), (2, -1, 3, 4)], "channel last": [(3, 7, -1)]}


def shapes_of(kind, dim):
    shapes = SHAPES.get(kind, [(3, 15, -1), (2, -1, 3, 4), (2, -1, 2, 3, 2)])
    return [[dim if size == -1 else size for size in shape] for shape in shapes]


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_steps(kind, training):
    ours, theirs = (module.train(training) for module in pair("LFQ", **OPTIONS[kind]))
    optimizers = [torch.optim.SGD([*m.parameters(), nn.Parameter(torch.zeros(1))], lr=0.05) for m in (ours, theirs)]
    close(ours.codebook, theirs.codebook)
    for seed, shape in enumerate(shapes_of(kind, ours.dim)):
        # Rounding of y counts 2 inv_temperature times as much in the logits.
        for inverse_temperature, tolerance in ((0.7, None), (100.0, {"rtol": 2e-3, "atol": 2e-4})):
            theirs.load_state_dict(ours.state_dict())
            (quantized, indices, _), parts = assert_same_step(
                ours,
                theirs,
                batch(*shape, seed=seed),
                tolerance=tolerance,
                inv_temperature=inverse_temperature,
                return_loss_breakdown=True,
            )
            assert type(parts)._fields == ("per_sample_entropy", "batch_entropy", "commitment")
            for project_out in (True, False):
                codes = [m.indices_to_codes(indices, project_out=project_out).detach() for m in (ours, theirs)]
                close(*codes)
            assert torch.equal(quantized, ours.indices_to_codes(indices))
            for optimizer in optimizers:
                optimizer.step()
    result = ours(batch(*shape))
    assert result._fields == ("quantized", "indices", "entropy_aux_loss")


def test_exact_zeros_are_the_negative_code():
    ours, theirs = pair("LFQ", dim=3)
    assert_same_outputs(ours(torch.zeros(1, 2, 3)), theirs(torch.zeros(1, 2, 3)))
    assert not ours(-torch.zeros(1, 2, 3)).indices.any()


@pytest.mark.parametrize("kind", ["plain", "projected", "several codebooks", "commitment"])
def test_masks(kind):
    """The losses are the peer's without the masked vectors; with a mask the peer leaves out the batch entropy."""
    ours, theirs = pair("LFQ", **OPTIONS[kind])
    x = batch(3, 8, ours.dim)
    mask = torch.rand(3, 8, generator=generator()) < 0.6
    leaf, other = x.clone().requires_grad_(), x[mask][None].requires_grad_()
    (quantized, indices, loss), parts = ours(leaf, mask=mask, return_loss_breakdown=True, inv_temperature=2.0)
    (_, theirs_indices, theirs_loss), theirs_parts = theirs(other, return_loss_breakdown=True, inv_temperature=2.0)
    assert_same_outputs((loss, *parts), (theirs_loss, *theirs_parts))
    loss.backward()
    theirs_loss.backward()
    torch.testing.assert_close(leaf.grad[mask], other.grad[0], rtol=1e-4, atol=1e-6)
    assert not leaf.grad[~mask].any()
    assert torch.equal(indices[mask], theirs_indices[0])
    assert (indices[~mask] == -1).all()
    assert not quantized[~mask].any()
    assert torch.equal(quantized, ours.indices_to_codes(indices))
    images = x.view(3, 2, 4, -1).movedim(-1, 1)
    for image_mask in (mask, mask.view(3, 2, 4)):
        image_result = ours(images, mask=image_mask, inv_temperature=2.0)
        close(image_result.entropy_aux_loss.detach(), loss.detach())
        assert torch.equal(image_result.indices.flatten(1, 2), indices)
    first = ours(x, mask=torch.tensor([True, False, False]))
    assert torch.equal(first.indices[0], ours(x).indices[0])
    assert (first.indices[1:] == -1).all()


def test_non_finite_rows():
    lfq = fastvq.LFQ(dim=7, codebook_size=32, commitment_loss_weight=1.0)
    x = batch(2, 6, 7)
    row_mask = torch.ones(2, 6, dtype=torch.bool)
    row_mask[0, 2] = row_mask[1, 5] = False
    good = x[row_mask][None].clone().requires_grad_()
    x[0, 2, 1], x[1, 5, 0] = torch.nan, -torch.inf
    poisoned = x.requires_grad_()
    gradients = []
    for leaf in (good, poisoned):
        lfq.zero_grad()
        result = lfq(leaf, inv_temperature=1.0)
        (result.quantized.sum() + result.entropy_aux_loss).backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in lfq.parameters())])
    assert not result.quantized[~row_mask].any()
    assert (result.indices[~row_mask] == -1).all()
    assert not poisoned.grad[~row_mask].any()
    torch.testing.assert_close(poisoned.grad[row_mask], good.grad[0], rtol=1e-4, atol=1e-6)
    for one, other in zip(gradients[1][1:], gradients[0][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_share_is_taken_of_the_rows_in_the_mask():
    """The entropies of equal vectors do not depend on the sample, unless it contains excluded rows."""
    lfq, full = (fastvq.LFQ(dim=4, frac_per_sample_entropy=share, diversity_gamma=0.5) for share in (0.3, 1.0))
    x = torch.tensor([0.1, -0.2, 0.3, 0.05]).expand(1, 40, 4).clone()
    expected = full(x, inv_temperature=1.0).entropy_aux_loss
    mask = torch.rand(1, 40, generator=generator()) < 0.5
    x[~mask] = 5.0
    x[0, 7] = torch.nan
    for _ in range(5):
        close(lfq(x, mask=mask, inv_temperature=1.0).entropy_aux_loss, expected)


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(1, 0.1, 1), (20, 0.1, 2), (19, 0.5, 9), (0, 0.5, 0), (7, 1.0, 7)]
)
def test_size_of_a_share(count, share, expected):
    mask = torch.cat([torch.zeros(11, dtype=torch.bool), torch.ones(count, dtype=torch.bool)])
    mask = mask[torch.randperm(len(mask))]
    chosen = random_subset(mask, share)
    assert chosen.sum() == expected
    assert not (chosen & ~mask).any()


def test_every_row_is_sampled_equally_often():
    mask = torch.tensor([True, False, True, True, True, False, True])
    torch.manual_seed(0)
    often = sum(random_subset(mask, 0.45).long() for _ in range(2000))
    assert not often[~mask].any()
    torch.testing.assert_close(often[mask] / 2000, torch.full((5,), 0.4), rtol=0, atol=0.05)


def test_nothing_to_sample():
    lfq = fastvq.LFQ(dim=4, frac_per_sample_entropy=0.5, commitment_loss_weight=1.0)
    for x, mask in ((torch.zeros(0, 3, 4), None), (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))):
        x.requires_grad_()
        result = lfq(x, mask=mask)
        result.entropy_aux_loss.backward()
        assert result.entropy_aux_loss == 0
        assert not x.grad.any()
        assert (result.indices == -1).all()


def test_many_bits():
    """No codebook is materialized unless entropies are requested."""
    lfq = fastvq.LFQ(dim=40, entropy_loss_weight=0.0, commitment_loss_weight=1.0, spherical=True)
    x = batch(2, 5, 40).requires_grad_()
    result = lfq(x)
    result.entropy_aux_loss.backward()
    expected = torch.where(x > 0, 1.0, -1.0).double() @ torch.pow(2.0, torch.arange(39.0, -1, -1, dtype=torch.float64))
    assert torch.equal(result.indices * 2 - (2**40 - 1), expected.long())
    close(result.quantized.detach().norm(dim=-1), torch.ones(2, 5))
    assert torch.equal(lfq.indices_to_codes(result.indices), result.quantized)


def test_single_vectors():
    lfq = fastvq.LFQ(dim=7, codebook_size=32)
    x = batch(9, 7)
    quantized, indices, _loss = lfq(x)
    expected = lfq(x[None])
    close(quantized.detach(), expected.quantized[0].detach())
    assert torch.equal(indices, expected.indices[0])
    assert torch.equal(lfq.indices_to_codes(indices), quantized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    ours, _theirs = pair("LFQ", dim=5, orthogonal_rotation=True)
    x = batch(3, 8, 5).to(dtype)
    result = ours(x)
    exact = ours(x.float())
    assert result.quantized.dtype == dtype
    assert result.entropy_aux_loss.dtype == torch.float32
    assert torch.equal(result.indices, exact.indices)
    close(result.entropy_aux_loss, exact.entropy_aux_loss)
    close(result.quantized, exact.quantized.to(dtype))
    projected = fastvq.LFQ(dim=7, codebook_size=32, orthogonal_rotation=True)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, loss = projected(batch(3, 8, 7))
    assert quantized.dtype == torch.float32
    assert loss.dtype == torch.float32
    rotation = projected.orthogonal_rot.clone()
    projected.to(dtype)
    assert torch.equal(projected.orthogonal_rot, rotation)
    quantized, indices, loss = projected(batch(3, 8, 7).to(dtype))
    assert (quantized.dtype, loss.dtype, projected.dtype) == (dtype, torch.float32, dtype)
    assert torch.equal(projected.indices_to_codes(indices), quantized)


def test_health():
    lfq = fastvq.LFQ(dim=6, codebook_size=8, num_codebooks=2)
    x = batch(4, 9, 6)
    result = lfq(x)
    lfq.eval()(x)
    counts = torch.stack([result.indices[..., c].flatten().bincount(minlength=8) for c in range(2)])
    assert torch.equal(lfq.code_counts, counts)
    assert lfq.usage().shape == (2,)
    close(lfq.quantization_error(), (x - result.quantized).square().mean().detach())


def test_health_of_many_codes():
    """Health counts bits instead of codes."""
    lfq = fastvq.LFQ(dim=40, entropy_loss_weight=0.0)
    x = batch(2, 30, 40).abs()
    x[..., :20] *= -1
    x[0, 0, 0] = torch.nan
    lfq(x)
    assert torch.equal(lfq.code_counts, torch.tensor([[59, 0], [0, 59]]).repeat_interleave(20, 0))
    assert torch.equal(lfq.usage(), torch.full((40,), 0.5))
    evo = fastvq.EvoLFQ(nn.Identity(), nn.Identity(), lfq)
    assert torch.equal(evo.usage(), lfq.usage())


def test_shifting_half_of_the_vectors_to_other_codes_changes_the_batch_entropy_alone():
    lfq = fastvq.LFQ(dim=2)
    _, parts = lfq(torch.tensor([[[5.0, 5.0], [-5.0, -5.0]]]), return_loss_breakdown=True)
    close(parts.batch_entropy, torch.tensor(math.log(2.0)))
    close(parts.per_sample_entropy, torch.zeros(()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastvq.LFQ(), "dim, codebook_size: at least"),
        (lambda: fastvq.LFQ(codebook_size=12), "codebook_size: must be a power of 2"),
        (lambda: fastvq.LFQ(codebook_size=1), "codebook_size: must be a power of 2"),
        (lambda: fastvq.LFQ(dim=31), "entropy_loss_weight: must be 0 beyond"),
        (lambda: fastvq.LFQ(dim=4, num_codebooks=0), "num_codebooks: must"),
        (lambda: fastvq.LFQ(dim=4, num_codebooks=2, keep_num_codebooks_dim=False), "keep_num_codebooks_dim: must not"),
        (lambda: fastvq.LFQ(dim=4, frac_per_sample_entropy=0.0), "frac_per_sample_entropy: must lie"),
        (lambda: fastvq.LFQ(dim=4, soft_clamp_input_value=0.5), "soft_clamp_input_value: must be at least"),
        (lambda: fastvq.LFQ(dim=5, codebook_size=16, has_projections=False), "has_projections: must be True"),
        (lambda: fastvq.LFQ(dim=4)(torch.zeros(2, 3, 5)), "x: must have shape"),
        (lambda: fastvq.LFQ(dim=4)(torch.zeros(2, 3, 4), mask=torch.ones(2, 4).bool()), "mask: must have shape"),
        (lambda: fastvq.LFQ(dim=4)(torch.zeros(2, 3, 4), mask=torch.ones(2, 3)), "mask: must be bool"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 7, "codebook_size": 32, "frac_per_sample_entropy": 0.5, "commitment_loss_weight": 1.0},
        {"dim": 6, "num_codebooks": 1, "orthogonal_rotation": True, "spherical": True},
    ],
    ids=["projected", "spherical"],
)
def test_compiled_training_step(options):
    lfq = fastvq.LFQ(**options)
    x = batch(3, 8, lfq.dim)
    x[0, 0, 0] = torch.nan
    assert_compiles(lfq, x, mask=torch.rand(3, 8, generator=generator()) < 0.7)


def test_travels():
    assert_travels(fastvq.LFQ(dim=7, codebook_size=32, orthogonal_rotation=True), batch(2, 5, 7))
