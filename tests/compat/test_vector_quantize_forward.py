"""Arguments of `VectorQuantize.forward` and its other methods, beside vector_quantize_pytorch's."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close, generator
from .test_vector_quantize_options import (
    DIM,
    HEADS,
    SGD,
    SIZE,
    assert_equal_state,
    assert_equal_steps,
    batch,
    linear_bridge,
    pair,
    vqp,
)

MASK = torch.rand(3, 15, generator=generator(7)) < 0.6


@pytest.mark.parametrize(
    "options", [{}, {"use_cosine_sim": True}, {"commitment_weight": 0.3}, {"rotation_trick": False}]
)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_topk(options, mask, k):
    ours, theirs = pair(**options)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    if mask is None:
        assert_equal_steps(ours, theirs, batch(), topk=k)
    for module in (ours, theirs):
        module.eval()
    mine, other = (module(batch(), topk=k, mask=mask) for module in (ours, theirs))
    assert torch.equal(mine[1], other[1])
    assert mine[1].shape == (3, 15, min(k, SIZE))
    close(mine[0], other[0])
    close(mine[2], other[2])
    for name, t in ours.state_dict().items():
        assert torch.equal(t, before[name])
    if mask is not None:
        assert (mine[1][~mask] == -1).all()
        assert not mine[0][~mask].any()


@pytest.mark.parametrize("layout", [{"accept_image_fmap": True}, {"channel_last": False}, {"accept_3d_fmap": True}])
def test_topk_layouts(layout):
    shape = {"accept_image_fmap": (2, DIM, 3, 4), "channel_last": (2, DIM, 5), "accept_3d_fmap": (2, DIM, 2, 3, 2)}
    ours, theirs = (module.eval() for module in pair(**layout))
    x = batch(*shape[next(iter(layout))])
    for a, b in zip(ours(x, topk=2), theirs(x, topk=2), strict=True):
        close(a, b)


def test_topk_of_single_vectors():
    ours, theirs = (module.eval() for module in pair())
    for a, b in zip(ours(batch(4, DIM), topk=2), theirs(batch(4, DIM), topk=2), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    "forward",
    [
        {"ema_update": False},
        {"ema_update_weight": torch.linspace(0, 1, SIZE)},
        {"ema_update_weight": torch.rand(1, SIZE, generator=generator())},
        {"ema_update_weight": lambda sums, counts: (counts > 1).float()},
        {"freeze_codebook": True},
        {"lens": torch.tensor([4, 15, 9])},
    ],
    ids=["no update", "weights", "weights by head", "weight of counts", "frozen", "lens"],
)
def test_learning_of_one_call(forward):
    ours, theirs = pair()
    for seed in range(3):
        assert_equal_steps(ours, theirs, batch(seed=seed), **(forward if seed == 1 else {}))


def test_statistics_kept_for_a_later_step():
    ours, theirs = pair()
    for seed in range(6):
        assert_equal_steps(ours, theirs, batch(seed=seed), accum_ema_update=seed % 3 < 2)


def test_manual_update():
    ours, theirs = pair(manual_ema_update=True)
    for seed in range(2):
        assert_equal_steps(ours, theirs, batch(seed=seed))
    ours._codebook.update_ema()
    theirs._codebook.update_ema()
    assert_equal_state(ours, theirs)


@pytest.mark.parametrize("options", [{}, HEADS["heads"], HEADS["separate projected heads"], {"use_cosine_sim": True}])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_update_indices(options, mask):
    if mask is not None and options.get("heads", 1) > 1:
        pytest.skip("theirs can't repeat a mask for heads here")
    ours, theirs = pair(**options)
    indices = ours(batch(), mask=mask, ema_update=False)[1]
    theirs(batch(), mask=mask, ema_update=False)
    for module in (ours, theirs):
        module.update_ema_indices(batch(), indices, mask=mask)
    assert_equal_state(ours, theirs)


def test_update_indices_equals_the_forward_pass():
    for options, shape in (
        ({"accept_image_fmap": True, **HEADS["heads"]}, (2, DIM, 3, 5)),
        ({"channel_last": False}, (3, DIM, 15)),
        ({}, (9, DIM)),
    ):
        ours, other = pair(**options)[0], fastvq.VectorQuantize(DIM, SIZE, **options)
        other.load_state_dict(ours.state_dict())
        indices = ours(batch(*shape))[1]
        other.update_indices(batch(*shape), indices)
        assert_equal_state(other, ours)


@pytest.mark.parametrize("heads", HEADS)
def test_masks_with_heads(heads):
    """vector_quantize_pytorch compares with the unsplit input, and fails; packing the rows is the same."""
    ours = pair(**HEADS[heads])[0]
    packed = pair(**HEADS[heads])[0]
    quantized, indices, loss = ours(batch(), mask=MASK)
    expected, expected_indices, expected_loss = packed(batch()[MASK][None])
    assert torch.equal(indices[MASK], expected_indices[0])
    close(quantized[MASK].detach(), expected[0].detach())
    close(loss, expected_loss)
    assert (indices[~MASK] == -1).all()
    assert not quantized[~MASK].any()
    assert_equal_state(ours, packed)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"channel_last": False}], ids=str)
def test_padding_may_come_back_as_it_was(options):
    ours, theirs = (module.eval() for module in pair(**options, return_zeros_for_masked_padding=False))
    x = batch(3, DIM, 15) if "channel_last" in options else batch()
    mine, other = ours(x, mask=MASK), theirs(x, mask=MASK)
    close(mine[0], other[0])
    assert torch.equal(mine[1], other[1])
    if "channel_last" not in options:
        assert torch.equal(mine[0][~MASK], x[~MASK])


@pytest.mark.parametrize("training", [True, False])
def test_codes_that_depend_on_the_vector(training):
    weight = torch.randn(DIM, DIM, generator=generator(3)) / 3

    def transform(codes):
        shift = (batch() @ weight)[None, :, :, None]
        return codes[:, None, None] * 1.5 + shift

    ours, theirs = (module.train(training) for module in pair(rotation_trick=False))
    if training:
        assert_equal_steps(ours, theirs, batch(), codebook_transform_fn=transform)
    else:
        for a, b in zip(
            ours(batch(), codebook_transform_fn=transform),
            theirs(batch(), codebook_transform_fn=transform),
            strict=True,
        ):
            close(a, b)


def test_bridge():
    options = {"vq_bridge": linear_bridge()}
    torch.manual_seed(0)
    theirs = vqp.VectorQuantize(DIM, SIZE, vq_bridge=linear_bridge())
    ours = fastvq.VectorQuantize(DIM, SIZE, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for seed in range(3):
        assert_equal_steps(ours, theirs, batch(seed=seed))
    assert ours._codebook.vq_bridge[0].weight.grad.any()
    ours.eval()
    quantized, indices, _ = ours(batch())
    close(ours.get_output_from_indices(indices), quantized)


def test_the_in_place_optimizer_steps_by_hand():
    options = {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": SGD,
        "manual_in_place_optimizer_update": True,
    }
    ours, theirs = pair(**options)
    assert isinstance(ours.in_place_codebook_optimizer, torch.optim.SGD)
    x = batch()
    for module in (ours, theirs):
        module(x), module(batch(seed=1))
        module.update_in_place_optimizer()
    close(ours.codebook.detach(), theirs.codebook.detach())
    assert ours._codebook.embed.grad is None


def test_expire_codes():
    ours = pair(threshold_ema_dead_code=50, **HEADS["separate projected heads"])[0]
    x = ours.project_in(batch()).detach()
    ours.expire_codes_(x)
    rows = ours._heads.split(x)
    for codes, vectors in zip(ours.codebook, rows, strict=True):
        assert (codes[:, None] == vectors).all(-1).any(1).all()


def test_synchronous_updates_reach_the_codes():
    """In vector_quantize_pytorch they reach the vectors a second time instead."""
    grads = []
    for v in (0.0, 0.5, 1.0):
        ours = pair(learnable_codebook=True, ema_update=False, rotation_trick=False, sync_update_v=v)[0]
        x = batch().requires_grad_()
        quantized, indices, _ = ours(x, topk=None)
        upstream = torch.randn(quantized.shape, generator=generator(5))
        (quantized * upstream).sum().backward()
        close(x.grad, upstream)
        grads.append(ours._codebook.embed.grad)
    assert not grads[0].any()
    sums = torch.zeros(SIZE, DIM).index_add_(0, indices.flatten(), upstream.flatten(0, 1))
    close(grads[1][0], 0.5 * sums)
    close(grads[2][0], sums)


def test_the_codebook_of_separate_heads_is_set():
    ours = pair(**HEADS["separate heads"])[0]
    codes = torch.randn(2, SIZE, 4, generator=generator())
    ours.codebook = codes
    assert torch.equal(ours.codebook, codes)
    with pytest.raises(ValueError, match=r"codebook: must have shape \(H, K, D\) = \(2, 20, 4\)"):
        ours.codebook = codes[0]
