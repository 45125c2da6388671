"""The script that compares training curves: equal states and data give equal first steps."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

pytest.importorskip("vector_quantize_pytorch")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "curves.py"
spec = importlib.util.spec_from_file_location("curves", SCRIPT)
curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(curves)


@pytest.mark.parametrize("name", curves.LAYERS)
def test_training_begins_alike(name):
    """The second step depends on the gradients and the state of the first."""
    found = curves.compare(name, steps=2)
    assert found.agreement > 0.999
    assert found.apart(1e-4) is None
    assert found.fastvq[0] != found.fastvq[1]


def test_report(tmp_path):
    falling = [2.0 / (i + 1) for i in range(60)]
    apart = curves.Curves(falling, [*falling[:40], *(1.1 * loss for loss in falling[40:])], 0.99)
    assert apart.apart() == 40
    assert math.isclose(apart.gap, 1 - 1 / (1 + 0.1 * sum(falling[40:]) / sum(falling[35:])), rel_tol=1e-9)
    same = curves.Curves(falling, falling, 1.0)
    assert (same.apart(), same.gap) == (None, 0)
    curves.draw("FSQ", apart, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    text = curves.report({"FSQ": apart, "SimVQ": same}, 60)
    assert "| FSQ | 99.00% |" in text
    assert "| never | 0.00% |" in text
    assert "images/curves_SimVQ.png" in text
