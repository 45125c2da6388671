"""Adapters: which classes of other projects are known, and what replaces their methods."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.backends.devices import without_float64
from fastvq.errors import first_line

COLLECTIVES = {"all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter"}
"""Names by which the code of a client takes part in a collective, which a trial in one process would not show."""

CLIENT = "_fastvq_client"
"""Attribute of an accelerated class: the client's own class."""


class Call:
    """One call of a trial: a method's name and its arguments, in training mode or not."""

    def __init__(self, method: str, *arguments: Any, training: bool = False, **options: Any) -> None:
        self.method, self.arguments, self.training, self.options = method, arguments, training, options


@dataclass(frozen=True, eq=False)
class ClientAdapter:
    """A class of another project that is recognized, and the methods that replace its own.

    Args:
        project: the project and the version that the tests use.
        classes: names of the class. A subclass with another name is recognized too, unless it overrides a replaced
            method.
        attributes: what an instance must have.
        methods: a class whose functions replace those of the same name.
        trial: returns calls for a copy of the module, whose results must be those of the client's methods.
        refusal: returns why a module cannot be accelerated, or an empty string.
        collectives: names in `COLLECTIVES` that the replaced methods call as the client's do.
    """

    project: str
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    methods: type[nn.Module]
    trial: Callable[[Any], list[Call]]
    refusal: Callable[[Any], str] = lambda module: ""
    collectives: frozenset[str] = frozenset()

    @property
    def replaced(self) -> list[str]:
        """The names of the methods that are replaced."""
        return [name for name, value in vars(self.methods).items() if inspect.isfunction(value)]

    def known_class(self, module: nn.Module) -> type | None:
        """Return the class among those of a module that the adapter names, or None."""
        return next((c for c in type(module).__mro__ if c.__name__ in self.classes and CLIENT not in vars(c)), None)

    def missing(self, module: nn.Module) -> list[str]:
        """Return the attributes that a module lacks."""
        own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
        # Not by hasattr of the module: properties may compute and keep something.
        return [name for name in self.attributes if name not in own and not hasattr(type(module), name)]

    def reason_against(self, module: nn.Module) -> str:
        """Return why the methods cannot replace those of a module of a known class, or an empty string."""
        missing = self.missing(module)
        if missing:
            return f"has no {', '.join(missing)}, unlike the class of {self.project}"
        known = self.known_class(module)
        for name in self.replaced:
            if name in vars(module):
                return f"{name} is replaced on the module itself"
            owner = next((c for c in type(module).__mro__ if name in vars(c)), None)
            if owner is None:
                return f"has no method {name}, unlike the class of {self.project}"
            if known is None or not issubclass(known, owner):
                return f"{owner.__name__} overrides {name}"
            wanted = list(inspect.signature(getattr(self.methods, name)).parameters)
            if list(inspect.signature(getattr(owner, name)).parameters) != wanted:
                return f"{name} takes other arguments than that of {self.project}: {', '.join(wanted[1:])}"
            unknown = (_names(getattr(owner, name)) & COLLECTIVES) - self.collectives
            if unknown:
                return f"{name} calls {', '.join(sorted(unknown))}, unlike that of {self.project}"
        tensors = [*module.parameters(), *module.buffers()]
        for tensor in tensors:
            if tensor.is_meta:
                return "has no values yet: its device is meta"
            if without_float64(tensor.device):
                return without_float64(tensor.device)
        return self.refusal(module) or self._difference(module)

    def _difference(self, module: nn.Module) -> str:
        """Return what the client's methods compute otherwise on random values, or an empty string.

        Forks keep the names of classes and attributes, and change what methods do.
        """
        devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        found = ""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device for device in devices if device.type == "cuda"]))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in {device.type for device in devices}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            for seed in range(_DRAWS):
                torch.manual_seed(seed)
                try:
                    found = self._differs(module, seed)
                except Exception as error:  # a fork may fail in any way
                    found = f"a trial on random values failed: {type(error).__name__}: {first_line(error)}"
                if not found:
                    break
        return found

    def _differs(self, module: nn.Module, seed: int) -> str:
        theirs = _copied(module)
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            if tensor.is_floating_point() and tensor.dim() > 1:
                tensor.data.normal_()
        calls = self.trial(theirs)
        ours = copy.deepcopy(theirs)
        ours.__class__ = accelerated_class(self.methods, type(ours))
        for call in calls:
            outcomes = []
            for one in (theirs, ours):
                torch.manual_seed(seed)
                outcomes.append(_outcome(one.train(call.training), call))
            where = _first_difference(outcomes[0], outcomes[1])
            if where:
                return f"{call.method} gives another result than that of {self.project}: {where}"
        return ""


_DRAWS = 3
"""Number of trials: with random values, two codes may be equally near to a row, up to rounding."""


def accelerated_class(methods: type[nn.Module], client: type[nn.Module]) -> type[nn.Module]:
    """Return the client's class with the methods of an adapter, under the client's name.

    Its instances are pickled as the client's, so that a file can be read without fastvq. Copies stay accelerated.
    """
    if (methods, client) in _MADE:
        return _MADE[methods, client]

    def reduce_ex(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = super(made, self).__reduce_ex__(protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle insists on the object's own class there
            function = object.__new__
        return function, tuple(client if value is made else value for value in arguments), *rest

    def copied(self: Any, state: dict[str, Any]) -> Any:
        new = client.__new__(client)
        new.__setstate__(state)
        new.__class__ = made
        return new

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = client.__new__(client)
        new.__setstate__(copy.deepcopy(vars(self), memo))
        new.__class__ = made
        return new

    names: dict[str, Any] = {
        "__module__": client.__module__,
        "__qualname__": client.__qualname__,
        "__doc__": client.__doc__,
        "__reduce_ex__": reduce_ex,
        "__copy__": lambda self: copied(self, dict(vars(self))),
        "__deepcopy__": deepcopy,
        CLIENT: client,
    }
    made: type[nn.Module] = type(client.__name__, (methods, client), names)
    return _MADE.setdefault((methods, client), made)


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def client_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the client's class of an accelerated module, or None."""
    return vars(type(module)).get(CLIENT)


def is_accelerated(module: object) -> bool:
    """Return whether a method of a module is one of fastvq's."""
    return hasattr(type(module), CLIENT)


def client_globals(module: nn.Module, method: str) -> dict[str, Any]:
    """Return the global names that the client's method sees, among them functions of its project."""
    client: Any = getattr(type(module), CLIENT)
    found: dict[str, Any] = inspect.unwrap(getattr(client, method)).__globals__
    return found


def near(codes: Tensor, number: int = 16) -> Tensor:
    """Return rows (number, D) close to random codes (K, D), whose nearest codes no rounding changes."""
    chosen = codes.detach()[torch.randint(len(codes), (number,), device=codes.device)]
    return chosen + 0.01 * torch.randn_like(chosen)


def noise(module: nn.Module, *shape: int) -> Tensor:
    """Return normal random numbers in the dtype and on the device of a module's weights."""
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    return torch.randn_like(next(tensors).new_empty(shape))


def _copied(module: nn.Module) -> nn.Module:
    """Return a deep copy in float32 or float64; tensors with a history, as weight_norm keeps, are detached."""
    memo: dict[int, Any] = {}
    for one in module.modules():
        for value in vars(one).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(module, memo)
    for buffer in copied.buffers():  # LlamaGen registers a parameter as one, and writes to it
        buffer.requires_grad_(False)
    halves = [t for t in (*copied.parameters(), *copied.buffers()) if t.is_floating_point() and t.itemsize < 4]
    return copied.float() if halves else copied


def _outcome(module: nn.Module, call: Call) -> dict[str, Any]:
    """Return the results of a call, its gradients, and the states of the module and of the generator after it."""
    arguments = [a.detach().clone() if isinstance(a, Tensor) else a for a in call.arguments]
    inputs = [a.requires_grad_() for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    with torch.set_grad_enabled(call.training):
        result = getattr(module, call.method)(*arguments, **call.options)
    sources = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    weighted = [torch.linalg.vector_norm(t + 1) for t in _tensors(result) if t.requires_grad]
    grads = torch.autograd.grad(sum(weighted[1:], weighted[0]), sources, allow_unused=True) if weighted else ()
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return {"result": result, "gradient": grads, "state": state, "draws": torch.random.get_rng_state()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _first_difference(theirs: Any, ours: Any, where: str = "") -> str:
    """Return the place of the first difference between two nested values, or an empty string."""
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return f"{where}: {tuple(theirs.shape)} {theirs.dtype}, not {tuple(ours.shape)} {ours.dtype}"
        if not theirs.is_floating_point():
            return "" if torch.equal(theirs, ours) else where
        size = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        return "" if torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4 * size, equal_nan=True) else where
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        pairs = [(f"{where} {key}".strip(), theirs[key], ours[key]) for key in theirs]
    elif isinstance(theirs, (list, tuple)) and type(theirs) is type(ours) and len(theirs) == len(ours):
        pairs = [(f"{where}[{place}]", *pair) for place, pair in enumerate(zip(theirs, ours, strict=True))]
    elif isinstance(theirs, float) and isinstance(ours, float):
        return "" if abs(theirs - ours) <= 1e-3 * abs(theirs) else where
    else:
        return "" if theirs is ours or (type(theirs) is type(ours) and theirs == ours) else where
    return next((found for found in (_first_difference(a, b, name) for name, a, b in pairs) if found), "")


def _names(function: Any, seen: frozenset[Any] = frozenset()) -> set[str]:
    """Return the names that a function's code uses, and those of the plain functions of its package that it calls."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return set()
    names = _names_in(code)
    called = [one for one in map(function.__globals__.get, names) if inspect.isfunction(one)]
    package = function.__module__.split(".")[0]
    own = [one for one in called if one.__module__.split(".")[0] == package]
    return names.union(*(_names(one, seen | {code}) for one in own))


def _names_in(code: Any) -> set[str]:
    inner = [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return set(code.co_names).union(*map(_names_in, inner))
