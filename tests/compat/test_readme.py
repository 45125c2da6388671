"""Every Python block of vector_quantize_pytorch's README, from the installed package, with fastvq in its place."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys

import pytest

import fastvq
from fastvq.compat import aliases

pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")

README = importlib.metadata.metadata("vector-quantize-pytorch").get_payload()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)

# The last block uses names that it never defines: what it must mean.
GIVEN = {25: {"dim": 9, "num_codebooks": 3}}

# Blocks that vector_quantize_pytorch itself refuses, and what fastvq says to them.
REFUSED = {
    7: "threshold_ema_dead_code: must be positive beside directional_reparam=True",
    24: "x: must have shape .* with dim=16, got \\(1, 32, 16\\)",  # sequences have their channels first here
    25: "x: must have shape .* with dim=9, got \\(2, 3, 9\\)",
}


def imported(block):
    return re.findall(r"^from vector_quantize_pytorch import (\w+)$", block, re.M)


@pytest.fixture
def _standing_in():
    """`import vector_quantize_pytorch` means fastvq, for the length of a test."""
    theirs = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == aliases.PEER}
    aliases.stand_in()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == aliases.PEER]:
        del sys.modules[name]
    sys.modules.update(theirs)


def test_the_readme_is_the_one_we_know():
    assert len(BLOCKS) == 26
    assert all(imported(block) for block in BLOCKS)


@pytest.mark.parametrize("number", range(26))
@pytest.mark.usefixtures("_standing_in")
def test_block(number):
    names = {"__name__": "readme", **GIVEN.get(number, {})}
    run = functools.partial(exec, compile(BLOCKS[number], f"README block {number}", "exec"), names)
    if number in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[number]):
            run()
    else:
        run()
    assert all(names[name] is getattr(fastvq, name) for name in imported(BLOCKS[number]))


@pytest.mark.parametrize("number", REFUSED)
def test_what_is_refused_is_refused_there_too(number):
    with pytest.raises(AssertionError):
        exec(BLOCKS[number], dict(GIVEN.get(number, {})))
