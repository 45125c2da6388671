"""Codebooks that learn on several ranks: what tests/ranks.py did on each of them, with gloo."""

from __future__ import annotations

import ast
import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch

from fastvq import distributed

from .forked import run_forked

SCRIPT = Path(__file__).with_name("ranks.py")
SCENARIOS = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "scenario" for d in node.decorator_list)
]


@functools.cache
def results(ranks: int) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        run = run_forked(ranks, SCRIPT, str(out))
        assert out.exists(), run.stdout + run.stderr
        return json.loads(out.read_text())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks(scenario, ranks):
    error = results(ranks)[scenario]
    assert error is None, error


def test_one_process_needs_no_group():
    assert not distributed.active()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    x = torch.randn(3)
    assert distributed.mean(x) is x
    distributed.check_synchronized(torch.nn.Linear(2, 2))
    torch.manual_seed(5)
    seeds = [distributed.common_seed() for _ in range(3)]
    torch.manual_seed(5)
    assert seeds == [distributed.common_seed() for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16])
def test_a_checksum_sees_every_place(dtype):
    x = torch.arange(24).reshape(4, 6).to(dtype)
    sums = {int(distributed.checksum(x))}
    for place in range(24):
        other = x.clone()
        other.flatten()[place] = other.flatten()[place] == 0
        sums.add(int(distributed.checksum(other)))
    assert len(sums) == 25
    if dtype != torch.bool:
        assert int(distributed.checksum(x.flip(0))) not in sums
