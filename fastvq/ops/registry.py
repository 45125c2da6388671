"""Registration of ops.

The backend is chosen inside the registered op. torch.compile and torch.export therefore see one opaque node, and a
traced program runs on whatever backend serves the device it meets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor  # noqa: F401  infer_schema resolves annotations in the globals of this module

_library = torch.library.Library("fastvq", "DEF")
_F = TypeVar("_F", bound=Callable[..., Any])


def op(*, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Registers the decorated function as an op and returns a function of its signature that calls the op.

    `native_<name>` gets the same schema, for the compiled library to implement, with an integer for each string: its
    place in METRICS, SOFT_METRICS or GRADIENTS. Libraries built with torch 2.13 leak every string that they are given.
    """

    def register(function: _F) -> _F:
        name = function.__name__
        schemas = {name: torch.library.infer_schema(function, mutates_args=mutates)}
        schemas[f"native_{name}"] = _integer_schema(function, mutates)
        for op_name, schema in schemas.items():
            _library.define(op_name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Without a graph, which would hold every temporary tensor of a search that nothing differentiates.
        run = _without_graph(_bump_versions(function, mutates) if mutates else function)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvq::{name}", fake, lib=_library)
        overload = getattr(torch.ops.fastvq, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            return overload(*args, **kwargs)

        call.__name__, call.__qualname__, call.__doc__ = name, name, function.__doc__
        call.__module__, call.__wrapped__ = function.__module__, function  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return register


def _without_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.no_grad()(function)` at a sixth of its cost, which is felt at every op of a small step."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return run


def _bump_versions(function: Callable[..., Any], mutates: tuple[str, ...]) -> Callable[..., Any]:
    """Autograd counts the writes to a tensor, and refuses a gradient that would need what was there before; kernels
    that write through plain pointers are told of here."""
    places = [list(inspect.signature(function).parameters).index(name) for name in mutates]

    def run(*args: Any, **kwargs: Any) -> Any:
        written = [args[place] for place in places if not args[place].is_inference()]
        before = [tensor._version for tensor in written]
        result = function(*args, **kwargs)
        for tensor, version in zip(written, before, strict=True):
            if tensor._version == version:
                torch.autograd.graph.increment_version(tensor)
        return result

    return run


def _integer_schema(function: Callable[..., Any], mutates: tuple[str, ...]) -> str:
    signature = inspect.signature(function)

    def prototype(*args: Any, **kwargs: Any) -> None: ...

    kept = [
        p.replace(annotation=int, default=p.empty) if p.annotation in (str, "str") else p
        for p in signature.parameters.values()
    ]
    prototype.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    prototype.__module__ = function.__module__
    return torch.library.infer_schema(prototype, mutates_args=mutates)


METRICS = ("l2", "dot")
SOFT_METRICS = ("distance", "l2", "dot")
GRADIENTS = ("ste", "rotation")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
