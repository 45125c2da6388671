"""Quantizers of other projects as they are and after `fastvq.accelerate`: time, memory and wrong indices.

Rows with "layer" compare them with the layer of fastvq that `fastvq.clients` makes from their weights instead.

    python -m benchmarks.bench_clients [--threads 1] [--only NAME] [--seconds 2] [--cpu-time]

Both take turns in one process; the table has medians and the ratio of the medians. Weights are random, sizes those of
published models. Wrong indices are those that differ from the same module computed in float64; the accelerated module
has to have none, except where the projections before a search are rounded otherwise (DAC). Projects whose package is
not installed are left out; those marked * are the stand-ins of tests/clients, with the formulas of the project. Memory
is the growth of the process during the first call, in a fork, on Linux; about 10 MiB of it are code and caches.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvq
from fastvq.bench.measure import extra_bytes, in_a_child, interleave
from fastvq.clients import from_dac, from_snac
from tests.clients import installed
from tests.clients.stand_ins import jukebox, llamagen, rosinality, rq_vae, taming, var
from tests.clients.table import transformers


@dataclass(frozen=True)
class Row:
    """A module, its input, and what is called with them."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[Any, Tensor], Any]
    training: bool = False
    dtype: torch.dtype = torch.float32
    scale: float = 1.0  # of the input
    layer: Callable[..., nn.Module] | None = None  # makes a layer from a state dict, instead of `accelerate`


def layer(load: Callable[..., nn.Module], row: Row, **settings: Any) -> Row:
    """Return a row that compares a client with a layer that has its weights."""
    return replace(row, layer=partial(load, **settings))


def encode(module: Any, x: Tensor) -> Any:
    return module.encode(x)


def forward(module: Any, x: Tensor) -> Any:
    return module(x)


def step(module: Any, x: Tensor) -> Any:
    result = module(x)
    loss: Tensor = sum((t.float().square().mean() for t in tensors(result) if t.requires_grad), torch.zeros(()))
    loss.backward()
    return result


def filled(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Give each codebook random codes, smaller at each stage, as residuals are."""

    def build() -> nn.Module:
        module = make()
        for name, buffer in module.named_buffers():
            if buffer.dim() == 2:
                stage = int("".join(filter(str.isdigit, name)) or 0)
                buffer.normal_().mul_(0.8**stage)
            elif buffer.numel() == 1:
                buffer.fill_(1)
        return module

    return build


def package(name: str, kind: str, *arguments: Any, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(installed.module(name), kind)(*arguments, **settings)


ENCODEC = filled(
    package(
        *("encodec.quantization.core_vq", "ResidualVectorQuantization"),
        dim=128,
        codebook_size=1024,
        num_quantizers=8,
        kmeans_init=False,
    )
)
TRANSFORMERS_ENCODEC = filled(
    transformers(
        "encodec", "EncodecResidualVectorQuantizer", "EncodecConfig", target_bandwidths=[6.0], codebook_dim=128
    )
)
MIMI = filled(transformers("mimi", "MimiSplitResidualVectorQuantizer", "MimiConfig", num_quantizers=32))
DAC = transformers("dac", "DacResidualVectorQuantizer", "DacConfig")
DESCRIPT = package("dac.nn.quantize", "ResidualVectorQuantize", 1024)
PEER = package("vector_quantize_pytorch.vector_quantize_pytorch", "VectorQuantize", 64, 1024)
DESCRIPT_10_S = Row(DESCRIPT, (1, 1024, 870), forward)
DESCRIPT_STEP = Row(DESCRIPT, (12, 1024, 33), step, training=True)
SNAC_10_S = Row(package("snac.vq", "ResidualVectorQuantize", 768, 4096, 8, [4, 2, 1]), (1, 768, 480), forward)
IMAGE = (8, 8, 16, 16)

ROWS = {
    "Mimi, 10 s": Row(MIMI, (1, 512, 125), encode),
    "Mimi, one frame": Row(MIMI, (1, 512, 1), encode),
    "EnCodec (transformers), 10 s": Row(TRANSFORMERS_ENCODEC, (1, 128, 750), encode),
    "EnCodec (transformers), one frame": Row(TRANSFORMERS_ENCODEC, (1, 128, 1), encode),
    "EnCodec (transformers), 10 s, bfloat16": Row(TRANSFORMERS_ENCODEC, (1, 128, 750), encode, dtype=torch.bfloat16),
    "encodec, 10 s": Row(ENCODEC, (1, 128, 750), encode),
    "encodec, training step, 16 x 1 s": Row(ENCODEC, (16, 128, 75), step, training=True),
    "moshi, 10 s": Row(
        filled(
            package(
                *("moshi.quantization.core_vq", "ResidualVectorQuantization"),
                num_quantizers=8,
                codebook_offset=0,
                dim=256,
                codebook_size=2048,
            )
        ),
        (1, 256, 125),
        encode,
    ),
    "DAC (transformers), 10 s": Row(DAC, (1, 1024, 870), forward),
    "descript-audio-codec, 10 s": DESCRIPT_10_S,
    "descript-audio-codec, 10 s, layer": layer(from_dac, DESCRIPT_10_S, stage_axis=1),
    "descript-audio-codec, training step, 12 x 0.4 s": DESCRIPT_STEP,
    "descript-audio-codec, training step, 12 x 0.4 s, layer": layer(from_dac, DESCRIPT_STEP, stage_axis=1),
    "snac, 10 s": SNAC_10_S,
    "snac, 10 s, layer": layer(from_snac, SNAC_10_S),
    "diffusers VQModel, K=8192": Row(
        package("diffusers.models.autoencoders.vae", "VectorQuantizer", 8192, 3, 0.25), (1, 3, 64, 64), forward
    ),
    "diffusers VQModel, at its initialization": Row(
        package("diffusers.models.autoencoders.vae", "VectorQuantizer", 16384, 8, 0.25), (2, 8, 32, 32), forward
    ),
    "vector_quantize_pytorch, eval, K=1024 D=64": Row(PEER, (16, 256, 64), forward),
    "vector_quantize_pytorch, training step": Row(PEER, (16, 256, 64), step, training=True),
    "taming *, K=1024 D=256": Row(lambda: taming.VectorQuantizer2(1024, 256, 0.25), (4, 256, 16, 16), forward),
    "LlamaGen *, K=16384": Row(lambda: llamagen.VectorQuantizer(16384, 8, 0.25, 0.0, True, False), IMAGE, forward),
    "LlamaGen *, training step with entropy loss": Row(
        lambda: llamagen.VectorQuantizer(16384, 8, 0.25, 0.1, True, False), IMAGE, step, training=True
    ),
    "VAR *, K=4096": Row(
        lambda: var.VectorQuantizer2(4096, 32, True, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        (4, 32, 16, 16),
        lambda module, x: module.f_to_idxBl_or_fhat(x, False),
    ),
    "VQ-VAE-2 *, training step, K=512": Row(lambda: rosinality.Quantize(64, 512), (8, 32, 32, 64), step, training=True),
    "jukebox *, K=2048": Row(
        lambda: jukebox.BottleneckBlock(2048, 64, 0.99), (1, 64, 8192), lambda module, x: module(x, update_k=False)
    ),
    "RQ-VAE *, K=256": Row(
        lambda: rq_vae.Quantize(32, 256, rq_vae.QuantizeForwardMode.STE),
        (8192, 32),
        lambda module, x: module(x, 0.1),
    ),
}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)


def indices(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(value) if not tensor.is_floating_point()]


def made(row: Row) -> nn.Module:
    torch.manual_seed(0)
    return row.make().to(row.dtype).train(row.training)


def wrong(row: Row, module: nn.Module, x: Tensor) -> str:
    """Return how many indices are not those of the same module in float64, as "3 of 1000"."""
    with torch.no_grad():
        exact = indices(row.call(made(row).eval().double(), x.double()))
        found = indices(row.call(module.eval(), x))
    module.train(row.training)
    number = sum(int((one != other).sum()) for one, other in zip(found, exact, strict=True))
    return f"{number} of {sum(one.numel() for one in exact)}"


def peak(call: Callable[[], Any]) -> int:
    """Return the growth of the process during a call, once memory that earlier calls left free is given back.

    The call has one thread: a fork of a process with more has none of the others, and would wait for them.
    """
    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    return extra_bytes(call)


_MMAP_THRESHOLD = -3
"""Number of the setting in malloc.h: blocks from this size on are mapped, and thus seen to go."""


def measure(row: Row, seconds: float, clock: Callable[[], float]) -> list[str]:
    """Return the cells of a row's line."""
    x = (row.scale * torch.randn(row.shape, generator=torch.Generator().manual_seed(1))).to(row.dtype)
    x.requires_grad_(row.training)
    modules = {"client": made(row), "fastvq": made(row)}
    if row.layer is None:
        fastvq.accelerate(modules["fastvq"])
    else:
        modules["fastvq"] = row.layer(modules["client"].state_dict()).train(row.training)

    def call(name: str) -> Callable[[], Any]:
        def run() -> None:
            with torch.set_grad_enabled(row.training):
                row.call(modules[name], x)

        return run

    memory = [in_a_child(lambda name=name: peak(call(name))) / 2**20 for name in modules]
    mistakes = ["", ""] if row.training else [wrong(row, module, x.detach()) for module in modules.values()]
    times = interleave({name: call(name) for name in modules}, budget=seconds, clock=clock)
    client, own = (1e3 * statistics.median(times[name]) for name in modules)
    return [f"{client:.2f}", f"{own:.2f}", f"{client / own:.1f}", f"{memory[0]:.0f}", f"{memory[1]:.0f}", *mistakes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the name of the rows to measure")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the processor's time, not that of a busy machine"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}\n")
    print("| | client, ms | fastvq, ms | ratio | client, MiB | fastvq, MiB | client wrong | fastvq wrong |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        if options.only not in name:
            continue
        try:
            cells = measure(row, options.seconds, clock)
        except pytest.skip.Exception as missing:
            cells = [str(missing)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
