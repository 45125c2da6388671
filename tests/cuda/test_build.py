"""The compiled code of csrc/cuda, without a GPU: no spills, room on each device, a library that loads, instructions."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvq.backends.native import CUDA_KERNELS
from fastvq.bench import cuda_model

from . import emulation
from .emulation import CSRC, Call

ROOT = CSRC.parent.parent
OUT = ROOT / "build" / "cuda"
# Bytes of shared memory that a block may have and that a processor has, its registers and warps. CUDA C++ Programming
# Guide, technical specifications by compute capability.
DEVICES = {
    "sm_80": (163 << 10, 164 << 10, 65536, 64),
    "sm_90a": (227 << 10, 228 << 10, 65536, 64),
    "sm_100": (227 << 10, 228 << 10, 65536, 64),
}
LARGEST_DIM = 512
"""Longest rows that stay in shared memory on each of these; longer ones are streamed."""


def load(name):
    spec = importlib.util.spec_from_file_location(f"fastvq_cuda_{name}", CSRC / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda, counts = load("build"), load("counts")
pytestmark = pytest.mark.skipif(
    cuda.find_nvcc() is None, reason="no nvcc (CUDA_HOME, CUDA_PATH or PATH): the CUDA kernels aren't compiled here"
)


@pytest.fixture(scope="module")
def library():
    """Built as setup.py builds it, warnings, spills and local memory being errors."""
    cuda.build(OUT, Path(torch.__file__).parent, "g++")
    return OUT / cuda.LIBRARY


def answer(op, columns=LARGEST_DIM):
    """Return the two numbers that the emulator's program prints for each kernel."""
    done = subprocess.run(
        [str(emulation.program())],
        input=op.encode() + (Call("").integers(columns).sent[0] if op == "need" else b""),
        capture_output=True,
        check=True,
    )
    lines = (line.rsplit(" ", 2) for line in done.stdout.decode().splitlines())
    return {kernel: (int(first), int(second)) for kernel, first, second in lines}


def test_every_kernel_fits_every_device(library):
    limits, seen = answer("need"), collections.defaultdict(set)
    print(f"{'kernel':24} {'device':7} registers  shared bytes, D={LARGEST_DIM}  blocks of a processor")
    for entry in cuda.resources(OUT):
        kernel, device = counts.plain(entry["name"]), entry["arch"]
        threads, shared = limits[kernel]
        block_shared, all_shared, registers, warps = DEVICES[device]
        own = -(-int(entry["registers"]) // 8) * 8 * threads
        blocks = min(registers // own, all_shared // (shared + 1024), warps // (threads // 32), 32)
        print(f"{kernel:24} {device:7} {entry['registers']:>9}  {shared:>20}  {blocks:>21}")
        assert (entry["stack"], entry["stores"], entry["loads"]) == ("0", "0", "0"), (kernel, device)
        assert shared <= block_shared, (kernel, device)
        assert blocks >= 1
        seen[device].add(kernel)
    assert set(seen) == set(DEVICES)
    for kernels in seen.values():
        assert kernels == set(limits)


LOADS = """
import ctypes, json, sys
import torch, fastvq
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
from fastvq.backends.native import CUDA_KERNELS
print(json.dumps({op: has(f"fastvq::native_{op}", "CUDA") for op in CUDA_KERNELS}))
library = ctypes.CDLL(sys.argv[1])
library.fastvq_cuda_unfit.restype = ctypes.c_char_p
if not torch.cuda.is_available():  # CUDA 0.0 is no driver at all
    said = library.fastvq_cuda_unfit().decode()
    assert said.startswith("they were built with CUDA ") and said.endswith(" for CUDA 0.0"), said
x = torch.randn(9, 4)
assert torch.equal(fastvq.search(x, x), torch.arange(9))
"""


def test_it_loads_and_serves_cuda_beside_a_torch_without(library):
    done = subprocess.run([sys.executable, "-c", LOADS, str(library)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(CUDA_KERNELS, True)


def test_the_counts_are_those_of_this_code(library):
    """`fastvq bench --model` predicts from these: instructions a distance, and the limits and tiles of the source."""
    if counts.find_cuobjdump(cuda.find_nvcc()) is None:
        pytest.skip("no cuobjdump: of nvcc's toolkit, in PATH, or Triton's")
    stored, found = json.loads(counts.COUNTS.read_text()), counts.document(OUT)
    assert counts.differences(stored, found) == []
    tiles = answer("tile")
    for record in found["records"]:
        assert (record["rows"], record["group"]) == tiles[record["kernel"]]
    assert {record["kernel"] for record in found["records"]} == set(tiles)
    for columns, record in itertools.product((64, 192, 1024), found["records"]):
        if record["products"]:
            room = record["step"] if record["where"] == "registers" else columns
            assert cuda_model.shared_bytes(record, room) == answer("need", room)[record["kernel"]][1], record["kernel"]
    for record in found["records"]:
        # A distance on CUDA cores is D multiply-adds, two of them an instruction on sm_100.
        if record["products"] == 0:
            assert record["float32"] == record["step"]
            assert (record["alu"] < record["float32"]) == (record["target"] == "sm_100")


def test_counts_that_moved_are_named():
    stored = json.loads(counts.COUNTS.read_text())
    found = json.loads(counts.COUNTS.read_text())
    first, second, *_ = found["records"]
    assert counts.differences(stored, found) == []
    first["alu"] *= 1.05
    assert counts.differences(stored, found) == []
    first["alu"] *= 1.2
    second["rows"] += 1
    found["records"].pop()
    found["limits"]["cores_dim"] = 8
    said = counts.differences(stored, found)
    assert len(said) == 4
    for part in (
        f"{first['kernel']} {first['target']}: alu is",
        "rows is",
        "is only in cuda_counts.json",
        "cores_dim: is 8",
    ):
        assert any(part in line for line in said), part


def test_a_limit_that_is_gone_from_the_source(monkeypatch):
    monkeypatch.setitem(counts.LIMITS, "cores_dim", ("search.cuh", "CORES_DIMENSIONS"))
    with pytest.raises(ValueError, match=r"search\.cuh: no longer says CORES_DIMENSIONS"):
        counts.limit("cores_dim")
