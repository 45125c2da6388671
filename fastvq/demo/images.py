"""Demo from start to end, in five parts.

A VQ-VAE on the shipped images, the same network without a bottleneck as its ceiling, a prior over its indices, samples,
the held-out images in one small file, and a page that shows all of it.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq.data import Examples
from fastvq.data.examples import describe
from fastvq.files import StrPath, write_whole
from fastvq.modalities import ImageConfig
from fastvq.runs.classifier import STEPS, judge_samples
from fastvq.runs.encode import encode_held_out
from fastvq.runs.load import PRIOR_FOLDER
from fastvq.runs.pictures import failures_as_warnings, picture_prior, picture_reconstructions, picture_run
from fastvq.runs.sample_pictures import picture_prior_samples
from fastvq.runs.train_prior import train_prior
from fastvq.training.build import load_examples
from fastvq.training.checkpoint import checkpoint_folders, load_latest
from fastvq.training.config import PriorConfig
from fastvq.training.evaluation import Evaluation
from fastvq.training.trainer import Trainer

from .folder import METRICS, check_request, demo_folder
from .page import write_demo_page
from .parts import announce, with_steps
from .sizes import measure_sizes

# Gray images keep their codebook without a limit of the gradient, and the prior learns their indices a little better.
DEMO = ImageConfig(evaluate_every=400, clip_norm=0.0)
DEMO_PRIOR = PriorConfig()
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "guidance": 1.5}
_PARTS = [
    ("training a VQ-VAE", 150),
    ("training the same network without a bottleneck, as the ceiling", 20),
    ("training a prior over the indices", 190),
    ("samples, completions, and a classifier that judges them", 35),
    ("the held-out images as files of every format", 30),
]
"""Description of each part, and its approximate time in seconds on 2 idle cores."""
CEILING_STEPS = 600


def run_demo(
    folder: StrPath,
    *,
    config: ImageConfig | None = None,
    steps: int | None = None,
    ceiling_steps: int = CEILING_STEPS,
    prior_config: PriorConfig | None = None,
    prior_steps: int | None = None,
    classifier_steps: int = STEPS,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, measure and draw; return the content of metrics.json, or None if interrupted.

    Args:
        folder: gets `index.html`, the pictures, `metrics.json`, `metrics.jsonl`, `checkpoints/`, `images.fvq`, the
            prior in `prior/` and the ceiling run in `ceiling/`.
        config: settings of the VQ-VAE, by default `DEMO`; the ceiling run differs only in `bottleneck` and `steps`.
        steps: training steps of the VQ-VAE, instead of those in `config`.
        ceiling_steps: training steps of the network without a bottleneck. More steps would raise its PSNR: it is a
            lower bound of the ceiling.
        prior_config: settings of the prior, by default `DEMO_PRIOR`.
        prior_steps: training steps of the prior, instead of those in `prior_config`.
        classifier_steps: training steps of the classifier that judges samples.
        resume: continue an interrupted demo.
        overwrite: replace the demo that is in the folder. A finished one moves to `earlier/` and is deleted when this
            one is finished.

    Raises:
        CheckpointError: the folder holds a run that is not a demo, or a demo, and neither `resume` nor `overwrite` is
            given; `resume` and there is nothing to continue; another process is writing there.
        ConfigError: `resume` and the settings differ from those of the demo, other than by more steps.
    """
    folder, config = Path(folder), with_steps(config or DEMO, steps)
    prior_config = with_steps(prior_config or DEMO_PRIOR, prior_steps)
    check_request(resume=resume, overwrite=overwrite)
    examples = load_examples(config)
    with demo_folder(folder, resume=resume, overwrite=overwrite):
        return _run(folder, examples, config, ceiling_steps, prior_config, classifier_steps, resume=resume)


def _run(
    folder: Path,
    examples: Examples,
    config: ImageConfig,
    ceiling_steps: int,
    prior_config: PriorConfig,
    classifier_steps: int,
    *,
    resume: bool,
) -> dict[str, Any] | None:
    """Run the five parts in a folder without a demo, or continue the one that is there."""
    started = time.monotonic()
    ceiling_config = dataclasses.replace(config, bottleneck="none", steps=ceiling_steps)
    print(describe(examples), flush=True)

    announce(_PARTS, 1)

    def draw(trainer: Trainer, evaluation: Evaluation) -> None:
        with failures_as_warnings("picture of reconstructions"):
            path = picture_reconstructions(trainer, evaluation, captioned=False)
            if trainer.step <= config.evaluate_every:
                print(f"\nfirst reconstructions after {trainer.seconds:.0f} s: {path}", flush=True)

    trainer = Trainer(config, examples, folder, resume=resume)
    evaluation = trainer.fit(on_evaluation=draw)
    if evaluation is None:
        return None
    picture_run(trainer, evaluation, captioned=False)

    announce(_PARTS, 2)
    began = bool(checkpoint_folders(folder / "ceiling"))
    ceiling_trainer = Trainer(ceiling_config, examples, folder / "ceiling", resume=resume and began)
    ceiling = ceiling_trainer.fit()
    if ceiling is None:
        return None

    announce(_PARTS, 3)
    prior_started = time.monotonic()
    trained = train_prior(folder, prior_config, resume=resume)
    if trained is None:
        return None
    prior, indices = trained.prior, trained.data.test
    prior_seconds = time.monotonic() - prior_started
    with failures_as_warnings("picture of curves of the prior"):
        picture_prior(folder, captioned=False)

    announce(_PARTS, 4)
    sampling = SAMPLING if prior.classes else {name: SAMPLING[name] for name in SAMPLING if name != "guidance"}
    picture_prior_samples(folder, prior, trainer.model, config, examples, **sampling)
    judged = judge_samples(prior, trainer.model, examples, sampling, steps=classifier_steps)

    announce(_PARTS, 5)
    print("\n".join(encode_held_out(folder, folder / "images.fvq", model="prior")), flush=True)
    coded = (folder / "images.fvq").stat().st_size
    bits, sizes = measure_sizes(
        examples,
        indices,
        config.codebook_size,
        psnr_db=evaluation.psnr_db,
        prior_bits=trained.bits_per_index * indices.numel(),
        prior_file=coded,
    )
    indices_per_image = indices[0].numel()
    metrics = {
        "data": examples.name,
        "classes": prior.classes,
        "psnr_db": evaluation.psnr_db,
        "perplexity": evaluation.perplexity,
        "usage": evaluation.usage,
        "ceiling_psnr_db": ceiling.psnr_db,
        "indices_per_image": indices_per_image,
        "codebook_size": config.codebook_size,
        "bits_per_index": bits,
        "kl_bits_per_image": indices_per_image * bits["uniform"],
        "prior_bits_per_image": indices_per_image * bits["prior"],
        "bits_per_dimension": {name: value * indices.numel() / examples.test.numel() for name, value in bits.items()},
        "coded_bytes": coded,
        "pixel_bytes": examples.test.numel(),
        "sizes": sizes,
        **judged,
        "sampling": ", ".join(f"{name} {value}" for name, value in sampling.items()),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "ceiling_steps": ceiling_trainer.step,
        "ceiling_seconds": round(ceiling_trainer.seconds, 1),
        "prior_steps": load_latest(folder / PRIOR_FOLDER, PriorConfig).step,
        "prior_seconds": round(prior_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        **_circumstances(trainer, examples),
    }
    write_whole(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    page = write_demo_page(folder, metrics)
    print(_table(metrics))
    print(f"all pictures and tables: {page}")
    return metrics


def _circumstances(trainer: Trainer, examples: Examples) -> dict[str, Any]:
    return {
        "train_images": len(examples.train),
        "test_images": len(examples.test),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "settings": trainer.config.to_json(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastvq": fastvq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _table(metrics: dict[str, Any]) -> str:
    bits = metrics["indices_per_image"] * (metrics["codebook_size"] - 1).bit_length()
    rows = [
        ("held-out images", f"{metrics['test_images']}"),
        ("PSNR, decoded from the indices", f"{metrics['psnr_db']:.2f} dB"),
        (
            "PSNR without a bottleneck",
            f"{metrics['ceiling_psnr_db']:.2f} dB ({metrics['ceiling_steps']} steps)",
        ),
        ("indices per image", f"{metrics['indices_per_image']} below {metrics['codebook_size']}, {bits} bits"),
        ("the images in one file", f"{metrics['coded_bytes']} bytes; their pixels: {metrics['pixel_bytes']}"),
        *(
            (f"bits per index, {name}", f"{metrics['bits_per_index'][name]:.2f}")
            for name in ("uniform", "huffman", "static", "adaptive", "prior")
        ),
        *(
            (text, f"{metrics[name]:.0%}")
            for name, text in (
                ("sample_agreement", "samples of the requested class"),
                ("real_agreement", "the same of real images"),
            )
            if metrics[name] is not None
        ),
        ("perplexity", f"{metrics['perplexity']:.0f} of {metrics['codebook_size']}"),
        ("training", f"{metrics['steps']} steps, {metrics['seconds']:.0f} s"),
        ("total time", f"{metrics['total_seconds']:.0f} s"),
    ]
    widest = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"  {name:<{widest}}  {value}" for name, value in rows), ""])
