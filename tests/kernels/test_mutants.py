"""The tests would notice: each mutant is one wrong line in a kernel, and some data here show it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

import fastvq.kernels
from fastvq.backends import reference

from ..cases import ADVERSARIAL, generator
from . import models

KERNELS = Path(fastvq.kernels.__file__).parent

# name: (data that show it, file, the line as it is, as it is wrong)
MUTANTS = {
    "2 B is B / 100": (
        "rounded_midpoints",
        "certify.py",
        "best - second > 2 * bound",
        "best - second > 0.01 * bound",
    ),
    "ties take the highest code": (
        "duplicate_codes",
        "define.py",
        "tl.min(tl.where(answered & (best == smallest), best_code, 1 << 62))",
        "tl.max(tl.where(answered & (best == smallest), best_code, -1))",
    ),
    "ties of a lane take the later code": (
        "opposite_codes",
        "define.py",
        "(score < best)",
        "(score <= best)",
    ),
    "no mask over the columns of a row": (
        "gaussian",
        "rows.py",
        "there[:, None] & (d < dim)[None, :]",
        "there[:, None]",
    ),
    "no mask over the last tile of codes": (
        "gaussian",
        "frame.py",
        "near = (norm >= 0) &",
        "near = (norm >= -1) &",
    ),
    "codes that share a slot count as copies": (
        "gaussian",
        "copies.py",
        "possible = possible & (different == 0)",
        "possible = possible & (different == different)",
    ),
    "copies may differ in an element": (
        "codes_one_ulp_apart",
        "copies.py",
        "possible & (different == 0)",
        "possible & (different <= 1)",
    ),
    "a code counts as its own copy": (
        "gaussian",
        "copies.py",
        "chosen & (first < k)",
        "chosen & (first <= k)",
    ),
    "the bound forgets what float16 leaves": (
        "rounded_midpoints",
        "rows.py",
        "operands = row_rest * code_length + high * code_rest\n        products",
        "operands = row_rest * 0.0\n        products",
    ),
    "rows that aren't finite are answered": (
        "non_finite_vectors",
        "rows.py",
        'tl.where(non_finite > 0, float("nan"), bound)',
        "bound",
    ),
    "far codes never come into question": (
        "far_codes",
        "rows.py",
        'far * (far * stretch), float("inf")',
        "far * far, -1e30",
    ),
    "the second best of the best tile is lost": (
        "rounded_midpoints",
        "scan.py",
        "second = tl.maximum(second, tl.max(elsewhere, 1))",
        "second = second",
    ),
    "the second best of the best column is lost": (
        "rounded_midpoints",
        "scan.py",
        "second = tl.maximum(second, tl.minimum(best, of_tile))",
        "second = second",
    ),
    "the neighbor is never looked at": (
        "gaussian",
        "certify.py",
        "certain = certain & (takes_first | takes_other)",
        "takes_other = takes_other & (best != best)",
    ),
    "the low parts are left out": (
        "rounded_midpoints",
        "scan.py",
        "scores = tl.dot(y_high, code_high) + fine",
        "scores = tl.dot(y_high, code_high) + 0 * fine",
    ),
    "half the squares are left out": (
        "gaussian",
        "frame.py",
        "rest = half_square if L2 else half_square * 0",
        "rest = half_square * 0",
    ),
    "the work list loses a row": (
        "rounded_midpoints",
        "certify.py",
        "append(there & (done == 0), rows",
        "append(there & (done == 0) & (rows % 2 == 0), rows",
    ),
}


def load(directory):
    """Import the package in `directory` under a name of its own."""
    name = f"mutant_{directory.parent.name}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(
        name, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    # Few slots, so that codes meet in them, and copies come through to where ties are resolved.
    importlib.import_module(f"{name}.frame").slots_for = lambda size: 5
    return importlib.import_module(f"{name}.search")


def wrong(search, data, device):
    """Return whether an index of the mutant differs from the specification's."""
    for shape in [(60, 75, 33), (24, 128, 8)]:
        x, codebook = ADVERSARIAL[data](*shape, generator())
        # A mutant may read past the end: there is something there.
        codebook = torch.cat([codebook, codebook / 2])[: len(codebook)]
        actual = search(x.to(device), codebook.to(device)).cpu()
        if not torch.equal(actual, reference.search(x, codebook)):
            return True
    return False


@pytest.fixture
def copy(tmp_path):
    directory = tmp_path / "kernels"
    shutil.copytree(KERNELS, directory, ignore=shutil.ignore_patterns("__pycache__"))
    yield directory
    for name in [name for name in sys.modules if name.startswith("mutant_")]:
        del sys.modules[name]


def test_the_copy_itself_is_right(copy, device):
    search = load(copy).search
    for data in ("gaussian", "rounded_midpoints", "non_finite_codes"):
        assert not wrong(search, data, device)


@models.needs_interpreter
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(mutant, copy, device):
    data, file, right, mistaken = MUTANTS[mutant]
    source = (copy / file).read_text()
    assert source.count(right) == 1, f"{file} no longer holds {right!r} once: bring the mutant up to date"
    (copy / file).write_text(source.replace(right, mistaken))
    assert wrong(load(copy).search, data, device)
