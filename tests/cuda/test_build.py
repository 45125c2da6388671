"""What nvcc makes of csrc/cuda, without a GPU: no spills, room on each device, a library that loads, instructions."""

from __future__ import annotations

import collections
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
"""Of the scans; longer rows are left to `define`."""


def load_build():
    spec = importlib.util.spec_from_file_location("fastvq_cuda_build", CSRC / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda = load_build()
pytestmark = pytest.mark.skipif(
    cuda.find_nvcc() is None, reason="no nvcc (CUDA_HOME, CUDA_PATH or PATH): the CUDA kernels aren't compiled here"
)


@pytest.fixture(scope="module")
def library():
    """Built as setup.py builds it, warnings, spills and local memory being errors."""
    cuda.build(OUT, Path(torch.__file__).parent, "g++")
    return OUT / cuda.LIBRARY


def plain(mangled):
    """scan_cores<8> for its mangled name."""
    found = re.match(r"_ZN6fastvq4cuda(\d+)", mangled)
    name = mangled[found.end() :]
    kernel, rest = name[: int(found[1])], name[int(found[1]) :]
    numbers = re.match(r"I((?:Li\d+E)+)E", rest)
    return kernel + ("<" + ", ".join(re.findall(r"Li(\d+)E", numbers[1])) + ">" if numbers else "")


def needs():
    """Threads and shared memory of each kernel for the longest rows that it takes."""
    done = subprocess.run(
        [str(emulation.program())],
        input=b"need" + Call("").integers(LARGEST_DIM).sent[0],
        capture_output=True,
        check=True,
    )
    lines = (line.rsplit(" ", 2) for line in done.stdout.decode().splitlines())
    return {kernel: (int(threads), int(shared)) for kernel, threads, shared in lines}


def test_every_kernel_fits_every_device(library):
    limits, seen = needs(), collections.defaultdict(set)
    print(f"{'kernel':24} {'device':7} registers  shared bytes, D={LARGEST_DIM}  blocks of a processor")
    for entry in cuda.resources(OUT):
        kernel, device = plain(entry["name"]), entry["arch"]
        threads, shared = limits[kernel]
        block_shared, all_shared, registers, warps = DEVICES[device]
        own = -(-int(entry["registers"]) // 8) * 8 * threads
        blocks = min(registers // own, all_shared // (shared + 1024), warps // (threads // 32), 32)
        print(f"{kernel:24} {device:7} {entry['registers']:>9}  {shared:>20}  {blocks:>21}")
        assert (entry["stack"], entry["stores"], entry["loads"]) == ("0", "0", "0"), (kernel, device)
        # A scan that has no room for so many columns is passed over (csrc/cuda/search.cuh).
        assert shared <= block_shared or kernel in ("scan_matrix<1, 2, 64>", "scan_matrix<2, 1, 32>"), (kernel, device)
        assert blocks >= 1 or shared > block_shared
        seen[device].add(kernel)
    assert set(seen) == set(DEVICES)
    for kernels in seen.values():
        assert kernels == set(limits)


LOADS = """
import json, sys
import torch, fastvq
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = ("search", "residual_search", "accumulate", "ema_update_")
print(json.dumps({op: has(f"fastvq::native_{op}", "CUDA") for op in ops}))
x = torch.randn(9, 4)
assert torch.equal(fastvq.search(x, x), torch.arange(9))
"""


def test_it_loads_and_serves_cuda_beside_a_torch_without(library):
    done = subprocess.run([sys.executable, "-c", LOADS, str(library)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(("search", "residual_search", "accumulate", "ema_update_"), True)


def instructions(library, device):
    """Of each scan the innermost loop that multiplies: how often each instruction stands there."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    from fastvq.kernels.assembly import natural_loops, read_sass

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(cuobjdump), "-sass", "-arch", device, str(OUT / "search.cu.o")]
    listing = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    for part in re.split(r"\n\s+Function : ", listing)[1:]:
        kernel = plain(part.split("\n", 1)[0].strip())
        if not kernel.startswith("scan_"):
            continue
        program = read_sass(part)
        multiplies = re.compile("FFMA" if kernel.startswith("scan_cores") else "HMMA")
        for loop in sorted(natural_loops(program), key=len):
            if any(multiplies.match(program[place].name) for place in loop):
                yield kernel, collections.Counter(program[place].name.split(".")[0] for place in loop)
                break


# ALU instructions a distance that a scan's innermost loop may have at most, on H100 and on B200.
MOST = {"scan_cores<4>": (5.2, 2.7), "scan_cores<8>": (9.2, 4.7), "scan_cores<16>": (17.3, 8.7)}
MOST |= {"scan_matrix<1, 2, 32>": (3.5, 2.8), "scan_matrix<1, 2, 64>": (3.6, 2.6)}


@pytest.mark.parametrize("device", ["sm_90a", "sm_100"])
def test_instructions_a_distance(library, device):
    """Sums of the cores' scan are D multiply-adds of a distance each, or half as many of two. A step of the matrix scan
    takes 64 codes to two blocks of 16 rows: 64 distances a lane. The published counts: flash-kmeans 6 to 7."""
    from fastvq.kernels.assembly import ALU, HALF_RATE

    seen = set()
    for kernel, counts in instructions(library, device):
        if kernel.startswith("scan_cores"):
            columns = int(kernel[len("scan_cores<") : -1])
            distances = (counts["FFMA"] + 2 * counts["FFMA2"]) / columns
        elif kernel.startswith("scan_matrix<1, 2"):
            distances = 64
        else:
            continue
        alu = sum(count for name, count in counts.items() if name in ALU) / distances
        half = sum(count for name, count in counts.items() if name in HALF_RATE) / distances
        print(f"{kernel:24} {device:7} {alu:5.2f} ALU instructions a distance, {half:4.2f} of them at half rate")
        assert alu <= MOST[kernel][device == "sm_100"], kernel
        seen.add(kernel)
    assert seen == set(MOST)
    packed = any(counts["FFMA2"] for _, counts in instructions(library, device))
    assert packed == (device == "sm_100")
