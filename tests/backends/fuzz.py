"""Random calls of native ops that fit nothing, in a process of their own: `python -m tests.backends.fuzz SEED COUNT`.

It prints the number of calls that were refused. A call that ends the process fails the test that started it.
"""

from __future__ import annotations

import random
import sys

import torch

from fastvq.backends import native

from .test_native import CALLS

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.cfloat,
)
SIZES = (0, 1, 2, 3, 5, 7, 33)
NUMBERS = (-1, 0, 1, 2, 7, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63))
REALS = (-1.0, 0.0, 1e-300, 0.5, 1.0, 1e300, float("inf"), float("-inf"), float("nan"))
REFUSED = (RuntimeError, ValueError, TypeError, IndexError, MemoryError)


def tensor(choose: random.Random) -> torch.Tensor:
    """Return a tensor of any shape, dtype, strides, layout and values."""
    shape = [choose.choice(SIZES) for _ in range(choose.choice((0, 1, 1, 2, 2, 2, 3, 3, 4)))]
    dtype = choose.choice(DTYPES)
    made = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(choose.randrange(1 << 30)))
    made = (made * choose.choice((1, 100, 1e18))).to(dtype)
    kind = choose.randrange(12)
    if kind == 0 and made.dim() > 1:
        return made.transpose(0, 1)
    if kind == 1:
        return made.as_strided(made.shape, [0] * made.dim())
    if kind == 2 and made.dim():
        return torch.stack([made, made], -1)[..., 1]
    if kind == 3 and made.dim():
        return made[::2]
    if kind == 4:
        return torch.empty_strided(made.shape, made.stride(), dtype=dtype, device="meta")
    if kind == 5 and dtype is torch.float32 and made.dim() == 2:
        return made.to_sparse()
    if kind == 6 and dtype is torch.float32:
        return torch.nn.Parameter(made)
    if kind == 7 and dtype is torch.float32:
        return torch._neg_view(made)
    return made


def changed(value: object, choose: random.Random) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choose.choice(NUMBERS)
    if isinstance(value, float):
        return choose.choice(REALS)
    if isinstance(value, list) and value:
        place = choose.randrange(len(value))
        return [*value[:place], changed(value[place], choose), *value[place + 1 :]][choose.randrange(2) :]
    if value is None or isinstance(value, list) or choose.random() < 0.5:
        return tensor(choose)
    assert isinstance(value, torch.Tensor)
    if value.dtype is torch.int64 and choose.random() < 0.5:
        return torch.full_like(value, choose.choice(NUMBERS))
    axis = choose.randrange(max(1, value.dim()))
    other = value.repeat_interleave(choose.choice((0, 1, 2, 3)), axis) if value.dim() else value[None]
    return other.to(choose.choice(DTYPES)) if choose.random() < 0.3 else other


def main(seed: int, count: int) -> int:
    assert native.instruction_set()
    choose, refused = random.Random(seed), 0
    for _ in range(count):
        name = choose.choice(sorted(CALLS))
        arguments, options = list(CALLS[name][0]), dict(CALLS[name][1])
        places = [*range(len(arguments)), *options]
        for place in choose.sample(places, choose.choice((1, 1, 2, 3))):
            held = arguments if isinstance(place, int) else options
            held[place] = changed(held[place], choose)  # type: ignore[index]
        if choose.random() < 0.1:  # two arguments that are one
            arguments[choose.randrange(len(arguments))] = arguments[choose.randrange(len(arguments))]
        copies = [a.clone() if isinstance(a, torch.Tensor) and choose.random() < 0.3 else a for a in arguments]
        if name in ("accumulate",) and isinstance(copies[2], int) and copies[2] > 1 << 20:
            copies[2] = min(copies[2], 1 << 22)  # as much memory as is asked for is no fault
        op = getattr(torch.ops.fastvq, choose.choice(("native_", "")) + name)
        try:
            op(*copies, **options)
        except REFUSED:
            refused += 1
    return refused


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main(int(sys.argv[1]), int(sys.argv[2])))
