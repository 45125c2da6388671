"""The rooms of the tree: each op has a file of its own name in each, and nothing builds on the specification."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fastvq
from fastvq import ops, quantizers
from fastvq.backends import native, select, support

from . import every
from .op_samples import sample_inputs

ROOT = Path(__file__).parent.parent


def file_of(op: str) -> str:
    """Return the name of an op's files: forward and backward share one, and a trailing underscore is dropped."""
    return op.removesuffix("_forward").removesuffix("_backward").removesuffix("_")


OPS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
FILES = sorted({file_of(op) for op in OPS})
DIFFERENTIABLE = {file_of(op) for op in OPS if op.endswith("_backward")}

# The files beside those of the ops.
SHARED = {
    "fastvq/ops": {"registry", "checks", "packed"},
    "fastvq/backends/reference": set(),
    "fastvq/backends/torch": set(),
    "fastvq/functional": set(),
}


def stems(folder: str, *suffixes: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).iterdir() if path.suffix in suffixes and path.stem != "__init__"}


def test_the_ops_are_found():
    assert {"search", "residual_quantize", "ema_update"} <= set(FILES)
    assert {"quantize", "soft_assign"} <= DIFFERENTIABLE < set(FILES)


@pytest.mark.parametrize("folder", ["fastvq/ops", "fastvq/backends/reference", "fastvq/backends/torch"])
def test_every_op_has_a_file_and_no_file_another_name(folder):
    assert stems(folder, ".py") == SHARED[folder] | set(FILES)


def test_every_differentiable_op_has_a_file_of_functions():
    assert stems("fastvq/functional", ".py") == DIFFERENTIABLE
    for name in DIFFERENTIABLE:
        source = (ROOT / f"fastvq/functional/{name}.py").read_text()
        assert "torch.autograd.Function" in source, name


def test_every_op_has_a_test():
    assert {f"test_{name}" for name in FILES} <= stems("tests/ops", ".py")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("package", ["fastvq.ops", "fastvq.backends.reference", "fastvq.backends.torch"])
def test_the_file_holds_the_op(package, op):
    module = importlib.import_module(f"{package}.{file_of(op)}")
    assert inspect.unwrap(getattr(module, op)).__module__ == module.__name__


def declared(backend: str, device: str) -> set[str]:
    """Return the files of the ops that a backend declares to serve on a device by code of its own."""
    own = [s for s in select.BACKENDS[backend].supports if not s.composed_of and (not s.devices or device in s.devices)]
    return {file_of(support.op) for support in own}


KERNELS = {
    ("csrc/cpu", ".cpp", ".h"): declared("native", "cpu"),
    ("csrc/cuda", ".cu", ".cuh"): declared("native", "cuda"),
    ("kernels", ".py"): declared("triton", "cuda"),
}


@pytest.mark.parametrize("room", KERNELS, ids=lambda room: room[0])
def test_every_kernel_has_a_file_of_its_op(room):
    assert {"search", "accumulate"} <= KERNELS[room] <= stems(*room)


def test_every_triton_kernel_stands_in_the_file_of_its_op():
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for name in map(file_of, functions & set(OPS)):
            assert name == path.stem
            found.add(name)
    assert found == KERNELS["kernels", ".py"]


def innermost(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_backend_in_python_runs_its_own_code(name):
    """A comparison of the torch backend with the reference would otherwise compare a function with itself."""
    table = importlib.import_module(f"fastvq.backends.{name}").OPS
    assert sorted(table) == sorted(OPS)
    for op in OPS:
        assert innermost(table[op]).__module__ == f"fastvq.backends.{name}.{file_of(op)}"


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in (("fastvq", ROOT / "fastvq"), ("fastvq.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Yield the absolute name of everything that a module imports, at its top or within a function."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and any(isinstance(argument, ast.Constant) for argument in node.args):
            # import_module("...") and its like.
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


SPECIFICATION = "fastvq.backends.reference"
READERS = {
    "fastvq.backends.select": "the registry of backends",
    "fastvq.bench.gpu.exactness": "checks the results of a GPU",
}


def test_nothing_builds_on_the_specification():
    """Its own files aside, only the registry and a checker import it."""
    found = {
        name
        for name, path in modules()
        if not f"{name}.".startswith(f"{SPECIFICATION}.")
        and any(f"{imported}.".startswith(f"{SPECIFICATION}.") for imported in imports(name, path))
    }
    assert "fastvq.bench.gpu.exactness" in found <= set(READERS)


def test_the_walk_sees_each_form_of_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import fastvq.backends.reference.search\n"
        "from fastvq.backends import reference\n"
        "def f():\n"
        "    from .reference import sample\n"
        "    import_module('fastvq.backends.reference')\n"
    )
    names = ("reference", "reference", "reference.sample", "reference.search")
    assert sorted(imports("fastvq.backends.module", path)) == [f"fastvq.backends.{name}" for name in names]


UPWARD = ("data", "models", "modalities", "training", "runs", "demo", "cli")


def test_rooms_import_one_way():
    """A room imports those before it in `UPWARD`, and none after it."""
    found = []
    for level, room in enumerate(UPWARD):
        above = tuple(f"fastvq.{one}." for one in UPWARD[level + 1 :])
        for name, path in modules():
            if name.startswith(f"fastvq.{room}."):
                found += [(name, imported) for imported in imports(name, path) if f"{imported}.".startswith(above)]
    assert not found


# The ops that a backend leaves to another one, and why.
SIGNS = "its codes are vectors of signs: the torch backend computes it from tables of 2^(D/2) entries"
NO_KERNEL = "has no Triton kernel yet: the torch backend serves it on GPUs too"
LEFT_OUT = {
    "native": dict.fromkeys(("binary_assign_forward", "binary_assign_backward"), SIGNS),
    "triton": {
        **dict.fromkeys(("topk_search", "sample", "min_distance_"), NO_KERNEL),
        **dict.fromkeys(("soft_assign_forward", "soft_assign_backward"), NO_KERNEL),
        **dict.fromkeys(("binary_assign_forward", "binary_assign_backward"), SIGNS),
    },
    "torch": {},
    "reference": {},
}


@pytest.mark.parametrize("name", select.BACKENDS)
def test_a_backend_declares_every_op_or_leaves_it_out_by_name(name):
    declared = {s.op for s in select.BACKENDS[name].supports}
    assert set(support.OPS) == set(OPS)
    assert declared | set(LEFT_OUT[name]) == set(OPS)
    assert not declared & set(LEFT_OUT[name])


@pytest.mark.parametrize(
    ("path", "registration", "kernels"),
    [
        ("csrc/cpu/bindings", r"BIND(?:_WHERE)?\(m, (\w+)", native.KERNELS),
        ("csrc/cuda", r'm\.impl\("native_(\w+)"', native.CUDA_KERNELS),
    ],
)
def test_the_bindings_register_what_is_declared(path, registration, kernels):
    source = "".join(file.read_text() for file in (ROOT / path).glob("*.cpp"))
    assert sorted(re.findall(registration, source)) == sorted(kernels)


def test_every_op_has_sample_inputs():
    assert {name for name, *_ in sample_inputs()} == set(OPS)


# Quantizers that take something else than vectors (B, N, dim) alone; their own tests check what the table would.
NOT_IN_EVERY = {
    "BinaryMapper": "it takes logits",
    "EvoLFQ": "it takes genes, an encoder and a decoder",
    "HierarchicalVQ": "it takes a grid of as many positions as its last scale has",
    "StridedResidualVQ": "it returns indices of several lengths",
    "Sequential": "it wraps a quantizer among other modules, and computes nothing itself",
}


def test_every_quantizer_is_in_the_table_of_all():
    found = {innermost(make).__name__ for make, _ in every.QUANTIZERS.values()}
    assert found | set(NOT_IN_EVERY) == set(quantizers.__all__)
    assert not found & set(NOT_IN_EVERY)
    assert set(quantizers.__all__) <= set(fastvq.__all__)


def test_no_two_classes_share_a_name():
    """A name with a leading underscore belongs to its file."""
    homes: dict[str, list[str]] = {}
    for module, path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {"Codebook", "VectorQuantize"} <= set(homes)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
