"""Several processes, or ranks, that train one model together.

They are started by torchrun. All do the same, on parts of the same batches, and hold the same weights and codebooks.
Rank 0 alone writes to the run's folder, draws and prints.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvq import distributed
from fastvq.errors import RanksError

ResultT = TypeVar("ResultT")

_PATIENCE = datetime.timedelta(days=1)
"""Time that a rank waits for another. Rank 0 may decode images or draw for hours; one that dies is noticed at once."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun has started, and part them at the end.

    Raises:
        RanksError: another process has ended.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    except RuntimeError as error:
        # By whichever library connects them: gloo, NCCL or the store of the group.
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error):
            raise RanksError(
                f"rank {distributed.rank()}: another process has ended; start them again, a training with --resume,"
                " to continue from what is saved"
            ) from error
        raise
    dist.destroy_process_group()


def leads() -> bool:
    """Return whether this rank writes, draws and prints: rank 0, or a single process."""
    return distributed.rank() == 0


def alone() -> bool:
    """Return whether there is one process only."""
    return not distributed.active()


def local_device(device: torch.device) -> torch.device:
    """Return the device of this rank: of several GPUs in a machine, one each."""
    if distributed.active() and device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def every_rank_its_own(samples: Tensor) -> Tensor:
    """Return this rank's part of samples (N, ...) whose number the ranks need not divide."""
    return samples[distributed.rank() :: distributed.world_size()]


def wait() -> None:
    """Wait until all ranks are here."""
    if distributed.active():
        dist.barrier()


def rank_0_first(function: Callable[[], ResultT]) -> ResultT:
    """Call a function on rank 0, which fills a cache, and then on the others, which read it."""
    if leads():
        result = function()
        wait()
        return result
    wait()
    return function()


def any_requests(requested: bool) -> bool:
    """Return whether any rank requests something, such as to stop: all must do so after the same step."""
    if not distributed.active():
        return requested
    flag = torch.tensor(requested, dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def collect_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks on rank 0, and by zeros on the others."""
    if distributed.active():
        for tensor in tensors:
            dist.all_reduce(tensor)
            if not leads():
                tensor.zero_()


def sum_over_ranks_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks, on all of them."""
    if distributed.active():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gathered(state: Tensor) -> list[Tensor]:
    """Return a tensor of each rank, on the CPU and of one shape, in their order."""
    if not distributed.active():
        return [state]
    states = [torch.empty_like(state) for _ in range(distributed.world_size())]
    dist.all_gather(states, state)
    return states


def gathered_objects(own: ResultT) -> list[ResultT]:
    """Return an object of each rank, which must survive pickling, in their order."""
    if not distributed.active():
        return [own]
    objects: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(objects, own)
    return objects


class _Call(nn.Module):
    """Module whose forward pass is a method of another one: DDP synchronizes the gradients of forward passes alone."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: object) -> object:
        return getattr(self.module, self.method)(*arguments)


def unsynchronized(call: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the gradients of what `synchronized` returned stay those of this rank."""
    ddp = getattr(call, "_orig_mod", call)
    return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) else contextlib.nullcontext()


def synchronized(module: nn.Module, method: str = "forward") -> Callable[..., Any]:
    """Return a method of a module whose gradients are averaged over the ranks."""
    if not distributed.active():
        return module if method == "forward" else lambda *arguments: getattr(module, method)(*arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
        # Codebooks and their averages are buffers that the ranks update to equal bits themselves.
        return DistributedDataParallel(_Call(module, method), broadcast_buffers=False)
