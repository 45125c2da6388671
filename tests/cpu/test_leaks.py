"""Memory that calls leave behind: none.

torch 2.13's stable ABI leaks a std::string for each string argument of an op, which let a training grow by gigabytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.backends import native

from .heap import CALLS, layers

ROOT = Path(__file__).parents[2]
STAYS = 16  # bytes a call; one leaked std::string takes 48

native_only = pytest.mark.skipif(not native.build_record()["built"], reason="the native library isn't built")


def run(*arguments: str, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_native_ops_take_no_strings():
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastvq::native_")]
    assert len(schemas) > 10
    assert not [str(s) for s in schemas for argument in (*s.arguments, *s.returns) if "str" in str(argument.type)]


@native_only
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs mallinfo2 of glibc 2.33")
@pytest.mark.parametrize("kind", ["ops", "layers"])
def test_the_heap_does_not_grow(kind):
    grown = json.loads(run("-m", "tests.cpu.heap", "growth", kind))
    assert len(grown) > 40
    assert not {name: size for name, size in grown.items() if size > STAYS}


def test_every_quantizer_is_measured():
    public = {getattr(fastvq, name) for name in fastvq.__all__}
    public = {c for c in public if isinstance(c, type) and issubclass(c, torch.nn.Module)}
    assert public <= {type(layer) for _, layer, _ in layers()}


# Nothing is reported of what is allocated until `report_leaks` ends the pause.
LEAKS = """
import ctypes
ctypes.CDLL(None).__lsan_disable()
import runpy, sys
sys.argv[1:] = ["leaks"]
runpy.run_module("tests.cpu.heap", run_name="__main__")
"""


@native_only
def test_no_call_loses_memory(tmp_path):
    """LeakSanitizer stands below malloc, so it watches the library as it is built, bound to torch."""
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    found = subprocess.run([compiler, "-print-file-name=liblsan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("needs liblsan of g++")
    # Twelve frames of each allocation reach from malloc through the library; all thirty take twice the time.
    options = f"log_path={tmp_path}/report exitcode=0 fast_unwind_on_malloc=0 malloc_context_size=12 max_leaks=0"
    # Python's objects come from malloc too, where the sanitizer sees what they refer to.
    run("-c", LEAKS, LD_PRELOAD=found, PYTHONMALLOC="malloc", LSAN_OPTIONS=options)
    reports = "".join(path.read_text() for path in tmp_path.glob("report*"))
    leaks = [leak for leak in re.split(r"\n(?=\w+ leak of )", reports) if " leak of " in leak]
    objects = [(int(re.search(r"in (\d+) object", leak)[1]), leak) for leak in leaks]
    assert not [leak for count, leak in objects if count >= CALLS or "_native" in leak]


TRAINING = """
import resource, torch, fastvq

torch.set_num_threads(1)
page = resource.getpagesize()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * page

encoder, quantizer, decoder = torch.nn.Linear(64, 64), fastvq.VectorQuantize(64, 256), torch.nn.Linear(64, 64)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
x = torch.randn(4, 256, 64)
for step in range(20_001):
    quantized, _, loss = quantizer(encoder(x))
    (torch.nn.functional.mse_loss(decoder(quantized), x) + loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1000:
        before = resident()
print((resident() - before) / 1e6)
"""


@native_only
@pytest.mark.machine
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc/self/statm")
def test_a_long_training_keeps_its_size():
    grown = run("-c", TRAINING)
    assert float(grown) < 32
