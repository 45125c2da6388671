"""The state of a codebook, and `learn_together` beside the formulas of the moving averages in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fastvq.codebook import Codebook, Replacement, learn_together
from fastvq.functional.quantize import unit_norm

from ..cases import close, generator

K, D = 7, 4


def test_initial_codes_are_hes_uniform():
    codebook = Codebook(16, 512).embed
    limit = math.sqrt(6 / (16 * 512))
    assert codebook.abs().max() <= limit
    assert 0.99 * limit < codebook.abs().max()
    close(codebook.std(), torch.tensor(limit / math.sqrt(3)), torch.bfloat16)
    close(Codebook(16, 8, cosine=True).embed.norm(dim=-1), torch.ones(1, 8))
    assert not Codebook(16, 8, kmeans_init=True).embed.any()


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_that_are_set_stay(cosine):
    """Averages that agree keep them where they are, and k-means doesn't take their place."""
    codebook = Codebook(4, 8, kmeans_init=True, cosine=cosine, decay=0.99)
    codes = 5 * torch.randn(8, 4)
    codebook.set_(codes[None])
    codes = unit_norm(codes) if cosine else codes
    codebook.initialize_(torch.randn(1, 20, 4))
    codebook.learn_(torch.zeros(1, 3, 4), torch.full((1, 3), -1))
    torch.testing.assert_close(codebook.codes[0], codes, rtol=1e-4, atol=1e-5)


def test_state_written_behind_its_back_is_kept():
    """Some loaders copy into the buffers themselves."""
    trained, fresh = Codebook(4, 8), Codebook(4, 8, kmeans_init=True)
    for target, source in zip(fresh.buffers(), trained.buffers(), strict=True):
        target.copy_(source)
    fresh.initialize_(torch.randn(1, 20, 4))
    assert torch.equal(fresh.codes, trained.codes)


def test_loading_in_place_of_meta_and_half_state():
    state = {name: t.half() if t.is_floating_point() else t for name, t in Codebook(4, 8).state_dict().items()}
    with torch.device("meta"):
        codebook = Codebook(4, 8)
        codebook.load_state_dict({}, strict=False)
    codebook.load_state_dict(state, assign=True)
    assert all(t.device.type == "cpu" for t in codebook.buffers())
    assert {t.dtype for t in codebook.buffers() if t.is_floating_point()} == {torch.float32}


def batch(heads=1, n=30, seed=0):
    g = generator(seed)
    return torch.randn(heads, n, D, generator=g), torch.randint(-1, K, (heads, n), generator=g)


def averaged(size, average, x, indices, *, decay, weight=1.0):
    """cluster_size (K,) and embed_avg (K, D) after a step."""
    share = (1 - decay) * torch.as_tensor(weight, dtype=torch.float64).expand(K)
    for k in range(K):
        members = x[indices == k].double()
        size[k] += share[k] * (len(members) - size[k])
        average[k] += share[k] * (members.sum(0) - average[k])


def codes_of(size, average, eps):
    smoothed = (size + eps) / (size.sum() + K * eps) * size.sum()
    return average / smoothed[:, None]


def assert_state(codebook, head, size, average):
    close(codebook.cluster_size[head].double(), size, torch.float32)
    close(codebook.embed_avg[head].double(), average, torch.float32)
    close(codebook.embed[head].detach().double(), codes_of(size, average, codebook.eps), torch.float32)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads(heads, learnable):
    """A learnable codebook that follows the averages all the same, as beside an orthogonal loss."""
    codebook = Codebook(D, K, heads=heads, decay=0.9, learnable=learnable)
    expected = [(codebook.cluster_size[h].double(), codebook.embed_avg[h].double()) for h in range(heads)]
    for seed in range(3):
        x, indices = batch(heads, seed=seed)
        codebook.learn_(x, indices)
        for h in range(heads):
            averaged(*expected[h], x[h], indices[h], decay=0.9)
    for h in range(heads):
        assert_state(codebook, h, *expected[h])


WEIGHTS = {
    "one": torch.tensor(0.25),
    "a number": 0.25,
    "each code": torch.linspace(0, 1, K),
    "each head and code": torch.linspace(0, 1, K)[None],
    "a function": lambda sums, counts: (counts > 4).float(),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind):
    codebook = Codebook(D, K, decay=0.5)
    size, average = codebook.cluster_size[0].double(), codebook.embed_avg[0].double()
    x, indices = batch()
    codebook.learn_(x, indices, weight=WEIGHTS[kind])
    weight = WEIGHTS[kind]
    if kind == "a function":
        weight = (torch.bincount(indices[0, indices[0] >= 0], minlength=K) > 4).float()
    averaged(size, average, x[0], indices[0], decay=0.5, weight=torch.as_tensor(weight).flatten())
    assert_state(codebook, 0, size, average)


def test_weights_that_do_not_fit():
    with pytest.raises(ValueError, match=r"^ema_update_weight: must have shape \(\), \(7,\) or \(1, 7\), got"):
        Codebook(D, K).learn_(*batch(), weight=torch.ones(3))


@pytest.mark.parametrize(("ema", "compiler"), [(True, ""), (False, ""), (True, "inductor"), (False, "aot_eager")])
def test_a_codebook_that_takes_no_part_stays_to_the_bit(ema, compiler):
    """As a stage that quantize dropout left out, beside one that learns."""
    torch._dynamo.reset()
    codebooks = [Codebook(D, K, ema_update=ema, replacement=Replacement(0.5)) for _ in range(2)]
    for codebook in codebooks:  # as replacement leaves them: averages that give slightly other codes
        codebook.cluster_size[0, :3] = 0.6
        codebook.embed_avg[0] = codebook.embed[0] * codebook.cluster_size[0, :, None]
    before = copy.deepcopy(codebooks[1].state_dict())
    x, indices = batch()
    inputs, chosen = torch.stack([x, x]), torch.stack([indices, torch.full_like(indices, -1)])

    def step(zero):
        learn_together(codebooks, inputs, chosen, active=[zero + 1, zero])

    (torch.compile(step, fullgraph=True, backend=compiler) if compiler else step)(torch.zeros(()))
    for name, value in codebooks[1].state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(codebooks[0].cluster_size, before["cluster_size"])


def test_stages_together_are_stages_apart():
    sizes = (7, 5, 9)
    together = [Codebook(D, k) for k in sizes]
    apart = copy.deepcopy(together)
    x = torch.randn(3, 1, 20, D)
    indices = [torch.randint(-1, k, (1, 20)) for k in sizes]
    learn_together(together, x, indices)
    for codebook, rows, chosen in zip(apart, x, indices, strict=True):
        codebook.learn_(rows, chosen)
    for one, other in zip(together, apart, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_stages_that_share_a_codebook_take_turns():
    codebook = Codebook(D, K, decay=0.7)
    size, average = codebook.cluster_size[0].double(), codebook.embed_avg[0].double()
    batches = [batch(seed=seed) for seed in range(3)]
    learn_together([codebook] * 3, [x for x, _ in batches], [indices for _, indices in batches])
    for x, indices in batches:
        averaged(size, average, x[0], indices[0], decay=0.7)
    assert_state(codebook, 0, size, average)


@pytest.mark.parametrize("replacement", [None, Replacement(0.5)])
def test_a_codebook_that_does_not_learn_is_skipped(replacement):
    codebooks = [Codebook(D, K, ema_update=False, replacement=replacement), Codebook(D, K)]
    before = copy.deepcopy(codebooks[0].state_dict())
    x, indices = batch()
    learn_together(codebooks, [x, x], [indices, indices])
    assert torch.equal(codebooks[0].embed_avg, before["embed_avg"])
    assert torch.equal(codebooks[0].cluster_size, before["cluster_size"]) == (replacement is None)
    assert not torch.equal(codebooks[1].embed_avg, codebooks[1].embed)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_commit_is_one_step_on_all_batches(heads):
    kept = Codebook(D, K, heads=heads)
    whole, later = copy.deepcopy(kept), copy.deepcopy(kept)
    batches = [batch(heads, seed=seed) for seed in range(3)]
    before = copy.deepcopy(kept.state_dict())
    for x, indices in batches:
        kept.learn_(x, indices, accumulate_only=True)
        for name, value in kept.state_dict().items():
            assert torch.equal(value, before[name])
    assert list(kept.state_dict()) == list(before)
    kept.commit_()
    whole.learn_(torch.cat([x for x, _ in batches], 1), torch.cat([i for _, i in batches], 1))
    for x, indices in batches[:2]:
        later.learn_(x, indices, accumulate_only=True)
    later.learn_(*batches[2])
    for name, value in kept.state_dict().items():
        close(value, whole.state_dict()[name])
        close(later.state_dict()[name], whole.state_dict()[name])
    moved = copy.deepcopy(kept.state_dict())
    kept.commit_()  # nothing is left
    for name, value in kept.state_dict().items():
        assert torch.equal(value, moved[name])


def test_codes_that_follow_by_hand():
    codebook = Codebook(D, K, manual_ema_update=True)
    before, (x, indices) = codebook.embed.clone(), batch()
    codebook.learn_(x, indices)
    assert torch.equal(codebook.embed, before)
    codebook.update_ema()
    close(codebook.embed[0].double(), codes_of(codebook.cluster_size[0].double(), codebook.embed_avg[0].double(), 1e-5),
          torch.float32)  # fmt: skip


def test_a_bridge_maps_the_codes():
    bridge = torch.nn.Linear(D, D)
    codebook = Codebook(D, K, learnable=True, ema_update=False, bridge=bridge)
    close(codebook.codes, bridge(codebook.embed))
    assert "vq_bridge.weight" in codebook.state_dict()


def test_what_is_held_belongs_to_the_codes_it_was_held_for():
    codebook = Codebook(D, K)
    codebook.learn_(*batch(), accumulate_only=True)
    state = copy.deepcopy(codebook.state_dict())
    codebook.load_state_dict(state)
    codebook.commit_()
    for name, value in codebook.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "replacement", [Replacement(2.0, rows="kmeans++", reservoir=16, at_once=3), Replacement(0.1, every=2)]
)
def test_policies_compile(replacement):
    torch._dynamo.reset()
    codebook = Codebook(D, K, replacement=replacement)
    codebook.cluster_size.zero_()
    before = codebook.embed.clone()
    step = torch.compile(lambda x, indices: codebook.learn_(x, indices), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        step(*batch(seed=seed))
    assert not torch.equal(codebook.embed, before)
