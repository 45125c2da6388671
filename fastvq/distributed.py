"""The run-time circumstances of a step: several ranks, and forward passes that a backward pass recomputes.

Both are queried at every use. A sum over ranks is one all-reduce of one packed buffer, so that every rank holds the
same bits afterwards.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Internal to torch. Without it, `may_be_recomputed` is always True.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def recomputing() -> bool:
    """Return whether a backward pass runs in this thread.

    A forward pass is then a recomputation by activation checkpointing.
    """
    # Dynamo traces checkpointing as a whole, and must not see it change state.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Return whether activation checkpointing may run this forward pass: for the first time, or again.

    The first pass runs without gradients (reentrant) or with hooks on the tensors that autograd saves (not reentrant).
    """
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled() or _top_hooks is None:
        return True
    return _top_hooks(False) is not None or torch._C._current_graph_task_id() != -1


def active() -> bool:
    """Return whether a default process group of more than one rank exists now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if active() else 0


def share(count: int) -> slice:
    """Return this rank's part of `count` rows, which the number of ranks divides."""
    size = count // world_size()
    return slice(rank() * size, (rank() + 1) * size)


def sum_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks, in one all-reduce.

    The tensors have one dtype, and are on one device.
    """
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0])
        return
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(packed)
    for tensor, part in zip(tensors, packed.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total / world_size()


def mean(x: Tensor) -> Tensor:
    """Return the mean of x over the ranks, or x itself in one process.

    It is differentiable: the gradient is that of the sum of all ranks' losses, which DDP's averaging of parameter
    gradients turns into that of their mean.
    """
    return _Mean.apply(x) if active() else x


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.parameters


def tie_parameters(module: nn.Module, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the results of a training step, whose backward pass reaches every parameter of the module under DDP.

    A parameter that took no part, as those of stages that quantize dropout leaves out, gets no gradient from this. DDP
    waits for each parameter of a backward pass and otherwise fails in the next step, unless it has been told to search
    for unused ones. Without DDP the results are returned as they are.
    """
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or ddp.find_unused_parameters or ddp.static_graph or torch.compiler.is_compiling():
        return results
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not (parameters and module.training and torch.is_grad_enabled()):
        return results
    return tuple(
        _Tie.apply(result, *parameters) if isinstance(result, Tensor) and result.is_floating_point() else result
        for result in results
    )


class _Common:
    """Random integers that are equal on all ranks: a function of what rank 0 has drawn once, and of their number."""

    def __init__(self, start: int = -1, drawn: int = 0, group: Any = None) -> None:
        self.start, self.drawn, self.group = start, drawn, group

    def next(self, limit: int) -> int:
        if self.group is not dist.group.WORLD and self.group is not None:
            self.start = -1  # another group: others may have drawn elsewhere
        self.group = dist.group.WORLD
        if self.start < 0:
            start = torch.randint(2**62, ())
            if dist.get_backend() == "nccl":
                start = start.cuda()
            dist.broadcast(start, src=0)
            self.start, self.drawn = int(start), 0
        self.drawn += 1
        return random.Random(f"{self.start}/{self.drawn}").randrange(limit)


_common = _Common()
_drawn: dict[int, int] = {}
DRAWN_KEPT = 256


def common_seed(limit: int = 10_000) -> int:
    """Return a random integer in [0, limit), equal on all ranks if all call this equally often.

    One process draws it from torch's generator. Several draw from a sequence that rank 0 seeds: the first call is a
    broadcast, the others don't communicate; `common_state` is its state. If activation checkpointing resets torch's
    generator to repeat a forward pass, the numbers repeat too.
    """
    if not active():
        return int(torch.randint(limit, ()))
    key = int(torch.randint(2**62, ()))
    if not (recomputing() and key in _drawn):
        _drawn[key] = _common.next(limit)
        if len(_drawn) > DRAWN_KEPT:
            del _drawn[next(iter(_drawn))]
    return _drawn[key]


def common_state() -> Tensor:
    """Return the state (2,) int64 of the sequence of `common_seed`, which is equal on all ranks."""
    return torch.tensor([_common.start, _common.drawn])


def set_common_state(state: Tensor) -> None:
    """Continue the sequence of `common_seed` from a state; every rank must do so."""
    _common.start, _common.drawn = map(int, state)
    _common.group = dist.group.WORLD


def check_synchronized(module: nn.Module) -> None:
    """Check that the module's state_dict is bit-identical on all ranks.

    It waits for the device, so call it in tests, or rarely in training. In one process it does nothing.

    Raises:
        RuntimeError: on every rank, with the names of the tensors that differ.
    """
    if not active():
        return
    named = [
        (name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor) and value.numel()
    ]
    sums = torch.stack([checksum(value) for _, value in named])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    differing = [name for (name, _), same in zip(named, (low == high).tolist(), strict=True) if not same]
    if differing:
        raise RuntimeError(f"ranks differ in {', '.join(differing)}")


def checksum(tensor: Tensor) -> Tensor:
    """Return a checksum () int64 of the tensor's bits and their positions."""
    tensor = tensor.detach().contiguous().flatten()
    data = tensor.view(torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8).long()
    # Odd factors, so that no single difference can vanish. int64 arithmetic wraps on every device.
    factors = (torch.arange(len(data), device=data.device) * 0x1E3779B97F4A7C15) | 1
    return (data * factors).sum()
