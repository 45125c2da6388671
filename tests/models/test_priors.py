"""Priors over indices: exact likelihoods, cached sampling that agrees with them, and learning."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvq.coding import encode
from fastvq.models import DepthPrior, LSTMPrior, PixelCNNPrior, TransformerPrior
from fastvq.models.priors.draw import draw

from ..cases import close, generator

GRIDS = [(5,), (3, 4), (4, 1), (1, 3), (2, 3, 2), (3, 1, 2)]


SIZES = {
    TransformerPrior: {"dim": 16, "depth": 2, "heads": 2},
    PixelCNNPrior: {"dim": 12, "depth": 4},
    LSTMPrior: {"dim": 16, "depth": 2},
}
every_kind = pytest.mark.parametrize("kind", SIZES)
DEPTH = {"dim": 16, "depth": 2, "heads": 2, "stage_dim": 8, "stage_depth": 2}


def make(kind=TransformerPrior, size=7, grid=(3, 4), **options):
    """Return a prior that is not uniform: its head is random instead of zero."""
    prior = kind(size, grid, **SIZES[kind] | options).eval()
    torch.nn.init.normal_(prior.head.weight, generator=generator())
    for module in prior.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, generator=generator(1))
    return prior


def indices_for(prior, count=6):
    return torch.randint(0, prior.codebook_size, (count, *prior.grid), generator=generator(2))


def fit(prior, indices, labels=None, steps=150):
    optimizer = torch.optim.Adam(prior.train().parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        prior.loss(indices, labels).backward()
        optimizer.step()
    return prior.eval()


@every_kind
@pytest.mark.parametrize("grid", GRIDS)
def test_a_place_sees_what_comes_before_it_alone(kind, grid):
    prior = make(kind, grid=grid)
    indices = indices_for(prior)
    logits = prior(indices)
    assert logits.shape == (6, math.prod(grid), 7)
    for place in range(prior.places):
        other = indices.clone()
        other.view(6, -1)[:, place] = (other.view(6, -1)[:, place] + 1) % 7
        changed = (prior(other) - logits).abs().amax((0, 2)) > 1e-6
        assert not changed[: place + 1].any()
        assert changed[place + 1 :].all()


@every_kind
@pytest.mark.parametrize("labels", [None, torch.tensor([1])])
def test_probabilities_of_all_grids_add_up_to_one(kind, labels):
    prior = make(kind, size=3, grid=(2, 2), classes=2)
    everything = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)
    labels = None if labels is None else labels.expand(len(everything))
    bits = prior.bits(everything, labels)
    assert bits.dtype == torch.float64
    assert (-bits * math.log(2)).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    close(prior.loss(everything, labels), (bits.mean() * math.log(2) / 4).float())


@every_kind
def test_an_untrained_prior_is_uniform(kind):
    prior = kind(512, (7, 7)).eval()
    bits = prior.bits(torch.zeros(2, 7, 7, dtype=torch.int64))
    close(bits, torch.full((2,), 49 * 9.0, dtype=torch.float64))


@every_kind
def test_similar_codes_start_alike_if_their_vectors_are_given(kind):
    vectors = torch.randn(4, 6, generator=generator()).repeat(2, 1)
    prior = kind(8, (2, 3), **SIZES[kind], vectors=vectors).eval()
    logits = prior(torch.randint(0, 8, (3, 2, 3), generator=generator()))
    close(logits[..., :4], logits[..., 4:])
    indices = torch.randint(0, 4, (3, 2, 3), generator=generator())
    close(prior(indices), prior(indices + 4))
    assert logits.std(-1).min() > 0
    with pytest.raises(ValueError, match=r"vectors: must have shape \(9, D\), got \(8, 6\)"):
        kind(9, (3,), vectors=vectors)


def sampled(prior, guidance, monkeypatch):
    """Return labels, two samples of them, and the logits that each index was drawn from."""
    labels = torch.tensor([0, 2])
    seen = []
    monkeypatch.setattr(
        "fastvq.models.priors.base.draw", lambda logits, *rest: (seen.append(logits), draw(logits, *rest))[1]
    )
    indices = prior.sample(2, labels, guidance=guidance, generator=generator())
    assert indices.shape == (2, *prior.grid)
    return labels, indices, seen


@every_kind
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("grid", GRIDS)
def test_cached_sampling_has_the_logits_of_the_full_forward(kind, grid, guidance, monkeypatch):
    prior = make(kind, grid=grid, classes=3)
    labels, indices, seen = sampled(prior, guidance, monkeypatch)
    full = guidance * prior(indices, labels) + (1 - guidance) * prior(indices)
    torch.testing.assert_close(torch.stack(seen, 1), full, rtol=1e-4, atol=1e-4)


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@every_kind
def test_sampling_twice_as_many_places_costs_twice_as_much(kind):
    """Work is linear in the number of places, except for attention; recomputing earlier places would be quadratic."""
    short, long = (make(kind, grid=(height, 6)) for height in (4, 8))
    assert operations(lambda: long.sample(2)) < 2.3 * operations(lambda: short.sample(2))


@every_kind
def test_samples_are_as_frequent_as_they_are_likely(kind):
    prior = make(kind, size=2, grid=(3,))
    samples = prior.sample(20_000, generator=generator())
    numbers = (samples * torch.tensor([4, 2, 1])).sum(1)
    frequencies = torch.bincount(numbers, minlength=8) / len(samples)
    everything = torch.tensor(list(itertools.product(range(2), repeat=3)))
    likely = (-prior.bits(everything) * math.log(2)).exp().float()
    assert (frequencies - likely).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_temperature_top_k_and_top_p():
    prior = make()
    greedy = prior.sample(3, temperature=0.0)
    assert torch.equal(greedy[0], greedy[1])
    assert torch.equal(prior.sample(3, top_k=1), greedy)
    for temperature in (1e-45, 1e-42, 1e-29):
        assert torch.equal(prior.sample(3, temperature=temperature), greedy)
    assert torch.equal(prior.sample(3, top_p=1e-6), greedy)
    first, second = (prior.sample(3, generator=generator(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, prior.sample(3, generator=generator(5)))
    assert torch.equal(prior.sample(3, top_k=7, top_p=1.0, generator=generator(4)), first)


def test_indices_left_by_the_limits():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().expand(20_000, -1)
    settings = {
        "all": (1.0, None, None),
        "top_k": (1.0, 2, None),
        "top_p": (1.0, None, 0.71),
        "exactly": (1.0, None, 0.7),
        "cold": (0.5, None, None),
    }
    drawn = {
        name: torch.bincount(draw(logits, *options, generator()), minlength=5) / 20_000
        for name, options in settings.items()
    }
    expected = {
        "all": [0.5, 0.2, 0.15, 0.1, 0.05],
        "top_k": [5 / 7, 2 / 7, 0, 0, 0],
        "top_p": [0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0],
        "cold": [p * p / 0.3250 for p in (0.5, 0.2, 0.15, 0.1, 0.05)],
    }
    for name, probabilities in expected.items():
        torch.testing.assert_close(drawn[name], torch.tensor(probabilities), rtol=0, atol=0.015)
    assert drawn["exactly"][3:].sum() == 0


@every_kind
def test_given_indices_stay_and_condition_the_others(kind):
    prior = make(kind)
    given = indices_for(prior, 4)
    given[:, 1:] = -1
    completed = prior.sample(4, given=given, generator=generator())
    assert torch.equal(completed[:, 0], given[:, 0])
    assert ((completed >= 0) & (completed < 7)).all()
    whole = indices_for(prior, 4)
    assert torch.equal(prior.sample(4, given=whole), whole)


@every_kind
def test_learns_a_sequence(kind):
    indices = (torch.arange(12).reshape(3, 4) + torch.arange(7)[:, None, None]) % 7
    prior = fit(kind(7, (3, 4), **SIZES[kind] | {"dim": 32}, dropout=0.0), indices)
    bits = prior.bits(indices)
    assert bits.max() < math.log2(7) + 1.5  # the first code is free, the others follow
    assert torch.equal(prior.sample(7, given=indices.masked_fill(torch.arange(12).reshape(3, 4) > 0, -1)), indices)


@every_kind
def test_learns_labels_and_guidance_amplifies_them(kind):
    indices = torch.stack([torch.full((6,), 0), torch.full((6,), 1)]).repeat(20, 1)
    indices[4:8, 2] = 2  # some noise, so that there is something to lean against
    labels = torch.tensor([0, 1]).repeat(20)
    options = SIZES[kind] | {"dim": 32, "classes": 2, "dropout": 0.0, "label_dropout": 0.3}
    prior = fit(kind(3, (6,), **options), indices, labels)
    for label in (0, 1):
        sampled = prior.sample(50, torch.full((50,), label), guidance=3.0, generator=generator())
        assert (sampled == label).float().mean() > 0.9
    first = prior.sample(200, generator=generator())[:, 0].float().mean().item()
    assert 0.3 < first < 0.7  # without a label either will do
    with_label = prior.bits(indices[:2], labels[:2]).mean()
    assert with_label < prior.bits(indices[:2]).mean() - 0.5


@every_kind
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"dropout": 0.0}], ids=["default", "half", "none"])
def test_dropout_only_in_training(kind, options):
    prior = make(kind, **options)
    indices = indices_for(prior)
    assert torch.equal(prior(indices), prior(indices))
    evaluated = prior(indices)
    prior.train()
    assert torch.equal(prior(indices), prior(indices)) == (options == {"dropout": 0.0})
    close(prior.eval()(indices), evaluated)


@every_kind
def test_every_layer_has_dropout(kind):
    prior = make(kind, dropout=0.3).train()
    shares = []
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_: shares.append(module.p))
    prior(indices_for(prior))
    # What attention and perceptron add in two blocks; what each of four layers adds; the LSTM's input and output.
    assert shares == [0.3] * {TransformerPrior: 4, PixelCNNPrior: 4, LSTMPrior: 2}[kind]
    if kind is LSTMPrior:
        assert prior.lstm.dropout == 0.3


@every_kind
def test_state_dict_round_trip_and_gradients(kind):
    prior, other = make(kind, classes=2), make(kind, classes=2)
    torch.nn.init.zeros_(other.head.weight)
    other.load_state_dict(prior.state_dict())
    indices, labels = indices_for(prior), torch.tensor([0, 1, 0, 1, 0, 1])
    assert torch.equal(other.bits(indices, labels), prior.bits(indices, labels))
    prior.train().loss(indices, labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size: must be at least 1, got 0"),
        ({"grid": ()}, "grid: must be one or more lengths"),
        ({"grid": (3, 0)}, "grid: must be one or more lengths"),
        ({"heads": 3}, "heads: must divide dim=128, got 3"),
        ({"dropout": 1.0}, r"dropout: must lie in \[0, 1\), got 1.0"),
        ({"label_dropout": -0.1}, "label_dropout: must lie in"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerPrior(**{"codebook_size": 8, "grid": (3,)} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(torch.zeros(2, 4, 3, dtype=torch.int64)), r"indices: must be int64 of shape \(B, 3, 4\)"),
        (lambda p: p(torch.zeros(2, 3, 4)), r"indices: must be int64 of shape"),
        (lambda p: p(torch.full((2, 3, 4), 7)), r"indices: must lie in \[0, 7\), got 7 to 7"),
        (lambda p: p(torch.full((2, 3, 4), -1)), r"indices: must lie in \[0, 7\), got -1 to -1"),
        (lambda p: p.loss(indices_for(p), torch.zeros(5, dtype=torch.int64)), r"labels: must be int64 of shape \(6,\)"),
        (lambda p: make().bits(indices_for(p), torch.zeros(6, dtype=torch.int64)), "was built without classes"),
        (lambda p: p.sample(0), "count: must be at least 1"),
        (lambda p: p.sample(1, temperature=-1), "temperature: must not be negative"),
        (lambda p: p.sample(1, temperature=math.inf), "temperature: must not be negative, nor infinite, got inf"),
        (lambda p: p.sample(1, guidance=math.nan), "guidance: must be finite, got nan"),
        (lambda p: p.sample(1, guidance=math.inf), "guidance: must be finite, got inf"),
        (lambda p: p.sample(1, given=torch.full((1, 3, 4), p.codebook_size)), "given: must lie in \\[-1, "),
        (lambda p: p.sample(1, given=torch.full((1, 3, 4), -2)), "given: must lie in \\[-1, "),
        (lambda p: p.sample(1, top_k=0), "top_k: must be at least 1"),
        (lambda p: p.sample(1, top_p=0.0), r"top_p: must lie in \(0, 1\]"),
        (lambda p: p.sample(1, guidance=2.0), "guidance: needs labels"),
        (lambda p: p.sample(1, given=torch.zeros(1, 12, dtype=torch.int64)), "given: must be int64 of shape"),
        (lambda p: p.train().sample(1), r"call eval\(\) first"),
    ],
)
def test_invalid_calls_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(classes=2))


class Adapter(torch.nn.Linear):
    """A linear map of low rank added to one that is there, with its weight, as LoRA's modules have it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.added = torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return super().forward(x) + self.added(x)


@every_kind
def test_adapters_that_sampling_and_coding_would_pass_over(kind):
    prior = make(kind)
    prior.head = Adapter(prior.head)
    indices = indices_for(prior)
    assert prior(indices).shape == (6, 12, 7)
    with pytest.raises(ValueError, match="head: must be the module that the prior was built with, got a Adapter"):
        prior.sample(2)
    with pytest.raises(ValueError, match="head: must be"):
        encode(indices, 7, model="prior", prior=prior)


@every_kind
def test_parametrizations_take_part_in_sampling(kind):
    prior = make(kind)
    torch.nn.utils.parametrizations.weight_norm(prior.head)
    assert prior.sample(2).shape == (2, 3, 4)


STAGED = {
    "flat": (TransformerPrior, SIZES[TransformerPrior]),
    "delay": (TransformerPrior, SIZES[TransformerPrior] | {"pattern": "delay"}),
    "lstm": (LSTMPrior, SIZES[LSTMPrior]),
    "depth": (DepthPrior, DEPTH),
}
every_order = pytest.mark.parametrize("order", STAGED)
STAGED_GRIDS = [(3, 4, 3), (5, 3), (1, 3), (2, 1, 3), (2, 2, 2, 3)]


def make_staged(order, sizes=(7, 2, 5), grid=(3, 4, 3), **options):
    """Return a prior of several indices at each position, with random heads."""
    kind, own = STAGED[order]
    prior = kind(sizes, grid, **own | options).eval()
    for head in prior.head.layers:
        torch.nn.init.normal_(head.weight, generator=generator())
    for module in prior.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, generator=generator(1))
    return prior


def staged_indices(prior, count=6):
    cells = (count, *prior.grid[:-1])
    return torch.stack(
        [torch.randint(0, size, cells, generator=generator(q)) for q, size in enumerate(prior.sizes)], -1
    )


@every_order
@pytest.mark.parametrize("grid", STAGED_GRIDS, ids=str)
def test_a_place_of_a_stage_sees_what_comes_before_it_alone(order, grid):
    prior = make_staged(order, (7, 5, 6), grid)
    indices = staged_indices(prior)
    logits = prior(indices)
    assert logits.shape == (6, prior.places, 7)
    assert sorted(prior.order) == list(range(prior.places))
    steps = {place: sum(divmod(place, 3)) if order == "delay" else place for place in range(prior.places)}
    for place in prior.order:
        other = indices.clone()
        flat = other.view(6, -1)
        flat[:, place] = (flat[:, place] + 1) % prior.sizes[place % 3]
        changed = ((prior(other) - logits).nan_to_num(0).abs().amax((0, 2)) > 1e-6).tolist()
        assert changed == [steps[later] > steps[place] for later in range(prior.places)]


@every_order
def test_probabilities_of_all_stacks_add_up_to_one(order):
    prior = make_staged(order, (3, 2), (2, 2))
    everything = torch.tensor(list(itertools.product(range(3), range(2), range(3), range(2)))).reshape(-1, 2, 2)
    bits = prior.bits(everything)
    assert (-bits * math.log(2)).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    close(prior.loss(everything), (bits.mean() * math.log(2) / 4).float())


@every_order
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("grid", STAGED_GRIDS, ids=str)
def test_sampling_of_stages_has_the_logits_of_the_full_forward(order, grid, guidance, monkeypatch):
    prior = make_staged(order, grid=grid, classes=3)
    labels, indices, seen = sampled(prior, guidance, monkeypatch)
    conditional, free = prior(indices, labels), prior(indices)
    for place, logits in zip(prior.order, seen, strict=True):
        size = prior.sizes[place % 3]
        assert logits.shape == (2, size)
        full = guidance * conditional[:, place, :size] + (1 - guidance) * free[:, place, :size]
        torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-4)
        assert bool((conditional[:, place, size:] == -math.inf).all())


@every_order
def test_an_untrained_prior_of_stages_is_uniform_and_learns(order):
    kind, own = STAGED[order]
    prior = kind((8, 4), (2, 3, 2), **own).eval()
    indices = torch.tensor([7, 1]).expand(4, 2, 3, 2).contiguous()
    close(prior.bits(indices), torch.full((4,), 6 * 5.0, dtype=torch.float64))
    fit(prior, indices, steps=30)
    assert prior.bits(indices).max() < 6
    assert all(parameter.grad is not None for parameter in prior.parameters())


@every_order
def test_similar_codes_of_each_codebook_start_alike(order):
    kind, own = STAGED[order]
    vectors = [torch.randn(2, 6, generator=generator(q)).repeat(2, 1) for q in range(2)]
    prior = kind((4, 4), (2, 3, 2), **own, vectors=vectors).eval()
    indices = torch.randint(0, 2, (3, 2, 3, 2), generator=generator())
    logits = prior(indices)
    close(logits[..., :2], logits[..., 2:])
    close(prior(indices + 2), logits)
    assert logits[:, 0].std() != logits[:, 1].std()
    with pytest.raises(ValueError, match="vectors: must be 2 codebooks, got 1"):
        kind((4, 4), (2, 2), vectors=vectors[0])


def test_delay_and_depth_take_a_step_of_the_large_transformer_for_each_position():
    flat, *others = (make_staged(order, (8,) * 4, (4, 4, 4)) for order in ("flat", "delay", "depth"))
    for other in others:
        assert operations(lambda other=other: other.sample(2)) < 0.51 * operations(lambda: flat.sample(2))


def test_a_depth_prior_learns_what_the_delay_pattern_cannot():
    """Two stages that are equal at random: given the first, the second is known."""
    indices = torch.randint(0, 2, (64, 1, 1), generator=generator()).expand(64, 1, 2).contiguous()
    bits = {}
    for order in ("delay", "depth"):
        kind, own = STAGED[order]
        bits[order] = fit(kind((2, 2), (1, 2), **own, dropout=0.0), indices, steps=60).bits(indices).mean()
    assert bits["depth"] < 1.1
    assert bits["delay"] > 0.9


@every_order
def test_given_indices_of_stages_are_kept(order):
    prior = make_staged(order)
    given = staged_indices(prior)
    given[:, 2:] = -1
    sampled = prior.sample(6, given=given, generator=generator())
    assert torch.equal(sampled[:, :2], given[:, :2])
    assert all(int(sampled[..., q].max()) < size for q, size in enumerate(prior.sizes))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (TransformerPrior, {"codebook_size": (4, 4), "grid": (3,)}, "grid: must end with the number of codebooks, 2"),
        (TransformerPrior, {"codebook_size": (4, 4), "grid": (3, 3)}, "grid: must end with the number of codebooks, 2"),
        (TransformerPrior, {"codebook_size": (4, 0), "grid": (3, 2)}, "codebook_size: must be at least 1"),
        (TransformerPrior, {"codebook_size": (), "grid": (3, 0)}, "codebook_size: must be at least 1"),
        (TransformerPrior, {"codebook_size": 4, "grid": (3,), "pattern": "delay"}, "pattern: 'delay' is for several"),
        (
            TransformerPrior,
            {"codebook_size": 4, "grid": (3,), "pattern": "late"},
            "pattern: must be one of flat, delay",
        ),
        (DepthPrior, {"codebook_size": 4, "grid": (3,)}, "kind: a depth prior takes several indices at each position"),
        (
            DepthPrior,
            {"codebook_size": (4, 4), "grid": (3, 2), "stage_dim": 6},
            "heads: must divide stage_dim=6, got 4",
        ),
        (PixelCNNPrior, {"codebook_size": (4, 4), "grid": (3, 2)}, "kind: a pixelcnn takes one index at each position"),
    ],
)
def test_priors_of_stages_refuse_by_name(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_indices_of_a_stage_beyond_its_codebook_are_refused():
    prior = make_staged("flat")
    with pytest.raises(ValueError, match=r"indices: must lie in \[0, 2\), got 2 to 2"):
        prior(torch.full((1, *prior.grid), 2))
