"""Cost and effect of the settings of the trainer: docs/training.md has the table.

    python benchmarks/trainer.py --out OUT

It prints, for the VQ-VAE of Fashion-MNIST with fewer channels: time of a step and PSNR for each setting, steps side by
side in one process with one thread; time, traffic and tokenized images by the number of ranks; and the memory of a
training whose set of images is ten times larger than the memory that it may take.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from fastvq import distributed
from fastvq.modalities import ImageConfig
from fastvq.runs.tokenize import tokenize
from fastvq.training import Trainer, load_examples, ranks
from fastvq.training.plan import plan_training

COMMON: dict[str, Any] = {"width": 48, "batch_size": 32, "warmup_steps": 20, "clip_norm": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "`--precision bf16`": {"precision": "bf16"},
    "`--compile`": {"compile": True},
    "`--accumulate 4`": {"accumulate": 4},
    "`--clip-norm 1`": {"clip_norm": 1.0},
    "`--weight-average 0.98`": {"weight_average": 0.98},
    "`--perceptual-weight 1`": {"perceptual_weight": 1.0},
    "`--adversarial-weight 0.8`": {"adversarial_weight": 0.8, "adversarial_start": 0, "discriminator_width": 32},
}
TIMED, SKIPPED = 30, 5
TOKENIZED = "fashion-mnist"
SIDE, TIMES, IMAGES = 256, 10, 1500


def compare_settings(out: Path, steps: int) -> None:
    """Train with each setting, a step of each in turn, and print time and quality."""
    trainers = {}
    for number, (name, own) in enumerate(SETTINGS.items()):
        config = ImageConfig(**COMMON | {"steps": steps} | own)
        trainers[name] = Trainer(config, load_examples(config), out / f"setting-{number}")
        trainers[name].model.train()
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(steps):
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.train_step()
            seconds[name].append(time.process_time() - start)
    print("| setting | CPU time of a step | of that as it is | PSNR (dB) |\n|---|---|---|---|")
    medians = {name: statistics.median(times[SKIPPED:]) for name, times in seconds.items()}
    for name, trainer in trainers.items():
        print(
            f"| {name} | {1000 * medians[name]:.1f} ms | {medians[name] / medians['as it is']:.2f}"
            f" | {trainer.evaluate()[0].value:.2f} |",
            flush=True,
        )


def measure_rank(out: Path, count: int) -> None:
    """Measure steps, traffic and tokenization of one of `count` ranks; rank 0 prints an object."""
    config = ImageConfig(**COMMON | {"steps": TIMED + 1})
    run = out / f"ranks-{count}"
    trainer = Trainer(config, load_examples(config), run)
    sent = {"gradients": 0, "codebooks": 0}
    if distributed.active():
        all_reduce = dist.all_reduce

        def hook(state, bucket):  # without annotations, which torch would read
            sent["gradients"] += bucket.buffer().nbytes
            work = all_reduce(bucket.buffer().div_(count), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if tensor.is_floating_point():  # the signals to stop are integers
                sent["codebooks"] += tensor.nbytes
            return all_reduce(tensor, *arguments, **options)

        trainer._forward.register_comm_hook(None, hook)  # type: ignore[attr-defined]
        distributed.dist.all_reduce = counted  # type: ignore[attr-defined]
    walls: list[float] = []
    spent: list[float] = []
    trainer.model.train()
    for step in range(TIMED):
        if step == SKIPPED:
            sent = dict.fromkeys(sent, 0)
        ranks.wait()
        wall, cpu = time.monotonic(), time.process_time()
        trainer.train_step()
        walls.append(time.monotonic() - wall)
        spent.append(time.process_time() - cpu)
    steps = TIMED - SKIPPED
    found: dict[str, Any] = {
        "ranks": count,
        "wall": statistics.median(walls[SKIPPED:]),
        "cpu": statistics.median(spent[SKIPPED:]),
        **{name: size // steps for name, size in sent.items()},
        "planned": plan_training(config).traffic if count > 1 else {},
    }
    if distributed.active():
        distributed.dist.all_reduce = all_reduce  # type: ignore[attr-defined]
    trainer.fit(progress=False)  # the last step, which saves a checkpoint
    ranks.wait()
    start = time.monotonic()
    tokenize(run, TOKENIZED, out / f"indices-{count}", shard_files=500)
    ranks.wait()
    found["tokenized"] = 6700 / (time.monotonic() - start)
    if ranks.leads():
        print(json.dumps(found), flush=True)


def compare_ranks(out: Path) -> None:
    """Run `measure_rank` on one and on two ranks, and print the table."""
    print("\n| processes | step | CPU time of a step on each | all-reduce | planned | tokenized images a second |")
    print("|---|---|---|---|---|---|")
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [sys.executable, *(launcher if count > 1 else []), __file__, "--out", str(out), "--ranks", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        sent, planned = found["gradients"] + found["codebooks"], sum(found["planned"].values())
        print(
            f"| {count} | {1000 * found['wall']:.0f} ms | {1000 * found['cpu']:.0f} ms | {sent:,} bytes"
            f" | {planned:,} bytes | {found['tokenized']:.0f} |",
            flush=True,
        )


def measure_memory(out: Path) -> None:
    """Train on images that are `TIMES` larger than the memory that is left, and print the growth of memory."""
    os.environ["XDG_CACHE_HOME"] = str(out / "cache")
    sizes = {"few": 40, "many": IMAGES}
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    configs = {}
    for name, count in sizes.items():
        folder = out / name
        if not folder.exists():
            folder.mkdir(parents=True)
            Image.fromarray(pixels).save(folder / "0.png")
            for number in range(1, count):
                os.link(folder / "0.png", folder / f"{number}.png")
        configs[name] = ImageConfig(
            **COMMON | {"data": str(folder), "image_size": SIDE, "grayscale": False, "batch_size": 2, "steps": 4},
            workers=0,
        )
    # The first training takes what each takes: code, weights, features.
    for name, config in configs.items():
        before = _memory("RssAnon")
        if name == "many":
            size = IMAGES * SIDE * SIDE * 3
            # The limit counts the mapped file as well, whose pages are the operating system's.
            limit = _memory("VmData") + size + size // TIMES
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        trainer = Trainer(config, load_examples(config), out / f"memory-{name}-{os.getpid()}")
        for _ in range(config.steps):
            trainer.train_step()
    print(
        f"\nA set of {size / 1e6:.0f} MB was learned from with {size / TIMES / 1e6:.0f} MB of memory to spare, of which"
        f" {(_memory('RssAnon') - before) / 1e6:.0f} MB were taken."
    )
    try:
        trainer.examples.train.clone()
        print("The limit had no effect.")
    except RuntimeError:
        print("A copy of the set in memory fails at this limit.")


def _memory(name: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(f"{name}:")).split()[1])


def main() -> None:
    """Measure all, or with `--ranks` what one process of several does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("settings", "ranks", "memory"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ranks == 1:
        measure_rank(options.out, 1)
    elif options.ranks:
        with ranks.process_group():
            measure_rank(options.out, options.ranks)
    else:
        if options.only in (None, "settings"):
            compare_settings(options.out, options.steps)
        if options.only in (None, "ranks"):
            compare_ranks(options.out)
        if options.only in (None, "memory"):
            measure_memory(options.out)


if __name__ == "__main__":
    main()
