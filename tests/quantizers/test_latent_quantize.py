"""LatentQuantize: its losses by definition, its values, and its peer where that is correct."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import vector_quantize_pytorch as vqp
from torch import nn

import fastvq
from fastvq.quantizers import latent_quantize

from .. import contract
from ..cases import HALF, close
from ..contract import vectors

LEVELS = [5, 4, 8]
OPTIONS = {
    "plain": {"dim": 3},
    "one number": {"dim": 4, "levels": 6, "codebook_dim": 4},
    "codebooks": {"dim": 6, "num_codebooks": 2},
    "kept axis": {"dim": 3, "keep_num_codebooks_dim": True},
    "fixed values": {"dim": 3, "optimize_values": False},
    "no loss": {"dim": 3, "commitment_loss_weight": 0.0, "quantization_loss_weight": 0.0},
}
PROJECTED = {"projected": {"dim": 7}, "codebooks, projected": {"dim": 4, "num_codebooks": 3}}


def layer(**options):
    return fastvq.LatentQuantize(**{"levels": LEVELS, "dim": 3, **options})


def spread(module):
    """Give the values learned positions, out of order."""
    with torch.no_grad():
        for values in module.values_per_latent:
            values.copy_(vectors(len(values), seed=len(values), scale=0.5))
    return module


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("spatial", [(40,), (4, 5), (2, 3, 4)], ids=["series", "images", "video"])
def test_equals_the_peer(kind, spatial):
    """Without projections, where the peer's loss compares the right tensors; its values get no gradient."""
    options = {"levels": LEVELS, **OPTIONS[kind]}
    ours, theirs = fastvq.LatentQuantize(**options), vqp.LatentQuantize(**options)
    if kind != "fixed values":
        contract.assert_checkpoints_load_both_ways(ours, theirs)
    for training in (True, False):
        xs = [vectors(3, ours.dim, *spatial, scale=0.5).requires_grad_() for _ in range(2)]
        results, expected = ours.train(training)(xs[0]), theirs.train(training)(xs[1])
        assert (results[1].shape, results[1].dtype) == (expected[1].shape, expected[1].dtype)
        # theirs truncates the sum of z and (value - z): some indices are one too small
        assert (results[1] == expected[1]).float().mean() > 0.9
        for one, other in ((results[0], expected[0]), (results[2], expected[2])):
            close(one.detach(), other.detach())
        results[0].square().sum().backward()
        expected[0].square().sum().backward()
        close(xs[0].grad, xs[1].grad)
    close(ours.implicit_codebook, theirs.implicit_codebook)
    close(ours.indices_to_codes(results[1]), theirs.indices_to_codes(results[1]))
    assert torch.equal(ours.indices_to_codes(results[1]), results[0])


@pytest.mark.parametrize("kind", PROJECTED)
def test_projected_equals_the_peer_in_eval(kind):
    options = {"levels": LEVELS, **PROJECTED[kind]}
    ours, theirs = fastvq.LatentQuantize(**options).eval(), vqp.LatentQuantize(**options).eval()
    contract.assert_checkpoints_load_both_ways(ours, theirs)
    x = vectors(3, ours.dim, 40)
    results, expected = ours(x), theirs(x)
    close(results[0], expected[0])
    close(results[2], expected[2])
    assert torch.equal(ours.indices_to_codes(results[1]), results[0])


@pytest.mark.parametrize("options", [{}, {"dim": 7}, {"dim": 6, "num_codebooks": 2}], ids=str)
@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7), (None, None)], ids=str)
def test_losses_by_definition(options, weights):
    module = spread(layer(commitment_loss_weight=weights[0], quantization_loss_weight=weights[1], **options))
    x = vectors(2, module.dim, 30, scale=0.5).requires_grad_()
    _, indices, loss = module(x)
    latents = module.project_in(x.transpose(1, 2)).unflatten(-1, (module.num_codebooks, 3))
    levels = (indices.reshape(2, 30, -1, 1) // module._basis) % module._levels
    selected = torch.stack([values[levels[..., i]] for i, values in enumerate(module.values_per_latent)], -1)
    nearest = [(latents[..., i, None] - v).abs().argmin(-1) for i, v in enumerate(module.values_per_latent)]
    assert torch.equal(levels, torch.stack(nearest, -1))
    commitment, quantization = (weight or 0.0 for weight in weights)
    expected = commitment * (latents - selected.detach()).square().mean()
    expected = expected + quantization * (latents.detach() - selected).square().mean()
    close(loss.detach(), expected.detach())
    if any(weights):
        inputs = [x, *module.values_per_latent]
        for one, other in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
            close(one, other)


def gradients(loss, inputs):
    """Return the gradients, zeros where there are none."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(inputs, found, strict=True)]


def test_the_losses_of_the_peer_cancel():
    """The peer pushes the encoder away by one loss as much as it pulls it by the other."""
    x = vectors(2, 3, 30, scale=0.5).requires_grad_()
    assert gradients(vqp.LatentQuantize(LEVELS, 3)(x)[2], [x])[0].abs().max() < 1e-9
    assert gradients(layer()(x)[2], [x])[0].abs().max() > 1e-5


def test_the_values_learn():
    """The peer's values stay unchanged, since they get no gradient."""
    x = vectors(4, 3, 200, scale=0.3)

    def train(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=5.0)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = module(x)[2]
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        return losses

    ours, theirs = train(layer()), train(vqp.LatentQuantize(LEVELS, 3))
    assert ours[-1] < 0.85 * ours[0]
    assert theirs[-1] == pytest.approx(theirs[0])
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_in_place_optimizer(training):
    """A step of plain gradient descent changes the values and nothing else."""
    module = spread(layer(dim=4, in_place_codebook_optimizer=partial(torch.optim.SGD, lr=2.0))).train(training)
    twin = spread(layer(dim=4))
    twin.load_state_dict(module.state_dict())
    x = vectors(2, 4, 30).requires_grad_()
    with torch.no_grad() if training else torch.enable_grad():
        module(x)
    twin(x)[2].backward()
    for values, reference in zip(module.values_per_latent, twin.values_per_latent, strict=True):
        close(values.detach(), (reference - 2.0 * reference.grad if training else reference).detach())
        assert values.grad is None
    assert module.project_in.weight.grad is None
    quantized, _, loss = module(x)
    (quantized.sum() + loss).backward()
    assert all(values.grad is None for values in module.values_per_latent)
    assert module.project_in.weight.grad.isfinite().all()


def test_in_place_steps_are_the_same_on_every_rank(monkeypatch):
    """They take the mean of the gradients, here of one rank with a gradient and one without."""
    monkeypatch.setattr(latent_quantize, "mean", lambda grad: grad / 2)
    x, moved = vectors(2, 3, 30), []
    for rate in (2.0, 1.0):
        module = spread(layer(in_place_codebook_optimizer=partial(torch.optim.SGD, lr=rate)))
        module(x)
        moved.append(torch.cat(list(module.values_per_latent)).detach())
        monkeypatch.undo()
    close(*moved)


def test_learned_values_in_any_order_are_coded():
    module = spread(layer())
    indices = torch.arange(160)[None]
    codes = module.indices_to_codes(indices)
    levels = (indices % 5, indices // 5 % 4, indices // 20)
    expected = [values[level] for values, level in zip(module.values_per_latent, levels, strict=True)]
    assert torch.equal(codes, torch.stack(expected, 1))
    assert torch.equal(module.codes_to_indices(codes.transpose(1, 2)), indices.int())
    assert torch.equal(module.codes_to_indices(module.implicit_codebook), indices[0].int())
    assert torch.equal(module.indices_to_codes(indices, project_out=False), codes)
    close(module.quantize(codes.transpose(1, 2)), codes.transpose(1, 2))


def test_equal_values_give_the_first():
    module = layer(levels=[4, 4, 4])
    with torch.no_grad():
        for values in module.values_per_latent:
            values.copy_(torch.tensor([0.5, -0.5, 0.5, -0.5]))
    x = torch.tensor([[0.4, -0.4, 0.0]])
    assert module(x)[1].tolist() == [0 + 1 * 4 + 0 * 16]


def test_fixed_values_are_state():
    first, second = layer(optimize_values=False), layer(optimize_values=False, dim=3)
    with torch.no_grad():
        first.values_per_latent[0].add_(0.125)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.values_per_latent[0], first.values_per_latent[0])
    assert not any(p.requires_grad for p in second.values_per_latent)
    incomplete = first.state_dict()
    del incomplete["values_per_latent.0"]
    with pytest.raises(RuntimeError, match=r"values_per_latent\.0"):
        second.load_state_dict(incomplete)


@pytest.mark.parametrize("metadata", [True, False])
def test_checkpoints_of_the_peer_without_fixed_values(metadata):
    theirs = nn.Sequential(vqp.LatentQuantize(LEVELS, 5, optimize_values=False))
    ours = nn.Sequential(layer(dim=5, optimize_values=False))
    state = theirs.state_dict()
    ours.load_state_dict(state if metadata else dict(state), strict=True)
    close(ours[0].project_in.weight, theirs[0].project_in.weight)
    assert not any(name.startswith("0.values") for name in state)


@pytest.mark.parametrize("options", [{}, {"dim": 6}, {"dim": 6, "num_codebooks": 2}], ids=str)
def test_non_finite_rows(options):
    module = layer(**options)
    mask, indices, twin = contract.assert_non_finite_rows_are_excluded(module, vectors(2, module.dim, 6), axis=1)
    assert (indices[~mask] == -1).all()
    assert (indices[mask] >= 0).all()
    assert torch.equal(module.code_counts, twin.code_counts)
    assert not module.indices_to_codes(indices).movedim(1, -1)[~mask].any()


def test_masks_and_health():
    module = layer(levels=[3, 3], dim=2)
    x = torch.tensor([[[0.0, 0.5, 9.0], [-0.5, 0.4, 9.0]]])
    _, indices, loss = module(x, lens=torch.tensor([2]))
    assert indices.tolist() == [[1, 8, -1]]
    assert module.code_counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert module.quantization_error().item() == pytest.approx(0.01 / 4)
    assert loss.item() == pytest.approx(0.2 * 0.01 / 4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype):
    contract.assert_half_works(lambda: layer(dim=6), vectors(2, 6, 9), dtype)
    module, x = layer(), vectors(2, 3, 50).to(dtype)
    expected = module(x.float())[1]
    assert torch.equal(module(x)[1], expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(module(x.float())[1], expected)


def test_double_and_devices():
    module = layer(optimize_values=False).double()
    assert {v.dtype for v in module.values_per_latent} == {torch.float64}
    quantized, _, loss = module(vectors(2, 3, 4).double())
    assert (quantized.dtype, loss.dtype) == (torch.float64, torch.float64)
    assert {v.device.type for v in module.to("meta").values_per_latent} == {"meta"}


def test_shapes_and_copies():
    module = layer(dim=6)
    for shape in [(0, 6, 5), (2, 6, 0), (4, 6), (2, 6, 3, 4)]:
        quantized, indices, loss = module(torch.randn(shape))
        assert (quantized.shape, indices.shape, loss.shape) == (shape, (shape[0], *shape[2:]), ())
        assert loss.isfinite()
    contract.assert_copies_go_on_alike(module, vectors(2, 6, 9))
    contract.assert_inference_mode_works(module, vectors(2, 6, 9))
    contract.assert_copies_go_on_alike(
        layer(in_place_codebook_optimizer=partial(torch.optim.Adam, lr=0.1)), vectors(2, 3, 9)
    )


def test_more_codes_than_int32_can_number():
    module = layer(levels=[12] * 10, dim=10)
    quantized, indices, _ = module(vectors(1, 10, 20))
    assert indices.dtype == torch.int64
    assert torch.equal(module.indices_to_codes(indices), quantized)


def test_checkpointing():
    contract.assert_checkpointing_changes_nothing(layer(dim=6), vectors(2, 6, 9))
    module = layer(dim=6, in_place_codebook_optimizer=partial(torch.optim.SGD, lr=2.0))
    contract.assert_checkpointing_changes_nothing(module, vectors(2, 6, 9))


def test_exported():
    contract.assert_exports(layer(dim=6), vectors(2, 6, 9))
    contract.assert_traces_are_saved(layer(dim=6), vectors(2, 6, 9))


def test_compiled():
    contract.assert_compiles(layer(dim=6), vectors(2, 6, 9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": 5}, RuntimeError, "codebook_dim: must be at least 1"),
        ({"codebook_dim": 2}, ValueError, "codebook_dim: must be the number of levels, 3"),
        ({"num_codebooks": 0}, ValueError, "num_codebooks: must be"),
        ({"commitment_loss_weight": -1.0}, ValueError, "commitment_loss_weight: must not be negative"),
        (
            {"optimize_values": False, "in_place_codebook_optimizer": torch.optim.SGD},
            ValueError,
            "in_place_codebook_optimizer: needs",
        ),
    ],
)
def test_invalid_arguments(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        layer(**options)
