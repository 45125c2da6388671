"""The CUDA kernels on the CPU: builds the program that runs them in the emulator, and speaks with it."""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc" / "cuda"
CXX = ("g++", "clang++")
# Nothing is fused but by name. On the device nvcc may fuse any other product and sum as well: the variant "fused" does,
# wherever the compiler finds a pair.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
FLAGS += ["-Wno-unknown-pragmas", "-DFASTVQ_EMULATED"]
VARIANTS = {
    "plain": ["-O1"],
    "fused": ["-O2", "-ffp-contract=fast"],
    "address": ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DBOOST_USE_ASAN"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-DFASTVQ_DIGIT_BITS=2"],
}
ORDERS = ("forward", "reverse", "shuffled")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


class Failed(Exception):
    """The program ended with an error; its message is what it said."""


@functools.cache
def missing() -> str:
    """Return what the emulator needs and this machine lacks, empty if nothing."""
    cxx = next(filter(shutil.which, CXX), None)
    if cxx is None:
        return f"needs a C++ compiler: {' or '.join(CXX)}"
    source = "#include <boost/context/fiber.hpp>\nint main() { return static_cast<int>(static_cast<_Float16>(0.0f)); }"
    done = subprocess.run(
        [cxx, "-x", "c++", "-std=c++17", "-", "-lboost_context", "-o", "/dev/null"],
        input=source, text=True, capture_output=True,
    )  # fmt: skip
    return (
        "" if done.returncode == 0 else f"needs Boost.Context and _Float16 of {cxx}: apt install libboost-context-dev"
    )


def machine_flags() -> list[str]:
    """Without hardware fused multiply-adds and float16 the emulator is several times slower."""
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    return ["-mfma", "-mf16c"] if " fma" in known and " f16c" in known else []


_directories: list[tempfile.TemporaryDirectory] = []


def scratch() -> Path:
    """Return a directory that exists until Python ends."""
    _directories.append(tempfile.TemporaryDirectory(prefix="fastvq-cuda-"))
    return Path(_directories[-1].name)


def build(variant: str, kernels: Path = CSRC) -> Path:
    """Build the program, by default from the kernels of the repository."""
    cxx = next(filter(shutil.which, CXX))
    program = scratch() / "emulate"
    command = [
        cxx,
        *FLAGS,
        *VARIANTS[variant],
        *machine_flags(),
        f"-I{kernels}",
        f"-I{HERE}",
        str(HERE / "emulate.cpp"),
    ]
    done = subprocess.run([*command, "-lboost_context", "-pthread", "-o", str(program)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return program


@functools.cache
def program(variant: str = "plain") -> Path:
    if missing():
        pytest.skip(missing())
    return build(variant)


@dataclass
class Call:
    """One call of the program: what it is sent, and the results that it returns."""

    op: str
    sent: list[bytes] = field(default_factory=list)
    results: list[tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=list)

    def integers(self, *values: int) -> Call:
        self.sent.append(struct.pack(f"={len(values)}q", *values))
        return self

    def numbers(self, *values: float) -> Call:
        self.sent.append(struct.pack(f"={len(values)}d", *values))
        return self

    def text(self, text: str) -> Call:
        self.integers(len(text)).sent.append(text.encode())
        return self

    def tensor(self, tensor: Tensor, *, typed: bool = False) -> Call:
        """`typed`: its element type goes first."""
        if typed:
            self.integers(DTYPES[tensor.dtype])
        self.sent.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return self

    def returns(self, dtype: torch.dtype, *shape: int) -> Call:
        self.results.append((dtype, shape))
        return self


def run(
    calls: Iterable[Call], *, order: str = "forward", seed: int = 0, processors: int = 3, unit: str = "rounding",
    shared: int = 99 << 10, by: Path | None = None, mutant: int = 0, timeout: float = 300,
) -> list[list[Tensor]]:  # fmt: skip
    """Return the results of each call.

    Raises:
        Failed: the emulator or a sanitizer reported an error.
    """
    calls = list(calls)
    sent = b"".join(call.op.encode() + b"".join(call.sent) for call in calls)
    command = [str(by or program()), order, str(seed), str(processors), unit, str(shared)]
    done = subprocess.run(
        command, input=sent, capture_output=True, timeout=timeout, env=os.environ | {"FASTVQ_MUTANT": str(mutant)}
    )
    if done.returncode:
        raise Failed(f"status {done.returncode}: {done.stderr.decode(errors='replace')[:4000]}")
    at, answers = 0, []
    for call in calls:
        answer = []
        for dtype, shape in call.results:
            count = torch.Size(shape).numel() * dtype.itemsize
            part = bytearray(done.stdout[at : at + count])
            answer.append(torch.frombuffer(part, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype))
            at += count
        answers.append(answer)
    assert at == len(done.stdout), "the program has written more, or less, than it was asked for"
    return answers


def accumulate(x: Tensor, indices: Tensor, size: int) -> Call:
    n, dim = x.shape
    call = Call("accu").integers(n, dim, size).tensor(x, typed=True).tensor(indices)
    return call.returns(torch.float32, size).returns(torch.float32, size, dim)


def ema_update(*tensors: Tensor, decay: float, eps: float, weight: Tensor | None = None) -> Call:
    call = Call("ema_").integers(*tensors[0].shape).numbers(decay, eps)
    for tensor in tensors:
        call.tensor(tensor)
    call.integers(weight is not None)
    if weight is not None:
        call.tensor(weight)
    for tensor in tensors[:3]:
        call.returns(torch.float32, *tensor.shape)
    return call


def min_distance(distances: Tensor, x: Tensor, codes: Tensor) -> Call:
    call = Call("mind").integers(x.shape[0], *codes.shape).tensor(distances)
    return call.tensor(x, typed=True).tensor(codes, typed=True).returns(torch.float32, x.shape[0])


def search(x: Tensor, codebook: Tensor, metric: str = "l2", path: str = "automatic") -> Call:
    """Return the indices, and the number of uncertified rows after each of two scans, -1 without one.

    Where nothing is packed for few rows, the first number is that of the slices that hold a code, for all rows. `path`
    names the kernels that the search is forced through; "three_products" is "matrix" without its first scan.
    """
    heads = x.shape[0] if x.dim() == 3 else 1
    call = Call("sear").integers(heads, x.shape[-2], *codebook.shape[-2:], int(metric == "dot")).text(path)
    call.tensor(x, typed=True).tensor(codebook, typed=True)
    return call.returns(torch.int64, *x.shape[:-1]).returns(torch.int64, 2)


def residual_search(x: Tensor, codebooks: Tensor, path: str = "automatic") -> Call:
    stages, size, dim = codebooks.shape
    call = Call("resi").integers(stages, x.shape[0], size, dim).text(path)
    return call.tensor(x, typed=True).tensor(codebooks, typed=True).returns(torch.int64, x.shape[0], stages)
