"""The layer: arguments, shapes, what learns, what stays, and how non-finite rows are excluded."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.backends import reference
from fastvq.codebook import Codebook
from fastvq.functional.quantize import lookup, unit_norm
from fastvq.parts import rotate_to

from ..cases import close, generator
from ..layers import DIM, SIZE, assert_same_state, batch, layer, state, train

LAYOUTS = {
    "(B, N, dim)": ({}, (4, 10, DIM), (4, 10)),
    "(B, dim)": ({}, (4, DIM), (4,)),
    "(B, H, W, dim)": ({}, (4, 3, 5, DIM), (4, 3, 5)),
    "(B, dim, N)": ({"channel_last": False}, (4, DIM, 10), (4, 10)),
    "(B, dim, N) one by one": ({"channel_last": False}, (4, DIM), (4,)),
    "(B, dim, H, W)": ({"accept_image_fmap": True}, (4, DIM, 3, 5), (4, 3, 5)),
    "(B, dim, H, W), channel_last": ({"accept_image_fmap": True, "channel_last": False}, (4, DIM, 3, 5), (4, 3, 5)),
}


@pytest.mark.parametrize("projected", [{}, {"codebook_dim": 3}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, projected):
    for training in (True, False):
        options, shape, indices_shape = LAYOUTS[layout]
        module = layer(**options, **projected).train(training)
        x = batch(*shape)
        codes = module.codebook.clone()
        channels_last = x if len(shape) == 2 or not options else x.movedim(1, -1)
        expected = reference.search(module.project_in(channels_last).detach().flatten(0, -2), codes).view(indices_shape)
        quantized, indices, loss = module(x)
        assert torch.equal(indices, expected)
        assert (quantized.shape, quantized.dtype, loss.shape) == (shape, torch.float32, ())
        output = module.project_out(lookup(codes, expected))
        close(quantized, output if len(shape) == 2 or not options else output.movedim(-1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_encode_and_back(layout):
    options, shape, _ = LAYOUTS[layout]
    module = layer(codebook_dim=3, **options).eval()
    quantized, indices, _ = module(batch(*shape))
    assert torch.equal(module.encode(batch(*shape)), indices)
    if indices.dim() > 1:
        close(module.get_output_from_indices(indices), quantized)
        codes = module.get_codes_from_indices(indices)
        assert codes.shape == (*shape[:1], 3, *shape[2:]) if options else (*shape[:-1], 3)


def test_encode_touches_nothing():
    module = layer(kmeans_init=True, threshold_ema_dead_code=2)
    before = state(module)
    module.encode(batch())
    assert_same_state(module, before)


def test_loss_is_zero_in_eval_and_nothing_flows_back():
    x = batch().requires_grad_()
    quantized, _, loss = layer().eval()(x)
    assert loss.item() == 0
    assert not quantized.requires_grad


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_commitment_weight(weight):
    module = layer(commitment_weight=weight)
    codes, x = module.codebook.clone(), batch()
    _, indices, loss = module(x)
    close(loss, weight * (x - codes[indices]).square().mean())


@pytest.mark.parametrize("options", [{}, {"rotation_trick": True}, {"rotation_trick": False}, {"dim": 1}], ids=str)
def test_gradient_estimator(options):
    module = layer(**options, commitment_weight=0.0)
    x = batch(4, 10, module.dim).requires_grad_()
    codes, upstream = module.codebook.clone(), batch(4, 10, module.dim, seed=1)
    module(x)[0].backward(upstream)
    gradient = "rotation" if options.get("rotation_trick", module.dim > 1) else "ste"
    other = x.detach().clone().requires_grad_()
    fastvq.quantize(other, codes, gradient=gradient).quantized.backward(upstream)
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
def test_ema_step(decay):
    module = layer(decay=decay, eps=1e-3)
    before, x = module.codebook.clone(), batch()
    quantized, indices, _ = module(x)
    assert torch.equal(quantized, before[indices])  # of the codebook from before the update
    one_hot = torch.nn.functional.one_hot(indices.flatten(), SIZE).double()
    size = decay * torch.ones(SIZE) + (1 - decay) * one_hot.sum(0)
    average = decay * before + (1 - decay) * (one_hot.T @ x.flatten(0, 1).double())
    smoothed = (size + 1e-3) / (size.sum() + SIZE * 1e-3) * size.sum()
    close(module.codebook, (average / smoothed[:, None]).float())
    close(module._codebook.cluster_size[0], size.float())
    close(module._codebook.embed_avg[0], average.float())


def test_cosine_similarity():
    module = layer(use_cosine_sim=True)
    codes, x = module.codebook.clone(), batch() * 7
    quantized, indices, loss = module(x)
    assert torch.equal(indices.flatten(), reference.search(unit_norm(x).flatten(0, 1), codes, metric="dot"))
    assert torch.equal(quantized, codes[indices])
    close(loss, (unit_norm(x) - codes[indices]).square().mean())
    close(module.codebook.norm(dim=1), torch.ones(SIZE))


@pytest.mark.parametrize("options", [{}, {"topk": 1}], ids=str)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("weights", [(0.25, 1.0), (0.0, 1.0), (2.0, 0.0)], ids=str)
def test_the_codebook_loss_has_a_weight_of_its_own(cosine, weights, options):
    """The losses of VQ-VAE and, on unit vectors and codes, of LlamaGen."""
    commitment, pull = weights
    module = layer(learnable_codebook=True, use_cosine_sim=cosine, commitment_weight=commitment, codebook_weight=pull)
    with torch.no_grad():
        module.codebook.mul_(3)
    x = batch().requires_grad_()
    quantized, indices, loss = module(x, **options)
    (loss.mean() + quantized.square().mean()).backward()
    own_x, codes = x.detach().clone().requires_grad_(), module.codebook.detach().clone().requires_grad_()
    rows, table = (unit_norm(t) if cosine else t for t in (own_x, codes))
    chosen = table[indices.reshape(x.shape[:-1])]
    close(quantized.reshape(x.shape), chosen.detach())
    expected = commitment * (rows - chosen.detach()).square().mean() + pull * (rows.detach() - chosen).square().mean()
    close(loss.mean(), expected)
    estimate = rotate_to(rows, chosen.detach(), indices.reshape(x.shape[:-1]))
    (expected + estimate.square().mean()).backward()
    close(x.grad, own_x.grad)
    grad = module._codebook.embed.grad
    close(torch.zeros_like(codes) if grad is None and not pull else grad[0], codes.grad)


def test_stages_have_separate_weights():
    """Each stage of a residual quantizer adds both losses, as DAC does."""
    options = {"learnable_codebook": True, "commitment_weight": 0.25}
    torch.manual_seed(0)
    together = fastvq.ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=2, **options)
    apart = fastvq.ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=2, codebook_weight=1.0, **options)
    apart.load_state_dict(together.state_dict())
    x = batch()
    losses = [module(x)[2] for module in (together, apart)]
    close(losses[1], 5 * losses[0])
    for loss in losses:
        loss.sum().backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        close(other.grad, 4 * one.grad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer(),
        lambda: fastvq.ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=2),
        lambda: fastvq.GroupedResidualVQ(dim=DIM, groups=2, codebook_size=SIZE, num_quantizers=2),
        lambda: fastvq.HierarchicalVQ(dim=DIM, codebook_size=SIZE, scales=(1, 4), channel_first=False),
    ],
)
def test_the_decay_can_be_scheduled(make):
    module = make()
    module.decay = 0.5
    assert {part.decay for part in module.modules() if isinstance(part, Codebook)} == {0.5} == {module.decay}
    with pytest.raises(ValueError, match=r"^decay: must lie in"):
        module.decay = 1.5


def test_a_learnable_codebook_trains():
    module = layer(learnable_codebook=True)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    x, losses = batch(), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(x)[2]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(module._codebook.cluster_size, torch.ones(1, SIZE))


def test_neither_ema_nor_gradient():
    module = layer(ema_update=False)
    before = state(module)
    train(module)
    assert_same_state(module, before)
    assert not module.codebook.requires_grad


FROZEN = [
    {},
    {"kmeans_init": True},
    {"threshold_ema_dead_code": 2},
    {"use_cosine_sim": True},
    {"learnable_codebook": True},
    {"orthogonal_reg_weight": 1.0},
    {"kmeans_init": True, "threshold_ema_dead_code": 5},
]


@pytest.mark.parametrize("options", FROZEN, ids=str)
def test_frozen_is_bitwise_frozen(options):
    for how in ("option", "forward", "eval", "eval and forward"):
        module = layer(freeze_codebook=how == "option", **options).train("eval" not in how)
        before = state(module)
        for seed in range(3):
            x = batch(seed=seed).requires_grad_()
            quantized, _, loss = module(x, freeze_codebook=True if "forward" in how else None)
            if module.training:
                (quantized.sum() + loss).backward()
        assert_same_state(module, before)
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_freezing_may_be_lifted_for_a_call():
    module = layer(freeze_codebook=True)
    before = module.codebook.clone()
    module(batch(), freeze_codebook=False)
    assert not torch.equal(module.codebook, before)


NON_FINITE = [
    {},
    {"threshold_ema_dead_code": 2},
    {"kmeans_init": True, "threshold_ema_dead_code": 2},
    {"use_cosine_sim": True},
    {"learnable_codebook": True},
    {"codebook_dim": 3},
]


@pytest.mark.parametrize("options", NON_FINITE, ids=str)
def test_a_non_finite_vector_is_a_masked_vector(options, backend):
    """One NaN in a batch leaves the codebook, bit for bit, as if its row had been masked."""
    for value in (torch.nan, torch.inf, -torch.inf):
        x = batch()
        mask = torch.ones(4, 10, dtype=torch.bool)
        mask[1, 3] = mask[2, 0] = False
        poisoned = x.clone()
        poisoned[1, 3, 2] = poisoned[2, 0, 0] = value
        results, modules = [], [layer(**options) for _ in range(2)]
        with fastvq.use_backend(backend):
            for module, rows, forward in ((modules[0], poisoned, {}), (modules[1], x, {"mask": mask})):
                for _ in range(3):
                    torch.manual_seed(1)
                    results.append(module(rows, **forward))
        assert_same_state(modules[0], state(modules[1]))
        for (quantized, indices, loss), (masked_quantized, masked_indices, masked_loss) in zip(
            results[:3], results[3:], strict=True
        ):
            assert torch.equal(quantized, masked_quantized)
            assert torch.equal(indices, masked_indices)
            assert torch.equal(loss, masked_loss)
            assert not quantized[~mask].any()
            assert torch.equal(indices == -1, ~mask)


@pytest.mark.parametrize("options", NON_FINITE, ids=str)
def test_a_batch_of_nothing_but_nan(options):
    module = layer(**options)
    module(torch.full((4, 10, DIM), torch.nan))
    assert all(bool(t.isfinite().all()) for t in state(module).values())
    assert bool(module._codebook.initted) == (not options.get("kmeans_init", False))
    _, indices, loss = train(module, 1)(batch())
    assert bool(loss.isfinite())
    assert bool((indices >= 0).all())


@pytest.mark.parametrize("options", NON_FINITE, ids=str)
def test_an_empty_batch(options):
    for shape in ((0, 10, DIM), (4, 0, DIM), (0, DIM)):
        module = layer(**options)
        quantized, indices, loss = module(torch.zeros(shape))
        assert (quantized.shape, indices.shape, loss.item()) == (shape, shape[:-1], 0)
        assert all(bool(t.isfinite().all()) for t in state(module).values())


def test_lens_is_a_mask():
    lens = torch.tensor([0, 3, 10, 7])
    mask = torch.arange(10) < lens[:, None]
    by_lens, by_mask = layer(), layer()
    for a, b in zip(by_lens(batch(), lens=lens), by_mask(batch(), mask=mask), strict=True):
        assert torch.equal(a, b)
    assert_same_state(by_lens, state(by_mask))


def test_masked_rows_with_channels_first():
    mask = torch.rand(4, 10, generator=generator()) < 0.5
    first, last = layer(channel_last=False), layer()
    quantized, indices, loss = last(batch(), mask=mask)
    transposed = first(batch().transpose(1, 2), mask=mask)
    for a, b in zip(transposed, (quantized.transpose(1, 2), indices, loss), strict=True):
        assert torch.equal(a, b)


def test_a_projection_leaves_masked_rows_zero():
    mask = torch.rand(4, 10, generator=generator()) < 0.5
    module = layer(codebook_dim=3).eval()
    quantized, indices, _ = module(batch(), mask=mask)
    assert not quantized[~mask].any()
    close(module.get_output_from_indices(indices), quantized)


def test_assigning_the_codebook_copies():
    module, codes = layer(learnable_codebook=True), torch.randn(SIZE, DIM)
    parameter = module._codebook.embed
    module.codebook = codes
    assert torch.equal(module.codebook, codes)
    assert module._codebook.embed is parameter
    codes.zero_()
    assert module.codebook.any()


def test_gradients_accumulate_over_micro_batches():
    """Without learning, the gradient of two halves is that of the whole."""
    whole, halves = layer(codebook_dim=3, freeze_codebook=True), layer(codebook_dim=3, freeze_codebook=True)
    x = batch(8, 10, DIM)
    quantized, _, loss = whole(x)
    (quantized.square().mean() + loss).backward()
    for half in x.chunk(2):
        quantized, _, loss = halves(half)
        ((quantized.square().mean() + loss) / 2).backward()
    assert whole.project_in.weight.grad.any()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        if a.grad is not None:
            close(a.grad, b.grad)


def test_checkpointing_without_reentry_gives_the_same_gradients():
    plain, checkpointed = layer(freeze_codebook=True, codebook_dim=3), layer(freeze_codebook=True, codebook_dim=3)
    x = batch()
    plain(x)[0].square().sum().backward()
    torch.utils.checkpoint.checkpoint(checkpointed, x, use_reentrant=False)[0].square().sum().backward()
    close(checkpointed.project_in.weight.grad, plain.project_in.weight.grad)


def test_backends_agree():
    """A whole training run, bit for bit in its codes."""
    runs = {}
    for backend in ("native", "torch", "reference"):
        with fastvq.use_backend(backend):
            module = layer(kmeans_init=True, threshold_ema_dead_code=1)
            runs[backend] = [module(batch(seed=seed))[1] for seed in range(4)]
    for backend in ("native", "torch"):
        for a, b in zip(runs[backend], runs["reference"], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: must be an integer of at least 1"),
        ({"codebook_size": 0}, ValueError, "codebook_size: must be an integer of at least 1"),
        ({"codebook_dim": 2.5}, ValueError, "codebook_dim: must be an integer"),
        ({"decay": 1.1}, ValueError, "decay: must lie in"),
        ({"eps": -1.0}, ValueError, "eps: must not be negative"),
        ({"commitment_weight": -1.0}, ValueError, "commitment_weight: must not be negative"),
        ({"kmeans_iters": -1}, ValueError, "kmeans_iters: must be an integer that isn't negative"),
        ({"threshold_ema_dead_code": -1}, ValueError, "threshold_ema_dead_code: must not be negative"),
        ({"learnable_codebook": True, "ema_update": True}, ValueError, "ema_update: must be False"),
        ({"codebook_weight": 1.0}, ValueError, "codebook_weight: learnable_codebook must be True"),
        ({"codebook_weight": -1.0, "learnable_codebook": True}, ValueError, "codebook_weight: must not be negative"),
        ({"heads": 0}, ValueError, "heads: must be an integer of at least 1"),
        ({"orthogonal_reg_weight": -1.0}, ValueError, "orthogonal_reg_weight: must not be negative"),
        ({"orthogonal_reg_max_codes": 0}, ValueError, "orthogonal_reg_max_codes: must be an integer of at least 1"),
        ({"sync_update_v": 1.5}, ValueError, "sync_update_v: must lie in"),
        ({"sync_update_v": 0.5}, ValueError, "learnable_codebook: must be True beside sync_update_v"),
        ({"codebook_diversity_temperature": 0}, ValueError, "codebook_diversity_temperature: must be positive"),
        ({"directional_reparam": True}, ValueError, "threshold_ema_dead_code: must be positive beside"),
        ({"straight_through": True, "rotation_trick": True}, ValueError, "straight_through, rotation_trick: only one"),
        ({"straight_through": True, "learnable_codebook": True}, ValueError, "straight_through: must be False"),
        ({"affine_param": True, "use_cosine_sim": True}, ValueError, "affine_param: must be False"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, ValueError, "learnable_codebook: must be True beside in_"),
        ({"accept_3d_fmap": True, "accept_image_fmap": True}, ValueError, "accept_image_fmap, accept_3d_fmap: only"),
        ({"unheard_of": 1}, TypeError, "unheard_of"),
    ],
)
def test_refuses_by_name(options, error, message):
    with pytest.raises(error, match=message):
        layer(**options)


@pytest.mark.parametrize(
    ("options", "x", "forward", "error", "message"),
    [
        ({}, batch(4, 10, 5), {}, ValueError, r"x: must have shape \(B, N, dim\) or \(B, dim\) or .* with dim=6"),
        ({"channel_last": False}, batch(2, DIM, 4, 10), {}, ValueError, "x: must have shape"),
        ({"channel_last": False}, batch(), {}, ValueError, r"x: must have shape \(B, dim, N\)"),
        ({"accept_image_fmap": True}, batch(), {}, ValueError, r"x: must have shape \(B, dim, H, W\)"),
        ({}, batch().long(), {}, TypeError, "x: must be floating point"),
        ({}, batch(), {"mask": torch.ones(4, 10)}, TypeError, "mask: must be bool"),
        ({}, batch(), {"mask": torch.ones(4, 9, dtype=torch.bool)}, ValueError, "mask: must have shape"),
        ({}, batch(), {"lens": torch.ones(3, dtype=torch.int64)}, ValueError, "lens: must have shape"),
        ({}, batch(), {"lens": torch.ones(4), "mask": torch.ones(4, 10)}, ValueError, "mask, lens: only one"),
        ({}, batch(4, DIM), {"lens": torch.ones(4)}, ValueError, "lens: is for sequences"),
        ({}, batch(), {"topk": 0}, ValueError, "topk: must be at least 1"),
        ({"heads": 2, "codebook_dim": 3}, batch(), {"topk": 2}, ValueError, "topk: is for one head, not 2"),
        ({}, batch(), {"ema_update_weight": torch.ones(3)}, ValueError, "ema_update_weight: must have shape"),
    ],
)
def test_forward_refuses_by_name(options, x, forward, error, message):
    with pytest.raises(error, match=message):
        layer(**options)(x, **forward)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (8, 1), (), (1, 8, 4), (8, 5)])
def test_a_codebook_of_another_shape_is_refused(shape):
    layer = fastvq.VectorQuantize(4, 8)
    with pytest.raises(ValueError, match=r"codebook: must have shape \(K, D\) = \(8, 4\)"):
        layer.codebook = torch.zeros(shape)
