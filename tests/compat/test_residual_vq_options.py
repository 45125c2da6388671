"""Every option of `ResidualVQ` beside vector_quantize_pytorch's, over training steps."""

from __future__ import annotations

import functools

import pytest
import torch

import fastvq

from ..cases import close, flags_as_numbers, generator

vqp = pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")

DIM, SIZE, STAGES = 6, 16, 4
MASK = torch.rand(2, 20, generator=generator(7)) < 0.6
SGD = functools.partial(torch.optim.SGD, lr=0.3)


def batch(*shape, seed=0):
    return torch.randn(shape or (2, 20, DIM), generator=generator(seed))


def pair(**options):
    options = {"dim": DIM, "codebook_size": SIZE, "num_quantizers": STAGES, **options}
    torch.manual_seed(0)
    theirs = vqp.ResidualVQ(**options)
    ours = fastvq.ResidualVQ(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


LEARNABLE = {"learnable_codebook": True, "ema_update": False}
OPTIONS = {
    "plain": {},
    "projected": {"codebook_dim": 3},
    "sizes": {"codebook_size": (8, 16, 4), "num_quantizers": None},
    "shared": {"shared_codebook": True},
    "cosine": {"use_cosine_sim": True},
    "straight through": {"rotation_trick": False},
    "gradient through stages": {"quant_grad_frac": 0.5},
    "learnable": LEARNABLE,
    "learnable, gradient through stages": {"quant_grad_frac": 0.3, **LEARNABLE},
    "dropout": {"quantize_dropout": True},
    "dropout, learnable": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2, **LEARNABLE},
    "orthogonal": {"orthogonal_reg_weight": 3.0},
    "affine": {"affine_param": True},
    "in place": {"in_place_codebook_optimizer": SGD, **LEARNABLE},
    "not routed": {"route_gradients_to_input": False, **LEARNABLE},
    "implicit": {"implicit_neural_codebook": True},
    "implicit, wide": {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 11, "depth": 2}},
    "implicit, straight through": {"implicit_neural_codebook": True, "rotation_trick": False},
    "beam": {"beam_size": 3},
    "beam, cosine": {"beam_size": 3, "use_cosine_sim": True},
    "beam, projected": {"beam_size": 2, "eval_beam_size": 4, "codebook_dim": 3},
    "beam, weighted": {"beam_size": 3, "beam_score_quantizer_weights": [0.1, 2.0, 0.5, 1.0]},
    "beam, learnable": {"beam_size": 3, **LEARNABLE},
    "beam, shared": {"beam_size": 3, "shared_codebook": True},
    "beam, dropout": {"beam_size": 3, "quantize_dropout": True},
    "diveq": {"diveq": True},
    "diveq, projected": {"diveq": True, "codebook_dim": 3},
}


def run(module, x, seed, **forward):
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    quantized, indices, losses = module(x, **forward)
    weights = torch.randn(quantized.shape, generator=generator(seed + 100))
    ((quantized * weights).sum() + losses.sum()).backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    return (quantized.detach(), indices, losses.detach()), {"x": x.grad, **grads}


def assert_equal_steps(ours, theirs, x, seed=0, **forward):
    mine, my_grads = run(ours, x, seed, **forward)
    other, their_grads = run(theirs, x, seed, **forward)
    assert torch.equal(mine[1], other[1])
    torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[2], other[2], rtol=1e-4, atol=1e-5)
    assert my_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(my_grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)
    assert_equal_state(ours, theirs)


def assert_equal_state(ours, theirs):
    state, expected = ours.state_dict(), flags_as_numbers(theirs.state_dict())
    assert state.keys() == expected.keys()
    beams = ours.beam_size is not None and not ours.layers[0].learnable_codebook
    for name, tensor in expected.items():
        if beams and (ours.shared_codebook or not name.startswith("layers.0.")):
            continue  # after a beam search, theirs learns at the first stage alone
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", OPTIONS)
def test_training(kind):
    ours, theirs = pair(**OPTIONS[kind])
    for seed in range(3):
        assert_equal_steps(ours, theirs, batch(seed=seed), seed)
        theirs.load_state_dict(ours.state_dict())


def test_codebooks_learn_from_what_the_beam_chose():
    for shared in (False, True):
        ours = pair(beam_size=3, shared_codebook=shared)[0]
        before, x = ours.codebooks.clone(), batch().flatten(0, 1)
        indices = ours(x)[1]
        residual, size, total = x, torch.ones(SIZE), before[0].clone()
        for stage, (codes, chosen) in enumerate(zip(before, indices.unbind(-1), strict=True)):
            if not shared:
                size, total = torch.ones(SIZE), before[stage].clone()
            size = 0.8 * size + 0.2 * torch.bincount(chosen, minlength=SIZE)
            total = 0.8 * total + 0.2 * torch.zeros_like(codes).index_add_(0, chosen, residual)
            if not shared or stage == STAGES - 1:
                close(ours.layers[stage]._codebook.cluster_size[0], size)
                close(ours.layers[stage]._codebook.embed_avg[0], total)
            residual = residual - codes[chosen]


@pytest.mark.parametrize("kind", OPTIONS)
def test_eval_and_decoding(kind):
    ours, theirs = pair(**OPTIONS[kind])
    x = batch()
    run(ours, x, 0)
    if "affine" in kind:
        theirs(x)  # theirs can't load what it saved, before it has seen a batch
        for layer in theirs.layers:  # and follows the batch in eval too
            layer._codebook.update_affine = lambda *_, **__: None
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    (quantized, indices, losses), (expected, expected_indices, expected_losses) = ours(x), theirs(x)
    assert torch.equal(indices, expected_indices)
    close(losses.detach(), expected_losses.detach())
    if not kind.startswith("diveq"):  # theirs adds noise in eval too
        torch.testing.assert_close(quantized, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.get_output_from_indices(indices).detach(), quantized.detach(), rtol=1e-4, atol=1e-5)
    if "affine" not in kind:
        close(ours.get_codes_from_indices(indices).detach(), theirs.get_codes_from_indices(indices).detach())
    assert torch.equal(ours.encode(x), indices)


@pytest.mark.parametrize(
    "kind", ["plain", "shared", "learnable", "implicit", "beam", "beam, weighted", "diveq", "dropout"]
)
def test_masks(kind):
    """As if the masked rows weren't there."""
    ours, packed = pair(**OPTIONS[kind])[0], pair(**OPTIONS[kind])[0]
    for seed in range(2):
        x = batch(seed=seed)
        (quantized, indices, losses), grads = run(ours, x, seed, mask=MASK, rand_quantize_dropout_fixed_seed=seed)
        assert (indices[~MASK] == -1).all()
        assert not quantized[~MASK].any()
        assert not grads["x"][~MASK].any()
        expected, expected_indices, expected_losses = packed(x[MASK][None], rand_quantize_dropout_fixed_seed=seed)
        assert torch.equal(indices[MASK], expected_indices[0])
        close(losses, expected_losses.detach())
        if kind != "diveq":  # which is random
            close(quantized[MASK], expected[0].detach())
    for name, tensor in packed.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["plain", "beam", "cosine"])
def test_masks_equal_the_peer(kind):
    ours, theirs = pair(**OPTIONS[kind])
    for seed in range(2):
        if kind == "cosine":  # theirs takes the masked loss from directions and vectors
            mine, other = (
                run(ours, batch(seed=seed), seed, mask=MASK)[0],
                run(theirs, batch(seed=seed), seed, mask=MASK)[0],
            )
            assert torch.equal(mine[1], other[1])
            close(mine[0], other[0])
            assert_equal_state(ours, theirs)
        else:
            assert_equal_steps(ours, theirs, batch(seed=seed), seed, mask=MASK)
            theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kind", ["plain", "projected", "beam", "implicit", "learnable", "diveq"])
def test_images_and_their_masks_are_sequences(kind):
    images = fastvq.ResidualVQ(
        dim=DIM, codebook_size=SIZE, num_quantizers=STAGES, accept_image_fmap=True, **OPTIONS[kind]
    )
    sequences = fastvq.ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=STAGES, **OPTIONS[kind])
    sequences.load_state_dict(images.state_dict())
    x, mask = batch(2, DIM, 4, 5), MASK.view(2, 4, 5)
    torch.manual_seed(0)
    quantized, indices, losses = images(x, mask)
    torch.manual_seed(0)
    expected, expected_indices, expected_losses = sequences(x.flatten(2).transpose(1, 2), MASK)
    assert torch.equal(indices, expected_indices.view(2, 4, 5, STAGES))
    close(quantized.detach(), expected.transpose(1, 2).reshape(x.shape).detach())
    close(losses.detach(), expected_losses.detach())


def test_beams_by_call():
    ours, theirs = pair(beam_size=2)
    for beams in (1, 2, 5):
        mine, other = run(ours, batch(), 0, beam_size=beams), run(theirs, batch(), 0, beam_size=beams)
        assert torch.equal(mine[0][1], other[0][1])
        close(mine[0][0], other[0][0])
        close(mine[0][2], other[0][2])
        theirs.load_state_dict(ours.state_dict())
    ours.eval(), theirs.eval()
    for beams in (1, 2, 5):
        assert torch.equal(ours(batch(), beam_size=beams)[1], theirs(batch(), beam_size=beams)[1])


def test_more_beams_come_closer():
    ours = pair()[0].eval()
    errors = [(ours(batch(), beam_size=beams)[0] - batch()).square().mean() for beams in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]


def test_a_beam_as_wide_as_all_ways_is_the_best_of_them():
    ours = fastvq.ResidualVQ(dim=3, codebook_size=5, num_quantizers=2, beam_size=5).eval()
    x = batch(1, 30, 3)
    first, second = ours.codebooks
    sums = (first[:, None] + second).flatten(0, 1)
    best = (x[0, :, None].double() - sums.double()).square().sum(-1).argmin(1)
    # Within a stage the score counts both errors: weigh the first out.
    ours.beam_score_weights = (0.0, 1.0)
    indices = ours(x)[1][0]
    assert torch.equal(indices[:, 0] * 5 + indices[:, 1], best)


def test_kmeans_goes_stage_by_stage_with_beams():
    ours = fastvq.ResidualVQ(
        dim=DIM, codebook_size=SIZE, num_quantizers=3, kmeans_init=True, beam_size=3, use_cosine_sim=False, decay=1.0
    )
    x = batch(4, 100, DIM)
    assert ours(x)[2].diff().max() < 0
    assert all(bool(layer._codebook.initted) for layer in ours.layers)
    assert ours(x)[2][-1] < 0.6


def test_the_implicit_codebook_learns():
    torch.manual_seed(0)
    ours = fastvq.ResidualVQ(dim=DIM, codebook_size=8, num_quantizers=3, implicit_neural_codebook=True)
    optimizer, losses = torch.optim.Adam(ours.parameters(), 1e-2), []
    x = batch(4, 50, DIM)
    for _ in range(60):
        optimizer.zero_grad()
        loss = ours(x)[2].sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_diveq_learns_from_the_task_alone_and_adds_no_noise_in_eval():
    ours = pair(diveq=True)[0]
    quantized, indices, losses = ours(batch())
    quantized.square().sum().backward()
    assert all(layer._codebook.embed.grad.any() for layer in ours.layers)
    assert not losses.any()
    ours.eval()
    quantized, indices, _ = ours(batch())
    close(quantized, ours.get_output_from_indices(indices).detach())


@pytest.mark.parametrize("kind", ["plain", "projected", "implicit", "beam", "shared"])
def test_checkpoints_load_both_ways(kind):
    ours, theirs = pair(**OPTIONS[kind])
    run(ours, batch(), 0)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, tensor in flags_as_numbers(theirs.state_dict()).items():
        assert (ours.state_dict()[name].shape, ours.state_dict()[name].dtype) == (tensor.shape, tensor.dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours.eval()(batch())[1], theirs.eval()(batch())[1])


@pytest.mark.parametrize(
    "options", [{"commitment_use_cross_entropy_loss": True}, {"codebook_diversity_loss_weight": 2.0}], ids=str
)
def test_soft_losses(options):
    ours, theirs = pair(**options, codebook_diversity_temperature=3.0, ema_update=False)
    for seed in range(2):
        assert_equal_steps(ours, theirs, batch(seed=seed), seed)


@pytest.mark.parametrize("kind", ["plain", "cosine", "implicit", "projected", "dropout"])
def test_cross_entropy_of_given_indices(kind):
    """vector_quantize_pytorch fails here. Stage by stage, of what the stages before leave over."""
    ours = pair(**OPTIONS[kind])[0]
    x, targets = batch().requires_grad_(), torch.randint(-1, SIZE, (2, 20, STAGES), generator=generator(4))
    with torch.no_grad():
        codes = ours.eval()(x, return_all_codes=True)[3]
    quantized, loss = ours.train()(x, indices=targets, freeze_codebook=True)
    residual, total, expected = ours.project_in(x), 0, 0
    for stage in range(STAGES):
        codebook = ours.codebooks[stage].detach()
        table = codebook[None, None]
        if kind == "implicit" and stage:
            table = ours.mlps[stage - 1](codebook, condition=torch.as_tensor(total)[:, :, None])
        inputs = torch.nn.functional.normalize(residual, dim=-1) if kind == "cosine" else residual
        difference = inputs[:, :, None] - table
        logits = (inputs[:, :, None] * table).sum(-1) if kind == "cosine" else -difference.norm(dim=-1)
        expected = expected + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[..., stage].flatten(), ignore_index=-1
        )
        residual, total = residual - codes[stage], total + codes[stage]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert x.grad.any()
    close(quantized.detach(), ours.project_out(codes.sum(0)).detach())
    listed = ours(x, indices=list(targets.unbind(-1)), freeze_codebook=True)[1]
    torch.testing.assert_close(listed, loss)


@pytest.mark.parametrize("kind", ["plain", "implicit", "beam", "shared"])
def test_sampling(kind):
    ours = pair(**OPTIONS[kind], stochastic_sample_codes=True, sample_codebook_temp=0.5)[0]
    ours.requires_grad_(True)
    indices = [ours(batch(), freeze_codebook=True)[1] for _ in range(2)]
    assert not torch.equal(*indices)
    ours(batch())[2].sum()
    cold = ours(batch(), sample_codebook_temp=0.0, freeze_codebook=True)[1]
    assert torch.equal(cold, ours.eval()(batch())[1])


def test_groups_take_indices_for_cross_entropy():
    torch.manual_seed(0)
    ours = fastvq.GroupedResidualVQ(dim=DIM, groups=2, codebook_size=SIZE, num_quantizers=3)
    x, targets = batch(), torch.randint(SIZE, (2, 2, 20, 3), generator=generator(4))
    quantized, loss = ours.eval()(x, indices=targets)
    parts = [rvq(part, indices=own) for rvq, part, own in zip(ours.rvqs, x.chunk(2, -1), targets, strict=True)]
    close(loss, sum(part[1] for part in parts))
    close(quantized, torch.cat([part[0] for part in parts], -1))
