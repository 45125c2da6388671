"""Quantize dropout: the draw is the peer's, and stays in its range."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from fastvq.parts.dropout import (
    ActiveStages,
    QuantizeDropout,
    common_seed,
    draw_seed,
    draw_stage_count,
    draw_stage_counts,
)


@pytest.mark.parametrize(("cutoff", "multiple"), [(0, 1), (3, 1), (0, 4), (2, 3), (7, 1)])
def test_range_and_rounding(cutoff, multiple):
    active = Counter(draw_stage_count(8, cutoff_index=cutoff, multiple_of=multiple, seed=seed) for seed in range(400))
    possible = {min(math.ceil((last + 1) / multiple) * multiple, 8) for last in range(cutoff, 8)}
    assert set(active) == possible
    if multiple == 1:
        assert min(active.values()) > 0.5 * max(active.values())


def test_the_seed_decides_as_in_vector_quantize_pytorch():
    for seed in range(20):
        last = random.Random(seed).randrange(1, 8)
        assert draw_stage_count(8, cutoff_index=1, seed=seed) == last + 1


def test_without_a_seed_torch_decides():
    torch.manual_seed(3)
    seed = draw_seed()
    torch.manual_seed(3)
    first = [draw_stage_count(64) for _ in range(5)]
    torch.manual_seed(3)
    assert [draw_stage_count(64) for _ in range(5)] == first
    assert first[0] == draw_stage_count(64, seed=seed)
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, True, 3, 1), "quantize_dropout_cutoff_index: must be an integer in"),
        ((3, True, -1, 1), "quantize_dropout_cutoff_index: must be an integer in"),
        ((3, False, 0, 0), "quantize_dropout_multiple_of: must be an integer of at least 1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizeDropout(*arguments).check()


def test_all_stages_are_active_in_eval_or_when_off():
    x = torch.zeros(1)
    for dropout, training in (
        (QuantizeDropout(4, True), False),
        (QuantizeDropout(4), True),
        (QuantizeDropout(1, True), True),
    ):
        active = dropout.draw(training, x)
        assert active.number == dropout.stages
        assert active.fill(0, x, -1) is x


def test_compiled_draws_as_eager():
    dropout = QuantizeDropout(8, True, 1, 2)

    def left(x, seed=None):
        active = dropout.draw(True, x, seed)
        stages = [active.fill(stage, x + stage, -1) for stage in range(8) if not active.skips(stage)]
        return sum((stage != -1).sum() for stage in stages)

    compiled = torch.compile(left, fullgraph=True)
    for seed in range(6):
        assert compiled(torch.zeros(1), seed) == left(torch.zeros(1), seed)
    draws = []
    for function in (compiled, left):
        torch.manual_seed(0)
        draws.append([int(function(torch.zeros(1))) for _ in range(10)])
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 2


def test_one_seed_for_several():
    dropout = QuantizeDropout(64, True)

    def twice(x):
        seed = common_seed(x)
        return torch.stack([dropout.draw(True, x, seed).fill(i, x, -1) for _ in range(2) for i in range(64)])

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for function in (compiled, twice):
        torch.manual_seed(1)
        first, second = function(torch.zeros(1)).chunk(2)
        assert torch.equal(first, second)
        assert int((first == 0).sum()) == draw_stage_count(64, seed=int(torch.manual_seed(1) and draw_seed()))


def test_a_number_for_each_item():
    counts = draw_stage_counts(2000, 8, cutoff_index=1, multiple_of=2, seed=3)
    assert counts[0] == draw_stage_count(8, cutoff_index=1, multiple_of=2, seed=3)
    shares = Counter(counts)
    assert set(shares) == {2, 4, 6, 8}
    assert shares[2] < 0.75 * min(shares[4], shares[6], shares[8])  # one of the seven last indices, not two
    dropout = QuantizeDropout(8, True, 1, 2, per_item=True)
    active = dropout.draw(True, torch.zeros(1), 3, items=5, rows=2)
    assert active.number.tolist() == [count for count in counts[:5] for _ in range(2)]
    assert int(active.of_any_row().number) == max(counts[:5])
    assert dropout.draw(False, torch.zeros(1), items=5).number == 8
    assert ActiveStages(3).of_any_row() == ActiveStages(3)
