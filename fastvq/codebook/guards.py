"""A guard of compiled graphs on a tensor's value, for the flag that says whether a codebook waits for k-means.

A compiled graph takes one way through the code and guards what decided it, but never the values of tensors. Here Dynamo
is given one more condition, in Python, for each codebook. It has no public interface for that: where a version of torch
lacks what is used here, a warning says what compiled layers then don't see.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch


def guard_ready(context: Any) -> None:
    """Add the guard to the graph that Dynamo traces, for the codebook that is called `self` there.

    Args:
        context: the `ComptimeContext` of `torch._dynamo.comptime`.
    """
    try:
        codebook = context.get_local("self")._ComptimeVar__variable
        codebook.value.ready(to_guard=True)  # the answer that the graph will be for
        torch._dynamo.guards.install_guard(codebook.source.make_guard(_add_guard))
    except (AttributeError, TypeError) as error:
        _warn(error)


def _add_guard(builder: Any, guard: Any) -> None:
    try:
        guarded: set[str] = builder.__dict__.setdefault("_fastvq_guarded", set())
        if guard.name in guarded:
            return
        guarded.add(guard.name)
        ready = builder.get(guard).ready(to_guard=True)
        add, text = builder.get_guard_manager(guard).add_lambda_guard, [f"{guard.name}.ready() is {ready}"]

        def check(codebook: Any) -> bool:
            return codebook.ready(to_guard=True) == ready

        try:
            add(check, text, None)
        except TypeError:  # before torch 2.10, without the third argument
            add(check, text)
    except (AttributeError, TypeError) as error:
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"initted: torch {torch.__version__} has other guards than expected ({error}), so that a compiled layer does"
        " not see what is written to this tensor: call reinitialize_() of the layer",
        stacklevel=2,
    )
