"""Groups of residual quantizers: each is its own, on its part of the channels."""

from __future__ import annotations

import pytest
import torch
import vector_quantize_pytorch

import fastvq

from ..cases import close, flags_as_numbers, generator


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def pair(**settings):
    options = {"dim": 12, "groups": 3, "num_quantizers": 4, "codebook_size": 16, **settings}
    torch.manual_seed(0)
    theirs = vector_quantize_pytorch.GroupedResidualVQ(**options)
    ours = fastvq.GroupedResidualVQ(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("settings", [{}, {"codebook_dim": 2}, {"quantize_dropout": True}], ids=str)
def test_training_equals_the_peer(settings):
    ours, theirs = pair(**settings)
    for seed in range(3):
        x = vectors(2, 30, 12, seed=seed).requires_grad_()
        y = x.detach().clone().requires_grad_()
        torch.manual_seed(seed)
        results = ours(x, return_all_codes=True)
        torch.manual_seed(seed)
        expected = theirs(y, return_all_codes=True)
        assert torch.equal(results[1], expected[1])
        close(results[0].detach(), expected[0].detach())
        close(results[2].detach(), expected[2].detach())
        close(results[3], expected[3])
        (results[0].square().sum() + results[2].sum()).backward()
        (expected[0].square().sum() + expected[2].sum()).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for name, value in flags_as_numbers(theirs.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [False, True])
def test_decoding(images):
    ours = fastvq.GroupedResidualVQ(dim=12, groups=3, num_quantizers=4, codebook_size=16, accept_image_fmap=images)
    x = vectors(2, 12, 5, 4) if images else vectors(2, 30, 12)
    quantized, indices, _ = ours.eval()(x)
    assert indices.shape == (3, 2, *((5, 4) if images else (30,)), 4)
    close(ours.get_output_from_indices(indices), quantized)
    assert torch.equal(ours.encode(x), indices)
    assert ours.codebooks.shape == (3, 4, 16, 4)
    assert ours.get_codes_from_indices(indices).shape[:3] == (3, 4, 2)


def test_masks_reach_every_group():
    ours, mask = pair()[0], torch.rand(2, 30, generator=generator()) < 0.5
    quantized, indices, _ = ours(vectors(2, 30, 12), mask=mask)
    assert (indices[:, ~mask] == -1).all()
    assert not quantized[~mask].any()
    assert quantized[mask].any(-1).all()


def test_refuses_by_name():
    with pytest.raises(ValueError, match="groups: must divide dim=12, got 5"):
        fastvq.GroupedResidualVQ(dim=12, groups=5, num_quantizers=4, codebook_size=16)
    with pytest.raises(ValueError, match="x: must have dim=12 as its last size"):
        pair()[0](vectors(2, 12, 13))


def test_health_of_every_group_and_stage():
    ours = pair()[0]
    ours(vectors(2, 30, 12))
    assert ours.code_counts.shape == (3, 4, 16)
    assert ours.usage().shape == (3, 4)
    assert (ours.code_counts.sum(-1) == 60).all()
    ours.reset_health()
    assert not ours.code_counts.any()


def test_lens_and_updates_kept_for_a_commit():
    layer = fastvq.GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=10)
    x = torch.randn(2, 5, 8)
    before = layer.codebooks.clone()
    indices = layer(x, lens=torch.tensor([3, 5]), accum_ema_update=True)[1]
    assert (indices[:, 0, 3:] == -1).all()
    assert torch.equal(layer.codebooks, before)
    layer.commit_ema_update()
    assert all(
        (now != then).any() for now, then in zip(layer.codebooks.flatten(0, 1), before.flatten(0, 1), strict=True)
    )
