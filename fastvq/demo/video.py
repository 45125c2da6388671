"""Demo of video, in four parts.

A VQ-VAE on the shipped clips, a prior over its indices, samples in motion, and the held-out clips in one small file
beside the usual formats.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastvq import coding
from fastvq.data import Examples
from fastvq.data.examples import describe
from fastvq.files import StrPath, write_whole
from fastvq.modalities import VideoConfig
from fastvq.runs.encode import encode_held_out
from fastvq.runs.load import load_model
from fastvq.runs.page import Media, Part, Picture, Section, TextTable, write_page
from fastvq.runs.pictures import MEDIA
from fastvq.runs.sample_pictures import picture_prior_samples
from fastvq.training.build import load_examples
from fastvq.training.config import PriorConfig

from .folder import METRICS, check_request, demo_folder
from .parts import announce, train_model_and_prior, with_steps
from .sizes import animation_sizes

DEMO = VideoConfig()
DEMO_PRIOR = PriorConfig(
    steps=300, batch_size=16, learning_rate=2e-3, dropout=0.2, evaluate_every=100, checkpoint_every=100
)
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
_PARTS = [
    ("training a VQ-VAE of clips", 300),
    ("training a prior over the indices", 90),
    ("samples and completions", 15),
    ("the held-out clips as files of every format", 15),
]
"""Description of each part, and its approximate time in seconds on 2 idle cores."""


def run_demo(
    folder: StrPath,
    *,
    config: VideoConfig | None = None,
    steps: int | None = None,
    prior_config: PriorConfig | None = None,
    prior_steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, measure and draw; return the content of metrics.json, or None if interrupted.

    Args:
        folder: gets `index.html`, the pictures, `metrics.json`, `clips.fvq` and what a run and its prior consist of.
        config: settings of the VQ-VAE, by default `DEMO`.
        steps: training steps of the VQ-VAE, instead of those in `config`.
        prior_config: settings of the prior, by default `DEMO_PRIOR`.
        prior_steps: training steps of the prior, instead of those in `prior_config`.
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
    clips = load_examples(config)
    with demo_folder(folder, resume=resume, overwrite=overwrite):
        return _run(folder, clips, config, prior_config, resume=resume)


def _run(
    folder: Path, clips: Examples, config: VideoConfig, prior_config: PriorConfig, *, resume: bool
) -> dict[str, Any] | None:
    """Run the four parts in a folder without a demo, or continue the one that is there."""
    started = time.monotonic()
    print(describe(clips), flush=True)

    parts = train_model_and_prior(_PARTS, folder, clips, config, prior_config, resume=resume)
    if parts is None:
        return None
    evaluation, trained = parts.evaluation, parts.prior

    announce(_PARTS, 3)
    model, _ = load_model(folder)
    picture_prior_samples(folder, trained.prior, model, config, clips, **SAMPLING)

    announce(_PARTS, 4)
    print("\n".join(encode_held_out(folder, folder / "clips.fvq", model="prior")), flush=True)
    indices = trained.data.test.long()
    measured = coding.measure(indices, config.codebook_size)
    sizes = [
        *animation_sizes(clips.test, evaluation.value, frame_rate=config.frame_rate),
        *(
            {"name": f"indices, {name}", "bytes": int(measured[name]["bytes"]), "psnr_db": evaluation.value}
            for name in ("uniform", "static", "adaptive")
        ),
        {
            "name": "indices, learned prior",
            "bytes": (folder / "clips.fvq").stat().st_size,
            "psnr_db": evaluation.value,
        },
    ]
    metrics: dict[str, Any] = {
        "data": clips.name,
        "train_clips": len(clips.train),
        "test_clips": len(clips.test),
        "frames": config.frames,
        "psnr_db": evaluation.value,
        "perplexity": evaluation.perplexity,
        "usage": evaluation.usage,
        "grid": list(config.feature_grid),
        "codebook_size": config.codebook_size,
        "prior_bits_per_index": trained.bits_per_index,
        "adaptive_bits_per_index": measured["adaptive"]["bits_per_index"],
        "pixel_bytes": clips.test.numel(),
        "sizes": sizes,
        "total_seconds": round(time.monotonic() - started, 1),
        **parts.facts(),
    }
    write_whole(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    print(f"all pictures and tables: {_write_page(folder, metrics)}")
    return metrics


def _write_page(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write the page beside the pictures that it shows, and return its path."""
    grid, frames = metrics["grid"], metrics["frames"]
    positions = " x ".join(map(str, grid))
    rows = [
        [size["name"], f"{size['bytes']:,}", "lossless" if size["psnr_db"] is None else f"{size['psnr_db']:.2f} dB"]
        for size in metrics["sizes"]
    ]
    clips: list[Part] = [
        f"The encoder turns {frames} frames into a grid of {positions} vectors. Each is replaced by the nearest of"
        f" {metrics['codebook_size']} codes, and the decoder receives nothing but the indices of these codes. The first"
        f" frame has {grid[1]} x {grid[2]} indices of its own; each later {grid[1]} x {grid[2]} of them stand for"
        f" {(frames - 1) // max(1, grid[0] - 1)} frames. Held-out clips are decoded with {metrics['psnr_db']:.2f} dB.",
        Media(f"{MEDIA}/reconstructions", "Held-out clips above what is decoded from their indices"),
        Picture("reconstructions.png", "Frames of held-out clips above their reconstructions"),
        Picture("indices.png", "Clips, their indices as colored grids, and the reconstructions from them"),
        Picture("usage.png", "Number of times that each code is chosen"),
        Picture("curves.png", "Loss, PSNR and perplexity over the training steps"),
    ]
    prior: list[Part] = [
        f"A transformer goes through the grid frame by frame and predicts each index from those before it: a held-out"
        f" index takes {metrics['prior_bits_per_index']:.2f} bits, {metrics['adaptive_bits_per_index']:.2f} under the"
        " adaptive model of coded files. Indices drawn from it decode to new clips.",
        Picture("prior/curves.png", "Bits per index over the steps of the prior's training"),
        Media(f"{MEDIA}/samples", "Samples of the prior"),
        Picture("samples.png", "Samples of the prior beside held-out clips"),
        "The first frames of held-out clips can be continued: below each clip, the decoded one and a continuation from"
        " its first positions.",
        Media(f"{MEDIA}/completions", "Held-out clips, decoded, and continued by the prior"),
        Picture("completions.png", "Held-out clips, continued three times from their first frames"),
        Picture("neighbors.png", "Samples and their nearest training clips"),
    ]
    files: list[Part] = [
        f"The {metrics['test_clips']} held-out clips in one file. Formats hold all clips on one sheet, which saves"
        f" headers; their pixels take {metrics['pixel_bytes']:,} bytes. Each lossy format has its smallest file, and"
        " the smallest that is as good as the decoded clips.",
        TextTable(["held-out clips as", "bytes", "PSNR"], rows),
    ]
    made = (
        f"`fastvq demo video`: {metrics['total_seconds']:.0f} s on {metrics['threads']} threads, of which"
        f" {metrics['seconds']:.0f} s for {metrics['steps']} steps of the VQ-VAE. All numbers: `metrics.json`."
    )
    return write_page(
        folder,
        "From clips to indices, to new clips and small files",
        f"A VQ-VAE was trained on {metrics['train_clips']} clips ({metrics['data']}).",
        [
            Section("1. A clip becomes a few indices", clips),
            Section("2. The distribution of the indices: the prior", prior),
            Section("3. Small files", files),
            Section("How this was made", [made]),
        ],
    )
