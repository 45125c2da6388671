"""Replacement of the quantizers within models of other projects by exact kernels, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fastvq.errors import UnknownQuantizerError, aligned, counted, listed

from .adapter import ClientAdapter, accelerated_class, client_class, is_accelerated
from .registry import ADAPTERS

_QUANTIZER_WORDS = ("quantiz", "quantis", "codebook", "vq", "bottleneckblock")


class Replaced(NamedTuple):
    """A module whose methods are fastvq's."""

    name: str  # of the module within the model, "" for the model itself
    kind: str  # the client's class
    project: str  # and the version that the tests use
    methods: tuple[str, ...]


class Skipped(NamedTuple):
    """A module that is, or looks like, a quantizer and stays as it is."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class AccelerationReport:
    """Result of `accelerate`: what was replaced, and what was not, with reasons."""

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        rows = [(one.name or "(model)", one.kind, ", ".join(one.methods), one.project) for one in self.replaced]
        lines = [f"{counted(len(rows), 'module')} replaced", *aligned(rows)] if rows else ["no module replaced"]
        if self.skipped:
            rows_of_skipped = [(one.name or "(model)", one.kind, one.reason) for one in self.skipped]
            lines += [f"{counted(len(self.skipped), 'module')} skipped", *aligned(rows_of_skipped)]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerationReport:
    """Replace the search of the known quantizers within a model by fastvq's exact kernels, in place.

    Weights, buffers, state-dict keys, signatures, shapes, dtypes, losses and learning stay the client's. A module is
    recognized by the name of its class, its attributes and a trial: on random values the new methods must give what
    its own give, gradients and moving averages included. A copy that computes something else is skipped. A module that
    was accelerated before stays so.

    Args:
        model: any module. docs/accelerate.md lists the projects. On several ranks, call it on each of them.

    Returns:
        the modules that are accelerated now, and those that look like quantizers and are not, with the reason.

    Raises:
        TypeError: model is no module. UnknownQuantizerError: nothing in it is known; the message names what looks like
        a quantizer.

    A non-finite row, whose nearest code is undefined, gets index 0 and takes no part in moving averages. Copies stay
    accelerated; pickles hold the client's classes, so that they load without fastvq. `restore` undoes it.
    """
    _check_module(model)
    places = list(model.named_modules())
    own = {name for name, module in places if _package(module) == "fastvq" and not is_accelerated(module)}
    replaced, skipped = [], []
    holders: set[str] = set()  # of modules that are in the report: they need no mention themselves
    for name, module in reversed(places):  # what a module holds comes before it
        reasons = []
        if name in own:
            reasons = ["is fastvq's own"] if own.isdisjoint(_holders(name)) else []
        elif not is_accelerated(module):
            reasons = _replace(module, is_holder=name in holders)
        if is_accelerated(module):
            adapter = _adapter_of(module)
            replaced.append(Replaced(name, type(module).__name__, adapter.project, tuple(adapter.replaced)))
        elif reasons:
            skipped.append(Skipped(name, type(module).__name__, "; ".join(dict.fromkeys(reasons))))
        else:
            continue
        holders.update(_holders(name))
    if not replaced:
        found = [f"{one.name or '(model)'} ({one.kind}): {one.reason}" for one in reversed(skipped)]
        what = f"; these look like quantizers:{listed(found)}" if found else ""
        raise UnknownQuantizerError(
            f"model: {type(model).__name__} has no quantizer that fastvq knows; docs/accelerate.md lists them{what}"
        )
    return AccelerationReport(tuple(reversed(replaced)), tuple(reversed(skipped)))


def _replace(module: nn.Module, *, is_holder: bool) -> list[str]:
    """Replace the methods of a module if an adapter fits; otherwise return the reasons, none if it is no quantizer.

    A holder of modules in the report has reasons only where an adapter would fit but for them.
    """
    named = [adapter for adapter in ADAPTERS if adapter.known_class(module) is not None]
    fitting = [adapter for adapter in named if not adapter.missing(module)]
    reasons = []
    for adapter in fitting or ([] if is_holder else named):
        reason = adapter.reason_against(module)
        if not reason:
            module.__class__ = accelerated_class(adapter.methods, type(module))
            return []
        reasons.append(reason)
    return ["unknown class"] if not reasons and not is_holder and _looks_like_quantizer(module) else reasons


def restore(model: nn.Module) -> list[str]:
    """Give all modules that `accelerate` has changed their own methods again, and return their names.

    Raises:
        TypeError: model is no module. ValueError: the class of a module has been changed again since, as by a
        parametrization or by fully_shard.
    """
    _check_module(model)
    accelerated = {name: module for name, module in model.named_modules() if is_accelerated(module)}
    changed = [name for name, module in accelerated.items() if client_class(module) is None]
    if changed:
        raise ValueError(
            f"model: the class of {', '.join(changed)} has been changed after accelerate, to"
            f" {type(accelerated[changed[0]]).__name__}; undo that first"
        )
    for module in accelerated.values():
        module.__class__ = client_class(module)
    return list(accelerated)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}")


def _adapter_of(module: nn.Module) -> ClientAdapter:
    return next(adapter for adapter in ADAPTERS if isinstance(module, adapter.methods))


def _holders(name: str) -> list[str]:
    """Return the names of the modules that hold the one of this name, the model included."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts))]


def _package(module: nn.Module) -> str:
    return type(module).__module__.split(".")[0]


def _looks_like_quantizer(module: nn.Module) -> bool:
    return _package(module) != "torch" and any(word in type(module).__name__.lower() for word in _QUANTIZER_WORDS)
