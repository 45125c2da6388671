"""The module paths of vector_quantize_pytorch under fastvq, and fastvq in its place."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import subprocess
import sys

import pytest
import torch

import fastvq
from fastvq.compat import aliases

from ..cases import close

vqp = pytest.importorskip("vector_quantize_pytorch", reason="vector_quantize_pytorch isn't installed")


def classes(module):
    """Public classes of a module of the peer, its own and those it takes from the peer's other modules."""
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__.startswith(vqp.__name__) and not name.startswith("_"):
            yield name


PEER_MODULES = sorted(module.name for module in pkgutil.iter_modules(vqp.__path__))


def test_every_module_has_its_path():
    assert sorted(aliases.MODULES) == PEER_MODULES


@pytest.mark.parametrize("name", PEER_MODULES)
def test_every_class_has_its_path(name):
    theirs = importlib.import_module(f"{vqp.__name__}.{name}")
    ours = importlib.import_module(f"fastvq.{name}")
    assert getattr(fastvq, name) is ours
    assert importlib.util.find_spec(f"fastvq.{name}") is ours.__spec__
    names = list(classes(theirs))
    assert [n for n in names if not inspect.isclass(getattr(ours, n, None))] == []
    exported = [n for n in names if hasattr(vqp, n)]
    assert [n for n in exported if getattr(ours, n) is not getattr(fastvq, n)] == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("vector_quantize_pytorch", "LossBreakdown"),
        ("lookup_free_quantization", "LossBreakdown"),
        ("lookup_free_quantization", "Return"),
        ("evo_lookup_free_quantization", "Return"),
        ("evo_lookup_free_quantization", "Result"),
    ],
)
def test_tuples_have_the_same_fields(path, name):
    ours, theirs = (getattr(importlib.import_module(f"{p}.{path}"), name) for p in ("fastvq", vqp.__name__))
    assert ours._fields == theirs._fields


def test_functions_are_theirs():
    """Functions that are imported from the peer's modules, on data where it is right."""
    x, e = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    for path, name, arguments in [
        ("vector_quantize_pytorch", "rotate_to", (x, e)),
        ("vector_quantize_pytorch", "straight_through", (x, e)),
        ("sim_vq", "rotate_to", (x, e)),
        ("vector_quantize_pytorch", "orthogonal_loss_fn", (x[None],)),
        ("finite_scalar_quantization", "round_ste", (x,)),
        ("finite_scalar_quantization", "floor_ste", (x,)),
        ("lookup_free_quantization", "maybe_distributed_mean", (x,)),
    ]:
        results = []
        for package in ("fastvq", vqp.__name__):
            value = getattr(importlib.import_module(f"{package}.{path}"), name)(*arguments)
            (gradient,) = torch.autograd.grad(value.square().sum(), x)
            results.append((value.detach(), gradient))
        close(*results)
    for act in ("tanh", "sigmoid", "normal", "laplace", "cauchy"):
        ours, theirs = (
            importlib.import_module(f"{p}.finite_scalar_perturbation").build_cdf_act(act)
            for p in ("fastvq", vqp.__name__)
        )
        close(ours[0](x.detach()), theirs[0](x.detach()))
        probabilities = torch.linspace(0.05, 0.95, 9)
        close(ours[1](probabilities), theirs[1](probabilities))


def test_objects_name_their_real_home():
    """A pickle made through a path of the peer's loads where the paths aren't there."""
    from fastvq.vector_quantize_pytorch import VectorQuantize

    assert VectorQuantize is fastvq.VectorQuantize
    data = pickle.dumps(VectorQuantize(4, 8))
    assert b"fastvq.vector_quantize_pytorch" not in data
    assert torch.equal(pickle.loads(data).codebook, pickle.loads(data).codebook)


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_fastvq_stands_in():
    done = in_a_fresh_process(
        "import sys, fastvq, fastvq.compat.aliases\n"
        "fastvq.compat.aliases.stand_in()\n"
        "fastvq.compat.aliases.stand_in()\n"
        "import vector_quantize_pytorch as v, vector_quantize_pytorch.residual_vq as r\n"
        "from vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize\n"
        "from vector_quantize_pytorch.residual_vq import *\n"
        "assert v is fastvq and r.ResidualVQ is ResidualVQ is fastvq.ResidualVQ\n"
        "assert VectorQuantize is fastvq.VectorQuantize\n"
        "assert not [m for m in sys.modules if m.startswith(('einops', 'einx'))]\n"
    )
    assert done.returncode == 0, done.stderr


def test_too_late_to_stand_in():
    done = in_a_fresh_process(
        "import vector_quantize_pytorch, fastvq, fastvq.compat.aliases\nfastvq.compat.aliases.stand_in()"
    )
    assert "RuntimeError: vector_quantize_pytorch: must not be imported before fastvq stands in for it" in done.stderr


def test_what_the_peer_keeps_for_itself_is_not_there():
    with pytest.raises(ImportError, match="pack_one"):
        from fastvq.vector_quantize_pytorch import pack_one  # noqa: F401
