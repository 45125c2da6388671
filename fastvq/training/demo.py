"""The main job: a VQ-VAE on the shipped images, its ceiling without a bottleneck, a prior over its codes, the held-out
images in one small file, pictures and a short table."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq import coding
from fastvq.files import whole
from fastvq.training.build import load_images
from fastvq.training.checkpoint import CheckpointError, checkpoint_folders
from fastvq.training.compress import HELD_OUT, encode_images
from fastvq.training.config import TrainConfig
from fastvq.training.evaluation import Evaluation, evaluate
from fastvq.training.loop import forget_run
from fastvq.training.prior import PriorConfig, bits_per_code, forget_prior, train_prior
from fastvq.training.report import picture_reconstructions, picture_run
from fastvq.training.sampling import picture_completions, picture_samples
from fastvq.training.trainer import Trainer

DEMO = TrainConfig(evaluate_every=400)
DEMO_PRIOR = PriorConfig()
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
_MARKER = ".demo"
CEILING_STEPS = 600


def run_demo(
    folder: Path,
    *,
    config: TrainConfig = DEMO,
    ceiling_steps: int = CEILING_STEPS,
    prior_config: PriorConfig = DEMO_PRIOR,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Train, measure and draw; return what metrics.json holds, or None if the run was interrupted.

    Args:
        folder: gets the pictures, `metrics.json`, `metrics.jsonl`, `checkpoints/`, `images.fvq`, the prior in `prior/`
            and the ceiling run in `ceiling/`. An earlier demo there is replaced.
        config: settings of the run with a codebook; the ceiling run differs in `bottleneck` and `steps` alone.
        ceiling_steps: how long the network without a bottleneck trains. A longer run would end higher: the ceiling is
            a lower bound.
        prior_config: settings of the prior.
        resume: go on with an interrupted demo.
    """
    started = time.monotonic()
    images = load_images(config)
    ceiling_config = dataclasses.replace(config, bottleneck="none", steps=ceiling_steps)
    if not resume:
        if checkpoint_folders(folder) and not (folder / _MARKER).exists():
            raise CheckpointError(f"{folder} holds a run that is no demo: choose another folder")
        (folder / "metrics.json").unlink(missing_ok=True)
        forget_run(folder)
        forget_run(folder / "ceiling")
        forget_prior(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    print(f"{images.name}: {len(images.train)} images to learn from, {len(images.test)} held out", flush=True)

    def show(trainer: Trainer, evaluation: Evaluation) -> None:
        path = picture_reconstructions(trainer.folder, trainer.model, images, evaluation, step=trainer.step)
        if trainer.step <= config.evaluate_every:
            print(f"\nfirst reconstructions after {trainer.seconds:.0f} s: {path}", flush=True)

    trainer = Trainer(config, images, folder, resume=resume)
    if not trainer.fit(on_evaluation=show):
        return None
    evaluation = evaluate(trainer.model, images.test)
    pictures = picture_run(trainer, evaluation)

    print("the same network without a bottleneck, as the ceiling:", flush=True)
    began = bool(checkpoint_folders(folder / "ceiling"))
    ceiling_trainer = Trainer(ceiling_config, images, folder / "ceiling", resume=resume and began)
    if not ceiling_trainer.fit():
        return None
    ceiling = evaluate(ceiling_trainer.model, images.test)

    print("a prior over its codes:", flush=True)
    learned = train_prior(folder, prior_config, resume=resume)
    if learned is None:
        return None
    prior, codes = learned
    pictures += [folder / "samples.png", folder / "completions.png"]
    picture_samples(pictures[-2], prior, trainer.model, images, **SAMPLING)
    picture_completions(pictures[-1], prior, trainer.model, images, **SAMPLING)
    sizes = coding.measure(codes.test, config.codebook_size)
    bits = {name: size["bits_per_code"] for name, size in sizes.items()}
    bits["prior"] = bits_per_code(prior, codes.test, codes.test_labels)
    encode_images(folder, Path(HELD_OUT), folder / "images.fvq")

    height, width = (size // 2**config.downsamples for size in images.test.shape[-2:])
    metrics = {
        "psnr_db": evaluation.psnr_db,
        "perplexity": evaluation.perplexity,
        "usage": evaluation.usage,
        "ceiling_psnr_db": ceiling.psnr_db,
        "codes_per_image": height * width,
        "codebook_size": config.codebook_size,
        "bits_per_code": bits,
        "coded_bytes": (folder / "images.fvq").stat().st_size,
        "pixel_bytes": images.test.numel(),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "ceiling_steps": ceiling_trainer.step,
        "ceiling_seconds": round(ceiling_trainer.seconds, 1),
        "prior_steps": prior_config.steps,
        "total_seconds": round(time.monotonic() - started, 1),
        "train_images": len(images.train),
        "test_images": len(images.test),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "settings": config.to_json(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastvq": fastvq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    with whole(folder / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n")
    print(_table(metrics))
    print("pictures: " + ", ".join(str(path) for path in pictures))
    return metrics


def _table(metrics: dict[str, Any]) -> str:
    bits = metrics["codes_per_image"] * (metrics["codebook_size"] - 1).bit_length()
    rows = [
        ("held-out images", f"{metrics['test_images']}"),
        ("PSNR, decoded from the codes", f"{metrics['psnr_db']:.2f} dB"),
        (
            "PSNR without a bottleneck",
            f"{metrics['ceiling_psnr_db']:.2f} dB ({metrics['ceiling_steps']} steps)",
        ),
        ("codes an image", f"{metrics['codes_per_image']} of {metrics['codebook_size']}, {bits} bits"),
        ("the images in one file", f"{metrics['coded_bytes']} bytes; their pixels: {metrics['pixel_bytes']}"),
        *(
            (f"bits a code, {name}", f"{metrics['bits_per_code'][name]:.2f}")
            for name in ("uniform", "static", "adaptive", "prior")
        ),
        ("perplexity of the codes", f"{metrics['perplexity']:.0f} of {metrics['codebook_size']}"),
        ("training", f"{metrics['steps']} steps, {metrics['seconds']:.0f} s"),
        ("all of this", f"{metrics['total_seconds']:.0f} s"),
    ]
    widest = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"  {name:<{widest}}  {value}" for name, value in rows), ""])
