"""Demo of audio, in four parts.

A codec of music loops, a prior over its indices, samples and continuations, and the quality at each bit rate beside
Opus and Codec2.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq.data import Examples
from fastvq.data.examples import describe, to_float
from fastvq.errors import counted
from fastvq.files import StrPath, write_whole
from fastvq.modalities import AudioConfig, modality_of
from fastvq.runs import figures
from fastvq.runs.encode import encode_held_out
from fastvq.runs.load import load_model
from fastvq.runs.page import Media, Part, Picture, Section, TextTable, write_page
from fastvq.runs.pictures import MEDIA, picture_decoded, shown_rows
from fastvq.runs.sample_pictures import picture_prior_samples
from fastvq.training.build import load_examples
from fastvq.training.config import PriorConfig
from fastvq.training.evaluation import reconstruct

from .folder import METRICS, check_request, demo_folder
from .parts import announce, train_model_and_prior, with_steps
from .rates import Rates, other_rates, rate_that_reaches, stage_rates

DEMO = AudioConfig(**AudioConfig.presets["codec"])
DEMO_PRIOR = PriorConfig(
    pattern="delay", steps=300, batch_size=16, learning_rate=2e-3, dropout=0.2, evaluate_every=100, checkpoint_every=100
)
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
_PARTS = [
    ("training a codec of music loops", 60),
    ("training a prior over the indices", 150),
    ("samples and continuations", 15),
    ("the quality at each bit rate, beside Opus and Codec2", 20),
]
"""Description of each part, and its approximate time in seconds on 2 idle cores."""
_SHOWN = 8
_CLIPS = "clips.fvq"


def run_demo(
    folder: StrPath,
    *,
    config: AudioConfig | None = None,
    steps: int | None = None,
    prior_config: PriorConfig | None = None,
    prior_steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, measure and draw; return the content of metrics.json, or None if interrupted.

    Args:
        folder: gets `index.html`, the pictures and sounds, `metrics.json`, `clips.fvq` and what a run and its prior
            consist of.
        config: settings of the codec, by default `DEMO`; its bottleneck is a residual quantizer.
        steps: training steps of the codec, instead of those in `config`.
        prior_config: settings of the prior, by default `DEMO_PRIOR`.
        prior_steps: training steps of the prior, instead of those in `prior_config`.
        resume: continue an interrupted demo.
        overwrite: replace the demo that is in the folder, see `demo_folder`.

    Raises:
        CheckpointError: see `demo_folder`; or `resume` and there is nothing to continue.
        ConfigError: `resume` and the settings differ from those of the demo, other than by more steps.
    """
    folder, config = Path(folder), with_steps(config or DEMO, steps)
    prior_config = with_steps(prior_config or DEMO_PRIOR, prior_steps)
    check_request(resume=resume, overwrite=overwrite)
    clips = load_examples(config)
    with demo_folder(folder, resume=resume, overwrite=overwrite):
        return _run(folder, clips, config, prior_config, resume=resume)


def _run(
    folder: Path, clips: Examples, config: AudioConfig, prior_config: PriorConfig, *, resume: bool
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
    originals = to_float(clips.test)
    _, indices = reconstruct(model, originals)
    assert indices is not None
    stages, rows = _doubled(len(model.adapter.stage_sizes())), shown_rows(clips, _SHOWN)
    picture_decoded(
        folder / "stages.png",
        model,
        config,
        clips,
        rows,
        {counted(count, "stage"): indices[rows][..., :count] for count in stages},
        title=f"{clips.name}: held-out clips, decoded from their leading stages",
        caption="Log-mel spectrograms, high frequencies above, black at -80 dB. Each stage refines what the stages"
        " before it say.",
    )
    others, missing = other_rates(originals, sample_rate=config.sample_rate)
    rates = [*stage_rates(model, indices, originals, stages, sample_rate=config.sample_rate), *others]
    silence = modality_of("audio").objective(config).errors(torch.zeros_like(originals), originals)
    _draw_rates(folder / "rates.png", rates, missing, float(silence.mean()))
    print("\n".join(encode_held_out(folder, folder / _CLIPS, model="prior")), flush=True)
    seconds = len(clips.test) * config.clip_length / config.sample_rate
    metrics: dict[str, Any] = {
        "data": clips.name,
        "train_clips": len(clips.train),
        "test_clips": len(clips.test),
        "clip_seconds": config.clip_length / config.sample_rate,
        "sample_rate": config.sample_rate,
        "grid": list(model.adapter.index_shape(config.feature_grid)),
        "codebook_size": config.codebook_size,
        "log_mel_db": evaluation.value,
        "silence_log_mel_db": float(silence.mean()),
        "rates": rates,
        "missing": missing,
        "equal_kbit_s": {codec: rate_that_reaches(rates, codec, evaluation.value) for codec in ("Opus", "Codec2")},
        "perplexity": [float(fastvq.perplexity(counts)) for counts in evaluation.stage_counts],
        "usage": [float(fastvq.usage(counts)) for counts in evaluation.stage_counts],
        "prior_bits_per_index": trained.bits_per_index,
        "prior_bytes": (folder / _CLIPS).stat().st_size,
        "prior_kbit_s": 8 * (folder / _CLIPS).stat().st_size / seconds / 1000,
        "total_seconds": round(time.monotonic() - started, 1),
        **parts.facts(),
    }
    write_whole(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    print(f"all pictures, sounds and tables: {_write_page(folder, metrics)}")
    return metrics


def _doubled(most: int) -> list[int]:
    """Return 1, 2, 4 ... below a number, and the number."""
    return [count for count in (1 << n for n in range(most.bit_length())) if count < most] + [most]


def _draw_rates(path: Path, rates: Rates, missing: list[str], silence_db: float) -> None:
    """Draw both measures over the bit rates of each codec."""
    figure, panels = figures.figure_with(9.5, 3.8, "", "", columns=2)
    codecs = list(dict.fromkeys(rate["codec"] for rate in rates))
    for axes, key, label in zip(panels, ("log_mel_db", "si_sdr_db"), ("log-mel distance", "SI-SDR"), strict=True):
        for color, codec in zip(figures.SERIES, codecs, strict=False):
            own = [rate for rate in rates if rate["codec"] == codec and rate[key] is not None]
            if own:
                points = [rate["kbit_s"] for rate in own], [rate[key] for rate in own]
                axes.semilogx(*points, marker="o", color=color, label=codec)
        axes.set_xlabel("kbit/s")
        axes.set_ylabel(f"{label} (dB)")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, which="both")
    panels[0].axhline(silence_db, color="gray", linestyle=":", label="silence")
    panels[0].legend(fontsize=8)
    caption = (
        "Held-out clips at each bit rate: less log-mel distance is better, more SI-SDR is better. Codec2 makes phases"
        " up, so that its SI-SDR says nothing."
    )
    figures.save_figure(figure, path, " ".join([caption, *(f"{text}." for text in missing)]), "Quality and bit rate")


def _write_page(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write the page beside the pictures and sounds that it shows, and return its path."""
    positions, stages = metrics["grid"]
    rate = positions / metrics["clip_seconds"]
    ours = [one for one in metrics["rates"] if one["codec"] == "fastvq"]
    perplexities = [f"{value:.0f}" for value in metrics["perplexity"]]
    codec: list[Part] = [
        f"The encoder turns {metrics['clip_seconds']:.2f} seconds at {metrics['sample_rate'] / 1000:g} kHz into"
        f" {positions} vectors, {rate:g} a second. A residual quantizer of {stages} stages describes each vector: the"
        f" first stage chooses one of {metrics['codebook_size']} codes, each later one a code for what is still"
        f" missing. From all stages, {ours[-1]['kbit_s']:.1f} kbit/s, held-out clips are decoded with a log-mel"
        f" distance of {metrics['log_mel_db']:.2f} dB; digital silence has {metrics['silence_log_mel_db']:.2f} dB.",
        Picture("indices.png", "Spectrograms, below them the indices with a row for each stage, and what is decoded"),
        "Training left out later stages at random, so that one model serves all bit rates:",
        Picture("stages.png", "Held-out clips as decoded from 1, 2, 4 ... stages"),
        Media(f"{MEDIA}/stages", "Held-out clip"),
        Picture("usage.png", "Number of times that each code is chosen"),
        f"Perplexities of the stages on the held-out clips: {', '.join(perplexities)} of {metrics['codebook_size']}.",
        Picture("curves.png", "Loss, log-mel distance and perplexity over the training steps"),
    ]
    prior: list[Part] = [
        "A transformer predicts the indices of all stages in the delay pattern: each step gives one index of every"
        " stage, that of stage q for the position q places earlier. A held-out index takes"
        f" {metrics['prior_bits_per_index']:.2f} bits; the held-out clips in one file take"
        f" {metrics['prior_bytes']:,} bytes, {metrics['prior_kbit_s']:.1f} kbit/s in place of"
        f" {ours[-1]['kbit_s']:.1f}. Indices drawn from it decode to new sounds.",
        Picture("prior/curves.png", "Bits per index over the steps of the prior's training"),
        Picture("samples.png", "Samples of the prior beside held-out clips"),
        Media(f"{MEDIA}/samples", "Sample"),
        "The first halves of held-out clips are given, and the prior continues them:",
        Picture("completions.png", "Held-out clips, continued three times from their first halves"),
        Media(f"{MEDIA}/completions", "Held-out clip"),
        Picture("neighbors.png", "Samples and their nearest training clips"),
    ]
    reached = [
        f"{name} needs {rate:.1f} kbit/s for the log-mel distance of all stages."
        for name, rate in metrics["equal_kbit_s"].items()
        if rate is not None
    ]
    rows = [
        [
            one["name"] if one["codec"] != "fastvq" else f"indices, {one['name']}",
            f"{one['kbit_s']:.2f}",
            f"{one['log_mel_db']:.2f} dB",
            "" if one["si_sdr_db"] is None else f"{one['si_sdr_db']:.2f} dB",
        ]
        for one in metrics["rates"]
    ]
    curve: list[Part] = [
        "All held-out clips, one after the other, as one file of each codec; indices at log2 K bits each, without an"
        " entropy coder. Opus and Codec2 are made for any music or speech, this codec for these loops.",
        Picture("rates.png", "Log-mel distance and SI-SDR over the bit rate, beside Opus and Codec2"),
        *reached,
        *(f"{text}." for text in metrics["missing"]),
        TextTable(["held-out clips as", "kbit/s", "log-mel distance", "SI-SDR"], rows),
    ]
    made = (
        f"`fastvq demo audio`: {metrics['total_seconds']:.0f} s on {metrics['threads']} threads, of which"
        f" {metrics['seconds']:.0f} s for {metrics['steps']} steps of the codec. All numbers: `metrics.json`."
    )
    return write_page(
        folder,
        "From sounds to indices, to new sounds and a few kilobits a second",
        f"A codec was trained on {metrics['train_clips']} clips ({metrics['data']}), and measured on"
        f" {metrics['test_clips']} held-out ones.",
        [
            Section("1. A sound becomes a few indices", codec),
            Section("2. The distribution of the indices: the prior", prior),
            Section("3. Quality and bit rate", curve),
            Section("How this was made", [made]),
        ],
    )
