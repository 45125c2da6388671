"""Every option of `VectorQuantize` beside vector_quantize_pytorch's, over training steps.

Outputs, losses, gradients and state are compared, and checkpoints in both directions.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fastvq

from ..cases import close, flags_as_numbers, generator

vqp = pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")

DIM, SIZE = 8, 20
SGD = functools.partial(torch.optim.SGD, lr=0.3)


def batch(*shape, seed=0):
    return torch.randn(shape or (3, 15, DIM), generator=generator(seed))


def pair(**options):
    """Return fastvq's layer and its peer, in the same state."""
    torch.manual_seed(0)
    theirs = vqp.VectorQuantize(DIM, SIZE, **options)
    ours = fastvq.VectorQuantize(DIM, SIZE, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def linear_bridge():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())


HEADS = {
    "heads": {"heads": 2, "codebook_dim": 4},
    "separate heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "projected heads": {"heads": 3, "codebook_dim": 5},
    "separate projected heads": {"heads": 3, "codebook_dim": 5, "separate_codebook_per_head": True},
    "cosine heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "use_cosine_sim": True},
}
OPTIONS = {
    **HEADS,
    "layer norm": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "layer norm unprojected": {"layernorm_after_project_in": True},
    "video": {"accept_3d_fmap": True},
    "video heads": {"accept_3d_fmap": True, **HEADS["separate projected heads"]},
    "orthogonal": {"orthogonal_reg_weight": 3.0},
    "orthogonal, used codes": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal, learnable": {"orthogonal_reg_weight": 3.0, "learnable_codebook": True, "ema_update": False},
    "orthogonal heads": {"orthogonal_reg_weight": 3.0, **HEADS["separate heads"]},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9, "directional_reparam_variance": 0.1},
    "in place": {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": SGD},
    "in place heads": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": SGD,
        **HEADS["separate heads"],
    },
    "affine": {"affine_param": True},
    "affine decays": {"affine_param": True, "affine_param_batch_decay": 0.5, "affine_param_codebook_decay": 0.3},
    "affine, learnable": {"affine_param": True, "learnable_codebook": True, "ema_update": False},
    "affine heads": {"affine_param": True, **HEADS["separate heads"]},
    "not routed": {"route_gradients_to_input": False},
    "not routed, learnable": {"route_gradients_to_input": False, "learnable_codebook": True, "ema_update": False},
    "manual": {"manual_ema_update": True},
    "no sync": {"sync_codebook": False, "sync_kmeans": False},
    "learnable heads": {"learnable_codebook": True, "ema_update": False, **HEADS["projected heads"]},
}
INPUTS = {"video": (2, DIM, 2, 3, 4), "video heads": (2, DIM, 2, 3, 4)}


def run(module, x, seed, **forward):
    """(results, gradients) of a training step; the seed is that of what the step draws."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    quantized, indices, loss, breakdown = module(x, return_loss_breakdown=True, **forward)
    weights = torch.randn(quantized.shape, generator=generator(seed + 100))
    total = (quantized * weights).sum() + loss.sum()
    if total.requires_grad:
        total.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    return (quantized.detach(), indices, loss.detach(), breakdown), {"x": x.grad, **grads}


def assert_equal_steps(ours, theirs, x, seed=0, *, grad=None, **forward):
    mine, my_grads = run(ours, x, seed, **forward)
    other, their_grads = run(theirs, x, seed, **forward)
    assert torch.equal(mine[1], other[1])
    for a, b in zip((mine[0], mine[2]), (other[0], other[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert mine[3]._fields == other[3]._fields
    for name, a, b in zip(mine[3]._fields, mine[3], other[3], strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5, msg=name)
    their_x = their_grads.pop("x")
    my_x = my_grads.pop("x")
    if their_x is not None or my_x is not None:
        tolerance = grad or {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(my_x, torch.zeros_like(x) if their_x is None else their_x, **tolerance)
    assert my_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(my_grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)
    assert_equal_state(ours, theirs)


def assert_equal_state(ours, theirs):
    state, expected = ours.state_dict(), flags_as_numbers(theirs.state_dict())
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype), name
        if name.endswith("embed_avg") and not ours.ema_update:
            continue  # theirs moves it for nothing, where codes are replaced
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", OPTIONS)
def test_training(kind):
    ours, theirs = pair(**OPTIONS[kind])
    for seed in range(4):
        assert_equal_steps(ours, theirs, batch(*INPUTS.get(kind, ()), seed=seed), seed)


@pytest.mark.parametrize("kind", OPTIONS)
def test_eval_decoding_and_checkpoints_both_ways(kind):
    ours, theirs = pair(**OPTIONS[kind])
    x = batch(*INPUTS.get(kind, ()))
    run(ours, x, 0)
    torch.manual_seed(2)
    theirs = vqp.VectorQuantize(DIM, SIZE, **OPTIONS[kind])
    if "affine" in kind:  # theirs can't load what it saved, before it has seen a batch
        theirs(x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    if "affine" in kind:  # theirs follows the batch in eval too
        theirs._codebook.update_affine = lambda *_, **__: None
    (quantized, indices, loss), (expected, expected_indices, expected_loss) = ours(x), theirs(x)
    assert torch.equal(indices, expected_indices)
    close(quantized, expected.detach())
    assert loss.item() == expected_loss.item() == 0
    assert torch.equal(ours.encode(x), indices)
    close(ours.get_output_from_indices(indices), quantized)
    if "affine" not in kind and kind not in (
        "heads",
        "projected heads",
        "learnable heads",
    ):  # theirs decodes these otherwise
        close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))


SOFT = {
    "cross entropy": {"commitment_use_cross_entropy_loss": True},
    "cross entropy, cosine": {"commitment_use_cross_entropy_loss": True, "use_cosine_sim": True},
    "cross entropy, heads": {"commitment_use_cross_entropy_loss": True, **HEADS["heads"]},
    "cross entropy, separate heads": {"commitment_use_cross_entropy_loss": True, **HEADS["separate projected heads"]},
    "cross entropy, learnable": {
        "commitment_use_cross_entropy_loss": True,
        "learnable_codebook": True,
        "ema_update": False,
    },
    "diversity": {"codebook_diversity_loss_weight": 2.0, "codebook_diversity_temperature": 5.0},
    "diversity, hot": {"codebook_diversity_loss_weight": 2.0},
    "diversity, cosine": {"codebook_diversity_loss_weight": 2.0, "use_cosine_sim": True},
    "diversity, heads": {
        "codebook_diversity_loss_weight": 2.0,
        "codebook_diversity_temperature": 3.0,
        **HEADS["projected heads"],
    },
    "diversity, orthogonal": {
        "codebook_diversity_loss_weight": 2.0,
        "codebook_diversity_temperature": 3.0,
        "orthogonal_reg_weight": 1.0,
    },
    "video diversity": {
        "accept_3d_fmap": True,
        "codebook_diversity_loss_weight": 2.0,
        "codebook_diversity_temperature": 3.0,
    },
}


@pytest.mark.parametrize("kind", SOFT)
def test_soft_losses(kind):
    """Compare the soft losses with a frozen codebook.

    The peer moves its codebook in place before the backward pass, whose gradient is then that of codes that were not
    compared.
    """
    ours, theirs = pair(**{"ema_update": False, **SOFT[kind]})
    for seed in range(3):
        shape = (2, DIM, 2, 3, 4) if "video" in kind else ()
        hot = {"rtol": 1e-2, "atol": 2e-4} if "hot" in kind or kind == "diversity, cosine" else None
        assert_equal_steps(ours, theirs, batch(*shape, seed=seed), seed, grad=hot)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, HEADS["heads"], HEADS["separate heads"]], ids=str)
def test_cross_entropy_with_given_indices(options, training):
    ours, theirs = (module.train(training) for module in pair(**options, ema_update=False))
    shape = (3, 15, 2) if options.get("heads") else (3, 15)
    targets = torch.randint(-1, SIZE, shape, generator=generator(4))
    results = []
    for module in (ours, theirs):
        x = batch().requires_grad_()
        quantized, loss = module(x, indices=targets)
        loss.backward()
        results.append((quantized.detach(), loss.detach(), x.grad))
    if not options.get("heads"):  # theirs returns the heads apart
        close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-5)
    assert_equal_state(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"commitment_use_cross_entropy_loss": True}, {"codebook_diversity_loss_weight": 1.0}]
)
@pytest.mark.parametrize("heads", [{}, HEADS["separate projected heads"]], ids=["one", "heads"])
def test_soft_losses_exclude_masked_and_non_finite_rows(options, heads):
    mask = torch.ones(3, 15, dtype=torch.bool)
    mask[1, 4] = mask[2, 14] = False
    dirty = batch().masked_fill(~mask[..., None], torch.nan)
    results = [
        run(pair(**options, **heads)[0], x, 0, **forward) for x, forward in ((batch(), {"mask": mask}), (dirty, {}))
    ]
    for a, b in zip(results[0][0][:3], results[1][0][:3], strict=True):
        close(a, b)
    close(results[0][1]["x"][mask], results[1][1]["x"][mask])
    assert not results[1][1]["x"][~mask].any()


def frequencies(module, k=None, **forward):
    """Return how often each code is drawn for one vector, (SIZE,)."""
    x = batch(1, 1, DIM).expand(1, 20_000, DIM)
    torch.manual_seed(0)
    indices = module(x, freeze_codebook=True, **forward)[1]
    return torch.bincount(indices.flatten(), minlength=SIZE) / 20_000


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=["distance", "cosine"])
@pytest.mark.parametrize("forward", [{}, {"sample_codebook_temp": 0.3}, {"topk": 3}], ids=str)
def test_sampling_is_as_probable_as_the_peers(options, forward):
    ours, theirs = pair(stochastic_sample_codes=True, sample_codebook_temp=0.5, **options)
    mine, other = frequencies(ours, **forward), frequencies(theirs, **forward)
    assert (mine - other).abs().max() < 0.015
    assert (mine > 0.01).sum() > 2
    assert torch.equal(ours(batch(), sample_codebook_temp=0.0, freeze_codebook=True)[1], ours.encode(batch()))
    ours.eval()
    assert torch.equal(ours(batch())[1], ours.encode(batch()))


def test_gumbel_straight_through_where_the_gradient_is_not_routed():
    """The gradient of the soft assignment, in expectation theirs; with a route, plain straight-through in both."""
    options = {"straight_through": True, "rotation_trick": False, "sample_codebook_temp": 0.7, "commitment_weight": 0.0}
    options["ema_update"] = False
    ours, theirs = pair(**options, route_gradients_to_input=False)
    assert_equal_steps(ours, theirs, batch())
    x = batch().requires_grad_()
    ours(x)[0].square().sum().backward()
    assert x.grad.any()
    assert_equal_steps(*pair(**options), batch())
    assert fastvq.VectorQuantize(DIM, SIZE, straight_through=True).rotation_trick is False


def test_two_passes_before_one_backward():
    """Losses of a codebook that has moved on still have their gradient."""
    for options in (
        {"codebook_diversity_loss_weight": 1.0, "orthogonal_reg_weight": 1.0},
        {"commitment_use_cross_entropy_loss": True},
        {
            "learnable_codebook": True,
            "ema_update": False,
            "commitment_use_cross_entropy_loss": True,
            "threshold_ema_dead_code": 1,
        },
        {"orthogonal_reg_weight": 1.0, "threshold_ema_dead_code": 1},
        {"affine_param": True, "orthogonal_reg_weight": 1.0},
    ):
        module, x = pair(**options)[0], batch().requires_grad_()
        (module(x)[2] + module(x)[2]).backward()
        assert x.grad.isfinite().all()
