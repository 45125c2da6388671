"""Priors over several grids: what a place sees, sampling that agrees with the likelihood, and files."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastvq.coding import decode, encode
from fastvq.models import HierarchicalPrior, NextScalePrior

from ..cases import close, generator
from .test_priors import fit, sampled

SCALES = {"2d": [(1, 1), (2, 2), (3, 4)], "1d": [(2,), (5,)], "stages": [(1, 2, 2), (2, 2, 2)], "one": [(2, 3)]}
every_kind = pytest.mark.parametrize("kind", [HierarchicalPrior, NextScalePrior])
every_shape = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)


def make(kind, scales=SCALES["2d"], size=5, **options):
    """Return a prior that is not uniform."""
    places = sum(map(math.prod, scales))
    prior = kind(size, (places,), scales=scales, dim=16, depth=2, heads=2, **options).eval()
    for head in prior.heads:
        torch.nn.init.normal_(head.weight, generator=generator())
    for module in prior.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, generator=generator(1))
    return prior


def indices_for(prior, count=4):
    return torch.randint(0, prior.codebook_size, (count, prior.places), generator=generator(2))


@every_kind
@every_shape
def test_a_place_sees_the_grids_above_and_in_raster_order_its_own(kind, scales):
    prior = make(kind, scales)
    indices = indices_for(prior)
    logits = prior(indices)
    assert logits.shape == (4, prior.places, 5)
    for place in range(prior.places):
        other = indices.clone()
        other[:, place] = (other[:, place] + 1) % 5
        changed = ((prior(other) - logits).abs().amax((0, 2)) > 1e-6).tolist()
        seen_from = place + 1 if kind is HierarchicalPrior else prior.spans[prior.scale_of(place)].stop
        assert not any(changed[:seen_from])
        if kind is NextScalePrior or prior.scale_of(place) == len(scales) - 1:
            assert all(changed[seen_from:])
    if kind is HierarchicalPrior and len(scales) > 1:
        # A place of the finest grid sees all of a code above, which lies after it in raster order.
        other = indices.clone()
        last_above = prior.spans[-2].stop - 1
        other[:, last_above] = (other[:, last_above] + 1) % 5
        assert bool(((prior(other) - logits)[:, -1].abs().amax(1) > 1e-6).all())


@every_kind
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@every_shape
def test_sampling_has_the_logits_of_the_full_forward(kind, scales, guidance, monkeypatch):
    prior = make(kind, scales, classes=3)
    labels, indices, seen = sampled(prior, guidance, monkeypatch)
    full = guidance * prior(indices, labels) + (1 - guidance) * prior(indices)
    torch.testing.assert_close(torch.cat(seen), full.transpose(0, 1).flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert len(seen) == (prior.places if kind is HierarchicalPrior else len(scales))


@every_kind
def test_probabilities_of_all_grids_add_up_to_one(kind):
    prior = make(kind, [(1,), (3,)], size=3)
    everything = torch.tensor(list(itertools.product(range(3), repeat=4)))
    assert (-prior.bits(everything) * math.log(2)).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@every_kind
def test_files_are_coded_under_the_prior(kind):
    prior = make(kind)
    indices = indices_for(prior)
    data = encode(indices, 5, model="prior", prior=prior)
    assert torch.equal(decode(data, prior=prior), indices)
    ideal = prior.bits(indices).sum().item() / 8
    assert abs(len(data) - ideal) < 60  # the header, and what fixed point costs


@every_kind
def test_given_indices_condition_the_grids_below(kind):
    prior = make(kind)
    given = indices_for(prior)
    given[:, 5:] = -1
    completed = prior.sample(4, given=given, generator=generator())
    assert torch.equal(completed[:, :5], given[:, :5])
    assert completed.min() >= 0


@every_kind
def test_learns_details_from_the_grid_above_and_labels(kind):
    coarse = torch.tensor(list(itertools.product(range(3), repeat=2)))
    fine = coarse.repeat_interleave(2, 1)
    indices = torch.cat([coarse, (fine + 1) % 3], 1)
    labels = coarse[:, 0].contiguous()
    options = {"dim": 32, "depth": 1, "heads": 2, "classes": 3, "dropout": 0.0}
    prior = fit(kind(3, (6,), scales=[(2,), (4,)], **options), indices, labels, steps=60)
    assert prior.bits(indices, labels).mean() < 2  # the second code takes 1.58 bits, and the others none
    drawn = prior.sample(30, torch.arange(30) % 3, generator=generator())
    assert (drawn[:, 0] == torch.arange(30) % 3).float().mean() > 0.9
    assert (drawn[:, 2:] == (drawn[:, :2].repeat_interleave(2, 1) + 1) % 3).float().mean() > 0.9


@every_kind
def test_similar_codes_start_alike_and_an_untrained_prior_is_uniform(kind):
    scales = [(1, 2), (2, 2)]
    prior = kind(8, (6,), scales=scales, dim=16, depth=1, heads=2).eval()
    close(prior.bits(torch.zeros(2, 6, dtype=torch.int64)), torch.full((2,), 18.0, dtype=torch.float64))
    vectors = [torch.randn(4, 6, generator=generator(n)).repeat(2, 1) for n in range(2)]
    prior = kind(8, (6,), scales=scales, dim=16, depth=1, heads=2, vectors=vectors).eval()
    indices = torch.randint(0, 4, (3, 6), generator=generator())
    logits = prior(indices)
    close(logits[..., :4], logits[..., 4:])
    close(prior(indices + 4), logits)
    assert logits[:, 0].std() != logits[:, 2].std()
    with pytest.raises(ValueError, match="vectors: must be 2 codebooks, one for each scale, got 1"):
        kind(8, (6,), scales=scales, vectors=vectors[:1])


@every_kind
def test_every_parameter_learns(kind):
    prior = make(kind, classes=2).train()
    prior.loss(indices_for(prior), torch.tensor([0, 1, 0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": []}, "scales: must be grids with positive sides and the same number of axes, got "),
        (
            {"scales": [(1,), (2, 2)]},
            "scales: must be grids with positive sides and the same number of axes, got 1, 2x2",
        ),
        ({"scales": [(4, 1), (2, 2)]}, "scales: must not shrink from one to the next, got 4x1, 2x2"),
        ({"grid": (9,)}, r"grid: must be the number of indices of the scales 1x1, 2x2, got \(9,\)"),
        ({"codebook_size": (4, 4), "grid": (5, 2)}, "grid: must be the number of indices of the scales 1x1, 2x2"),
        ({"heads": 3}, "heads: must divide dim=128, got 3"),
        ({"dropout": 1.0}, r"dropout: must lie in \[0, 1\), got 1.0"),
    ],
)
@every_kind
def test_refuses_by_name(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"codebook_size": 8, "grid": (5,), "scales": [(1, 1), (2, 2)]} | options)
