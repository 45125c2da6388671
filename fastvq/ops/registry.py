"""Registration of ops.

An op `search` is three ops of torch:

    fastvq::search         what users call, and what torch.compile and torch.export see as one opaque node
    fastvq::native_search  the compiled library's kernel
    fastvq::select_search  the choice of a backend in Python, where it may be reached from the library

On the CPU the library implements the first one too and calls the third one while a backend is requested that is not its
own; elsewhere, and before the library is loaded, the first one is the choice in Python. A traced program therefore
runs on whatever backend serves the device it meets and is requested when it runs.

Options are integers in the schemas, numbered in fastvq/backends/support.py: libraries built with torch 2.13 leak every
string that they are given.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor  # noqa: F401  infer_schema resolves annotations in the globals of this module

_library = torch.library.Library("fastvq", "DEF")
_F = TypeVar("_F", bound=Callable[..., Any])


def op(*, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Register the decorated function `_name` as the op `name` and return the op.

    The function checks its arguments and calls the backend that serves them. Its public counterpart, which has the
    strings and the documentation, calls the op and explains its errors by `explain`.

    Args:
        fake: computes the shapes and dtypes of the results.
        mutates: the arguments that the op writes to. Kernels write through plain pointers, which autograd does not see:
            the public function counts the writes, by `torch.autograd.graph.increment_version`. In compiled programs
            torch counts them.
    """

    def register(function: _F) -> _F:
        name = function.__name__.removeprefix("_")
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        # Without a graph, which would hold every temporary tensor of a search that nothing differentiates.
        run = _without_graph(function)
        for prefix in ("", "native_", "select_"):
            _library.define(prefix + name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            # No op has a gradient of its own: the functions of fastvq.functional have. Without this line torch would
            # return tensors that require one and fail in the backward pass.
            _library.impl(prefix + name, torch.library.fallthrough_kernel, "Autograd")
        _library.impl(name, run, "CompositeExplicitAutograd")
        _library.impl(f"select_{name}", _keep_error(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvq::{name}", fake, lib=_library)
        if "Tensor[]" in schema:
            _library.impl(name, _one_by_one(name), "FuncTorchBatched", with_keyset=True)
        return getattr(torch.ops.fastvq, name).default

    return register


def define(schema: str) -> None:
    """Define an op that only a compiled library has; as those of `op`, it has no gradient."""
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def option(numbers: dict[str, int], number: int) -> str:
    """Return the name of an option.

    Raises:
        ValueError: there is none with this number.
    """
    for name, its_number in numbers.items():
        if its_number == number:
            return name
    raise ValueError(f"no option has the number {number}; {', '.join(f'{n} is {i}' for n, i in numbers.items())}")


def explain(error: Exception, check: Callable[..., None], *arguments: Any) -> Exception:
    """Return the exception to raise in place of one that an op has raised.

    That is the exception of the Python code behind the compiled library, of which only the message comes through; else
    that of `check(*arguments)`, which names the argument at fault; else `error` itself.
    """
    kept = getattr(_kept, "error", None)
    _kept.error = None
    if kept is not None and str(kept) and str(error).endswith((str(kept), LOST)):
        return kept
    if str(error).startswith("fastvq::"):  # the schema refuses an argument, which the message names
        return TypeError(str(error).partition("\n")[0])
    try:
        check(*arguments)
    except Exception as named:
        return named
    return error


LOST = "has failed behind the library"
"""The end of the library's message where its torch does not tell the message of the Python code."""

_kept = threading.local()


def _keep_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an exception for `explain`: an exception does not pass through the library's C interface."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            _kept.error = copy.copy(error)  # without its traceback, which holds the tensors of the call
            raise

    return run


def _one_by_one(name: str) -> Callable[..., Any]:
    """Return the vmap rule of an op that takes a list of tensors: one call for each sample.

    Other ops have torch's fallback, which does the same. `torch.library.register_vmap` takes no op with a tensor among
    its keyword arguments, so this uses the functions that it is made of.
    """

    def rule(_: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._functorch.autograd_function import unwrap_batched
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
        from torch._functorch.vmap import _add_batch_dim

        interpreter: Any = retrieve_current_functorch_interpreter()
        given, places = unwrap_batched((args, kwargs), interpreter.level())
        values, structure = pytree.tree_flatten(given)
        places = pytree.tree_leaves(places)
        call = getattr(torch.ops.fastvq, name).default

        def sample(row: int) -> Any:
            own = [value if at is None else value.select(at, row) for value, at in zip(values, places, strict=True)]
            own_args, own_kwargs = pytree.tree_unflatten(own, structure)
            return call(*own_args, **own_kwargs)

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
            results = [sample(row) for row in range(interpreter.batch_size())]
            stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *results)
        return pytree.tree_map(lambda result: _add_batch_dim(result, 0, interpreter.level()), stacked)

    return rule


def _without_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function without recording a graph: `torch.no_grad()(function)` at a sixth of its cost."""

    def run(*args: Any, **kwargs: Any) -> Any:
        recording = torch.is_grad_enabled()
        if recording:
            torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            if recording:
                torch._C._set_grad_enabled(True)

    return run
