"""HierarchicalVQ compared with vector_quantize_pytorch's, and its additional features."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator
from ..peers import assert_compiles, assert_same_step, assert_travels, pair

DIM = 5
# Without k-means and replacement, whose random choices are others than the peer's.
STILL = {"dim": DIM, "codebook_size": 16, "kmeans_init": False, "threshold_ema_dead_code": 0}
IMAGES = STILL | {"scales": (1, 2, 4), "accept_image_fmap": True}


def batch(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def hierarchical_vq(**options):
    torch.manual_seed(0)
    return fastvq.HierarchicalVQ(**(IMAGES | options))


OPTIONS = {
    "images": (IMAGES, (2, DIM, 8, 8)),
    "images of odd sizes": (IMAGES | {"scales": ((1, 1), (2, 3), (3, 3))}, (2, DIM, 7, 5)),
    "sequences": (STILL | {"scales": (1, 3, 8)}, (2, DIM, 8)),
    "sequences, channels last": (STILL | {"scales": (1, 3, 8), "channel_first": False}, (2, 8, DIM)),
    "images, channels last": (IMAGES | {"channel_first": False}, (2, 4, 4, DIM)),
    "video": (STILL | {"scales": (1, (1, 2, 2), 3), "accept_3d_fmap": True}, (2, DIM, 3, 4, 4)),
    "own codebooks": (IMAGES | {"shared_codebook": False, "codebook_size": (4, 8, 16)}, (2, DIM, 4, 4)),
    "own phis": (IMAGES | {"share_quant_resi": 0}, (2, DIM, 4, 4)),
    "two phis": (IMAGES | {"share_quant_resi": 2}, (2, DIM, 4, 4)),
    "no phi": (IMAGES | {"quant_resi": 0.0}, (2, DIM, 4, 4)),
    "rotation": (IMAGES | {"rotation_trick": True}, (2, DIM, 4, 4)),
    "weight and decay": (IMAGES | {"commitment_weight": 0.25, "decay": 0.5}, (2, DIM, 4, 4)),
    "nested dropout": (IMAGES | {"nested_dropout": 0.7}, (2, DIM, 4, 4)),
    "nested dropout from the second": (
        IMAGES | {"nested_dropout": 1.0, "nested_dropout_min_levels": 2},
        (2, DIM, 4, 4),
    ),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_steps(kind, training):
    options, shape = OPTIONS[kind]
    ours, theirs = (module.train(training) for module in pair("HierarchicalVQ", **options))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05) for module in (ours, theirs)]
    for seed in range(2):
        theirs.load_state_dict(ours.state_dict())
        *_, indices, _, cutoff = plain(ours, theirs, batch(*shape, seed=seed), seed)
        decoded = [module.get_output_from_indices(indices).detach() for module in (ours, theirs)]
        close(*decoded)
        full = ours.get_output_from_indices(indices, shape[2:] if ours.channel_first else shape[1:-1])
        assert full.shape == shape
        if not training:
            assert cutoff is None
            close(full.detach(), ours(batch(*shape, seed=seed))[0].detach())
        for optimizer in optimizers:
            optimizer.step()


def plain(ours, theirs, x, seed):
    """Take a step of both layers after checking that nested dropout cuts at the same scale."""
    cutoffs = []
    for module in (ours, theirs):
        state = {name: value.clone() for name, value in module.state_dict().items()}
        torch.manual_seed(seed)
        cutoffs.append(module(x, return_cutoff=True)[-1])
        module.load_state_dict(state)
    assert cutoffs[0] == cutoffs[1]
    return *assert_same_step(ours, theirs, x, seed=seed), cutoffs[0]


@pytest.mark.parametrize("kind", ["images", "sequences", "video", "images, channels last"])
@pytest.mark.parametrize("training", [True, False])
def test_masks(kind, training):
    options, shape = OPTIONS[kind]
    ours, theirs = (module.train(training) for module in pair("HierarchicalVQ", **options))
    spatial = shape[2:] if ours.channel_first else shape[1:-1]
    mask = torch.rand(2, *spatial, generator=generator(3)) < 0.7
    mask[1, : spatial[0] // 2] = False
    total, indices, _ = assert_same_step(ours, theirs, batch(*shape), mask=mask)
    assert any((level == -1).any() for level in indices)
    absent = ~mask.unsqueeze(1).expand(shape) if ours.channel_first else ~mask.unsqueeze(-1).expand(shape)
    assert not total[absent].any()


def test_lengths():
    ours, theirs = pair("HierarchicalVQ", **OPTIONS["sequences"][0])
    assert_same_step(ours, theirs, batch(2, DIM, 8), lens=torch.tensor([3, 8]))


def test_a_non_finite_position_is_masked():
    ours, masked = hierarchical_vq(), hierarchical_vq()
    x = batch(2, DIM, 8, 8)
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[0, 3, 4] = mask[1, 0, 0] = False
    good = x.clone().requires_grad_()
    x[0, 2, 3, 4], x[1, 0, 0, 0] = torch.nan, torch.inf
    poisoned = x.requires_grad_()
    results = []
    for module, leaf, given in ((ours, poisoned, None), (masked, good, mask)):
        total, indices, loss = module(leaf, mask=given)
        (total.square().sum() + loss).backward()
        results.append((total, *indices, loss, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_orthogonality():
    options = IMAGES | {"orthogonal_reg_weight": 0.5, "shared_codebook": False}
    ours, theirs = pair("HierarchicalVQ", **options)
    assert_same_step(ours, theirs, batch(2, DIM, 4, 4))


def test_sampled_codes():
    """Codes are sampled by temperature in training; in eval mode the nearest is taken."""
    ours = hierarchical_vq(stochastic_sample_codes=True, sample_codebook_temp=1e-4)
    x = batch(2, DIM, 8, 8)
    cold = ours(x)[1][2]
    warm = ours(x, sample_codebook_temp=1e4)[1][2]
    ours.eval()
    nearest = ours(x)[1][2]
    assert (warm != cold).float().mean() > 0.5
    assert (cold == nearest).float().mean() > 0.5
    assert torch.equal(ours(x, sample_codebook_temp=1e4)[1][2], nearest)


def test_kmeans_and_replacement():
    ours = hierarchical_vq(kmeans_init=True, threshold_ema_dead_code=2)
    for seed in range(5):
        total, indices, loss = ours(batch(4, DIM, 8, 8, seed=seed))
    assert [tuple(level.shape) for level in indices] == [(4, 1, 1), (4, 2, 2), (4, 4, 4)]
    assert all(((level >= 0) & (level < 16)).all() for level in indices)
    assert loss.isfinite()
    assert total.isfinite().all()


def test_a_finer_scale_improves():
    ours = hierarchical_vq(kmeans_init=True, scales=(1, 2, 4, 8), quant_resi=0.0, codebook_size=64)
    x = batch(8, DIM, 8, 8).cumsum(-1).cumsum(-2) / 8
    for _ in range(20):
        ours(x)
    ours.eval()
    _, indices, _ = ours(x)
    errors = []
    for kept in range(1, 5):
        chosen = [level if i < kept else torch.full_like(level, -1) for i, level in enumerate(indices)]
        errors.append(float((ours.get_output_from_indices(chosen) - x).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_half():
    ours = hierarchical_vq().eval()
    x = batch(2, DIM, 8, 8)
    exact, exact_indices, _ = ours(x.bfloat16().float())
    total, indices, _ = ours(x.bfloat16())
    assert total.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(indices, exact_indices, strict=True))
    close(total, exact.bfloat16())
    ours.bfloat16()
    assert ours(x.bfloat16())[0].dtype == torch.bfloat16
    assert ours.vq.codebook.dtype == torch.float32


@pytest.mark.parametrize("shared", [True, False])
def test_health(shared):
    ours = hierarchical_vq(shared_codebook=shared)
    indices = ours(batch(2, DIM, 8, 8))[1]
    counts = torch.stack([level.flatten().bincount(minlength=16) for level in indices])
    assert torch.equal(ours.code_counts, counts.sum(0) if shared else counts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hierarchical_vq(accept_3d_fmap=True), "accept_image_fmap, accept_3d_fmap: only one"),
        (lambda: hierarchical_vq(nested_dropout=2.0), "nested_dropout: must lie"),
        (lambda: hierarchical_vq(nested_dropout_min_levels=0), "nested_dropout_min_levels: must be"),
        (lambda: hierarchical_vq(scales=(2, 1)), "scales: must not shrink"),
        (lambda: hierarchical_vq(scales=()), "scales: must be at least one"),
        (lambda: hierarchical_vq(scales=(0, 1)), "scales: must be an integer of at least 1"),
        (lambda: hierarchical_vq(scales=((1, 2, 3),)), "scales: must have 2 sizes"),
        (lambda: hierarchical_vq(codebook_size=(4, 8, 16)), "codebook_size: must be one number, got"),
        (lambda: hierarchical_vq(codebook_size=(4, 8), shared_codebook=False), "codebook_size: must be one number, or"),
        (lambda: hierarchical_vq()(torch.zeros(2, DIM, 8)), "x: must have shape"),
        (lambda: hierarchical_vq()(torch.zeros(2, DIM, 8, 8), indices=()), "indices: must be None"),
        (lambda: hierarchical_vq()(torch.zeros(2, DIM, 8, 8), lens=torch.ones(2)), "lens: is for sequences"),
        (lambda: hierarchical_vq().get_output_from_indices([torch.zeros(2, 1, 1).long()]), "indices: must have shapes"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_compiled_training_step():
    """With nested dropout the graph contains all scales and has as many active as eager mode."""
    ours = hierarchical_vq(nested_dropout=1.0, shared_codebook=False, scales=(1, 2))
    assert_compiles(ours, batch(2, DIM, 4, 4))


def test_travels():
    assert_travels(hierarchical_vq(), batch(2, DIM, 8, 8))


@pytest.mark.parametrize("shared", [True, False])
def test_updates_held_for_a_commit(shared):
    layer = fastvq.HierarchicalVQ(dim=8, codebook_size=10, scales=(1, 2, 4), shared_codebook=shared, kmeans_init=False)
    before = [layer.get_vq(level).codebook.clone() for level in range(3)]
    layer(torch.randn(2, 8, 4), accum_ema_update=True)
    assert all(torch.equal(layer.get_vq(level).codebook, before[level]) for level in range(3))
    layer.commit_ema_update()
    assert all(not torch.equal(layer.get_vq(level).codebook, before[level]) for level in range(3))


@torch.no_grad()
def test_cubic_interpolation_is_that_of_var():
    torch.manual_seed(0)
    layer = fastvq.HierarchicalVQ(
        dim=6, codebook_size=12, scales=(1, 2, 4), quant_resi=0, accept_image_fmap=True, interpolation="cubic"
    ).eval()
    layer.vq.codebook = torch.randn(12, 6)
    x = torch.randn(2, 6, 4, 4)
    quantized, indices, _ = layer(x)
    rest, total = x.clone(), torch.zeros_like(x)
    for found, size in zip(indices, (1, 2, 4), strict=True):
        rows = torch.nn.functional.interpolate(rest, size=(size, size), mode="area").permute(0, 2, 3, 1)
        assert torch.equal(found, torch.cdist(rows.flatten(0, 2), layer.vq.codebook).argmin(1).view(2, size, size))
        codes = layer.vq.codebook[found].permute(0, 3, 1, 2)
        codes = codes if size == 4 else torch.nn.functional.interpolate(codes, size=(4, 4), mode="bicubic")
        rest, total = rest - codes, total + codes
    torch.testing.assert_close(quantized, total)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    with pytest.raises(ValueError, match="interpolation: must be 'linear' without accept_image_fmap=True"):
        fastvq.HierarchicalVQ(dim=6, codebook_size=12, scales=(1, 4), interpolation="cubic")
    with pytest.raises(ValueError, match="interpolation: must be 'linear' or 'cubic', got 'area'"):
        fastvq.HierarchicalVQ(dim=6, codebook_size=12, scales=(1, 4), interpolation="area")


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_scales_are_fitted_to_a_data_set(shared):
    torch.manual_seed(0)
    layer = fastvq.HierarchicalVQ(dim=4, codebook_size=8, scales=(1, 4, 8), shared_codebook=shared, quant_resi=0)
    batches = [torch.randn(n, 4, 8) + torch.randn(n, 4, 1) for n in (6, 1, 9)]
    fitted = layer.fit(batches, iterations=5)
    assert [one.rows for one in fitted] == ([16 * 13] if shared else [16, 16 * 4, 16 * 8])
    assert all(one.errors[-1] < one.errors[0] for one in fitted)
    layer.eval()
    x = torch.cat(batches)
    assert (layer(x)[0] - x).square().mean() < 0.5 * x.square().mean()
