"""Demo of text to image, in four parts.

A VQ-VAE on the shipped emoji, one transformer over their captions and indices, two contrastive models of which one
ranks samples and the other judges them, and samples of captions that were learned, held out and made up.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.data import Examples
from fastvq.data.examples import describe, to_float
from fastvq.files import StrPath, write_whole
from fastvq.modalities import ImageConfig
from fastvq.models import VQVAE, ContrastiveModel, TextPrior
from fastvq.models.contrastive import retrieval
from fastvq.models.text import first_caption
from fastvq.runs import plots
from fastvq.runs.contrast import train_contrastive
from fastvq.runs.load import load_model
from fastvq.runs.page import Part, Picture, Section, TextTable, write_page
from fastvq.runs.pictures import failures_as_warnings, spread
from fastvq.runs.sample_pictures import nearest_images
from fastvq.runs.train_prior import TrainedPrior
from fastvq.training.build import load_examples
from fastvq.training.config import ContrastiveConfig, PriorConfig
from fastvq.training.prior import bits_per_index

from .folder import JUDGE, METRICS, check_request, demo_folder
from .parts import announce, train_model_and_prior, with_steps

DEMO = ImageConfig(
    data="noto-emoji",
    image_size=32,
    grayscale=False,
    flip=False,
    steps=2400,
    evaluate_every=600,
    checkpoint_every=600,
)
DEMO_PRIOR = PriorConfig(
    text=True,
    text_vocabulary=2048,
    text_length=16,
    corruption=0.6,
    steps=2600,
    batch_size=16,
    evaluate_every=650,
    checkpoint_every=650,
)
DEMO_CONTRASTIVE = ContrastiveConfig(steps=300, evaluate_every=150, checkpoint_every=150)
SAMPLING: dict[str, Any] = {"guidance": 2.0, "top_p": 0.9}
DRAWN = 8
"""Samples that are drawn for each caption; the ranking chooses among them."""
JUDGED = 100
"""Largest number of captions, learned and held out ones each, that samples are drawn for."""
LEARNED = ("red heart", "grinning face", "green apple", "full moon", "blue circle", "cat face", "hot dog", "rocket")
MADE_UP = (
    "blue apple",
    "green star",
    "red moon",
    "purple cat face",
    "grinning moon",
    "angry frog",
    "blue cloud",
    "black cat face",
)
"""Captions of a picture: learned ones, and combinations of learned words that no emoji has."""
_SHOWN, _NEIGHBORS = 8, 4
_PARTS = [
    ("training a VQ-VAE of emoji", 270),
    ("training a transformer over captions and indices", 225),
    ("training two contrastive models", 60),
    ("drawing and judging samples", 20),
]
"""Description of each part, and its approximate time in seconds on 2 idle cores."""


class _Split(NamedTuple):
    """Captions with their images, and what is drawn for them.

    Attributes:
        captions: the first caption of each image.
        images: (N, C, H, W), float in [0, 1].
        drawn: (N, DRAWN, C, H, W), samples of each caption.
        best: (N, C, H, W), of these the most similar to the caption by the model that ranks.
    """

    captions: list[str]
    images: Tensor
    drawn: Tensor
    best: Tensor


def run_demo(
    folder: StrPath,
    *,
    config: ImageConfig | None = None,
    steps: int | None = None,
    prior_config: PriorConfig | None = None,
    prior_steps: int | None = None,
    contrastive_config: ContrastiveConfig | None = None,
    contrastive_steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, measure and draw; return the content of metrics.json, or None if interrupted.

    Args:
        folder: gets `index.html`, the pictures, `metrics.json` and what a run, its prior and its contrastive models
            consist of.
        config: settings of the VQ-VAE, by default `DEMO`. steps: its training steps, instead of those in `config`.
        prior_config, prior_steps: the same of the prior, by default `DEMO_PRIOR`.
        contrastive_config, contrastive_steps: the same of the contrastive models, by default `DEMO_CONTRASTIVE`.
        resume, overwrite: see `fastvq.demo.images.run_demo`.

    Raises:
        CheckpointError, ConfigError: see `fastvq.demo.images.run_demo`.
    """
    folder, config = Path(folder), with_steps(config or DEMO, steps)
    prior_config = with_steps(prior_config or DEMO_PRIOR, prior_steps)
    contrastive_config = with_steps(contrastive_config or DEMO_CONTRASTIVE, contrastive_steps)
    check_request(resume=resume, overwrite=overwrite)
    emoji = load_examples(config)
    with demo_folder(folder, resume=resume, overwrite=overwrite):
        return _run(folder, emoji, config, prior_config, contrastive_config, resume=resume)


def _run(
    folder: Path,
    emoji: Examples,
    config: ImageConfig,
    prior_config: PriorConfig,
    contrastive_config: ContrastiveConfig,
    *,
    resume: bool,
) -> dict[str, Any] | None:
    """Run the four parts in a folder without a demo, or continue the one that is there."""
    started = time.monotonic()
    print(describe(emoji), flush=True)

    parts = train_model_and_prior(_PARTS, folder, emoji, config, prior_config, resume=resume)
    if parts is None:
        return None
    evaluation, trained = parts.evaluation, parts.prior

    announce(_PARTS, 3)
    ranking = train_contrastive(folder, contrastive_config, resume=resume)
    if ranking is None:
        return None
    other = dataclasses.replace(contrastive_config, seed=contrastive_config.seed + 1)
    judge = train_contrastive(folder, other, folder=folder / JUDGE, resume=resume)
    if judge is None:
        return None

    announce(_PARTS, 4)
    model, _ = load_model(folder)
    prior = trained.prior
    assert isinstance(prior, TextPrior)
    rows = {"train": _captioned(emoji.train_captions), "test": _captioned(emoji.test_captions)}
    splits = {
        "train": _draw_split(prior, model, ranking.model, emoji.train, emoji.train_captions, rows["train"]),
        "test": _draw_split(prior, model, ranking.model, emoji.test, emoji.test_captions, rows["test"]),
    }
    judged = {name: _judge(judge.model, model, split) for name, split in splits.items()}
    copies = _picture(folder, prior, model, ranking.model, emoji, splits)
    metrics: dict[str, Any] = {
        "data": emoji.name,
        "train_images": len(emoji.train),
        "test_images": len(emoji.test),
        "psnr_db": evaluation.value,
        "perplexity": evaluation.perplexity,
        "prior_bits_per_index": trained.bits_per_index,
        "prior_bits_with_other_captions": _bits_with_other_captions(trained),
        "contrastive_retrieval": [ranking.retrieval, judge.retrieval],
        "candidates": {name: len(split.captions) for name, split in splits.items()},
        "drawn": DRAWN,
        "sampling": SAMPLING,
        "retrieval": judged,
        "copies": copies,
        "contrastive_steps": contrastive_config.steps,
        "total_seconds": round(time.monotonic() - started, 1),
        **parts.facts(),
    }
    write_whole(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    print(f"all pictures and tables: {_write_page(folder, metrics)}")
    return metrics


def _bits_with_other_captions(trained: TrainedPrior) -> float:
    """Return bits per held-out index given captions of other images; where they are not used, it is that of the own."""
    labels = trained.data.test_labels
    assert labels is not None
    return bits_per_index(trained.prior, trained.data.test, labels.roll(len(labels) // 2, 0))


def _captioned(captions: Sequence[str] | None) -> list[int]:
    """Return the rows of at most `JUDGED` examples with captions, evenly spread."""
    rows = [row for row, text in enumerate(captions or ()) if first_caption(text)]
    return [rows[place] for place in spread(len(rows), JUDGED)]


def _draw_split(
    prior: TextPrior,
    model: VQVAE,
    ranking: ContrastiveModel,
    stored: Tensor,
    captions: Sequence[str] | None,
    rows: list[int],
) -> _Split:
    """Draw samples of the captions of some examples, and rank them."""
    texts = [first_caption((captions or ())[row]) for row in rows]
    drawn = draw_captions(prior, model, texts, DRAWN)
    return _Split(texts, to_float(stored[rows]), drawn, ranked(ranking, drawn, texts)[:, 0])


@torch.no_grad()
def draw_captions(prior: TextPrior, model: VQVAE, captions: list[str], count: int, *, seed: int = 0) -> Tensor:
    """Return `count` samples of each caption, (N, count, C, H, W) in [0, 1]."""
    assert prior.tokenizer is not None
    text = prior.tokenizer.rows(captions)[:, 0].repeat_interleave(count, 0)
    generator = torch.Generator().manual_seed(seed)
    parts = [model.restore(prior.sample(len(part), part, generator=generator, **SAMPLING)) for part in text.split(100)]
    return torch.cat(parts).clamp(0, 1).unflatten(0, (len(captions), count))


@torch.no_grad()
def ranked(ranking: ContrastiveModel, drawn: Tensor, captions: list[str]) -> Tensor:
    """Return samples (N, count, C, H, W) with those of each caption in the order of their similarity to it."""
    assert ranking.tokenizer is not None
    texts = ranking.texts(ranking.tokenizer.rows(captions)[:, 0])
    images = ranking.images(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
    order = (images @ texts[:, :, None])[..., 0].argsort(1, descending=True)
    return drawn[torch.arange(len(drawn))[:, None], order]


def _judge(judge: ContrastiveModel, model: VQVAE, split: _Split) -> dict[str, list[float]]:
    """Return how often the judge finds the caption of a picture nearest, and among the nearest five, of a split's."""
    assert judge.tokenizer is not None
    captions = judge.tokenizer.rows(split.captions)[:, 0]
    with torch.no_grad():
        decoded = model.reconstruct(split.images)
    pictures = {"real": split.images, "decoded": decoded, "first sample": split.drawn[:, 0], "best sample": split.best}
    return {
        name: [retrieval(judge, images, captions, among=among) for among in (1, 5)] for name, images in pictures.items()
    }


def _picture(
    folder: Path,
    prior: TextPrior,
    model: VQVAE,
    ranking: ContrastiveModel,
    emoji: Examples,
    splits: dict[str, _Split],
) -> int:
    """Draw the grids of captions and samples; return how many of the best samples of held-out captions are copies.

    A copy differs from a training image by at most twice what decoding changes in one, in the median.
    """
    columns = ["real", *["drawn"] * 3, *["best"] * 3]
    learned = {first_caption(text): row for row, text in enumerate(emoji.train_captions or ())}
    rows = [learned[name] for name in LEARNED if name in learned]
    shown = _draw_split(prior, model, ranking, emoji.train, emoji.train_captions, rows) if rows else splits["train"]
    few = spread(len(splits["test"].captions), _SHOWN)
    held_out = _Split([splits["test"].captions[row] for row in few], *(part[few] for part in splits["test"][1:]))
    for name, split in (("learned", shown), ("held-out", held_out)):
        order = ranked(ranking, split.drawn, split.captions)
        grid = torch.cat([split.images[:, None], split.drawn[:, :3], order[:, :3]], 1)
        with failures_as_warnings(f"picture of {name} captions"):
            _grid(folder / f"{name}.png", grid, split.captions, columns, f"Samples of {name} captions")
    drawn = draw_captions(prior, model, list(MADE_UP), DRAWN)
    order = ranked(ranking, drawn, list(MADE_UP))
    made_up = torch.cat([drawn[:, :3], order[:, :3]], 1)
    with failures_as_warnings("picture of new combinations"):
        _grid(folder / "combinations.png", made_up, MADE_UP, columns[1:], "Samples of combinations that no emoji has")
    with failures_as_warnings("picture of captions"):
        plots.save_samples(
            folder / "captions.png",
            torch.cat([shown.best, order[:, 0]]),
            [*shown.captions, *MADE_UP],
            title="",
            caption="",
            columns=len(shown.captions),
        )
    everything = splits["test"].best
    nearest = nearest_images(everything, emoji.train, _NEIGHBORS, mirrored=False)
    with failures_as_warnings("picture of neighbors"):
        grid = torch.cat([everything[few, None], nearest[few]], 1)
        names = ["best", "nearest", *(f"{number}." for number in range(2, _NEIGHBORS + 1))]
        _grid(folder / "neighbors.png", grid, held_out.captions, names, "Samples and their nearest training images")
    with torch.no_grad():
        error = (model.reconstruct(splits["train"].images) - splits["train"].images).square().mean((1, 2, 3)).median()
    return int(((nearest[:, 0] - everything).square().mean((1, 2, 3)) <= 2 * error).sum())


def _grid(path: Path, grid: Tensor, captions: Sequence[str], columns: Sequence[str], title: str) -> None:
    caption = f"Best: those of {DRAWN} samples that a contrastive model finds most similar to the caption."
    plots.save_grid(path, list(grid), captions, columns, title=title, caption=caption, captioned=False)


def _write_page(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write the page beside the pictures that it shows, and return its path."""
    kinds = ("real", "decoded", "first sample", "best sample")
    names = {"train": "learned", "test": "held out"}
    rows = [
        [f"{names[split]}, {kind}", *(f"{share:.0%}" for share in metrics["retrieval"][split][kind])]
        for split in names
        for kind in kinds
    ]
    chance = 1 / max(1, metrics["candidates"]["test"])
    codec: list[Part] = [
        f"A VQ-VAE turns an emoji of 32x32 pixels into 8x8 indices of 512 codes; held-out emoji are decoded with"
        f" {metrics['psnr_db']:.2f} dB.",
        Picture("reconstructions.png", "Held-out emoji above their reconstructions"),
        Picture("indices.png", "Emoji, their indices as colored grids, and the reconstructions from them"),
    ]
    prior: list[Part] = [
        f"One transformer reads the caption as up to {DEMO_PRIOR.text_length} text indices and then predicts the 64"
        " indices of its image, one after the other; an eighth of its loss is the text's. A tenth of the captions is"
        " left out while it learns, so that samples can be guided towards a caption: they are drawn with guidance"
        f" {metrics['sampling']['guidance']:g} and top-p {metrics['sampling']['top_p']:g}. Random indices replace some"
        " of those that it sees, so that it relies on the caption. A held-out index takes"
        f" {metrics['prior_bits_per_index']:.2f} bits, given its caption, and"
        f" {metrics['prior_bits_with_other_captions']:.2f} given that of another image; log2 512 is 9."
        " The training is short, and most words have one or two images; `--prior-steps N` lengthens it.",
        Picture("prior/curves.png", "Bits per index over the steps of the prior's training"),
        "Learned captions above, and below combinations that no emoji has. Each picture is the best of"
        f" {metrics['drawn']} samples:",
        Picture("captions.png", "Best samples of learned captions and of new combinations"),
        f"Captions that were learned: the emoji, the first three of {metrics['drawn']} samples, and the best three.",
        Picture("learned.png", "Learned captions: emoji and samples"),
        "Captions that were held out. A word that no other caption has says nothing to the prior:",
        Picture("held-out.png", "Held-out captions: emoji and samples"),
        "Combinations of learned words that no emoji has:",
        Picture("combinations.png", "Samples of combinations that no emoji has"),
        f"The best samples of held-out captions beside the nearest training images. {metrics['copies']} of"
        f" {metrics['candidates']['test']} are copies: they differ from a training image by at most twice what decoding"
        " changes in one.",
        Picture("neighbors.png", "Samples and their nearest training images"),
    ]
    judged: list[Part] = [
        "A contrastive model gives an image and a caption vectors, near each other where they belong together. One"
        f" ranks the {metrics['drawn']} samples of a caption; another one, trained from another seed, judges: how often"
        f" is the caption of a picture the nearest among {metrics['candidates']['test']} held-out ones, or"
        f" {metrics['candidates']['train']} learned ones, and how often among the nearest five? By chance the former is"
        f" {chance:.0%}. The figures of real images say how far the judge can be trusted.",
        TextTable(["captions and pictures", "nearest", "among five"], rows),
    ]
    made = (
        f"`fastvq demo text`: {metrics['total_seconds']:.0f} s on {metrics['threads']} threads in its last process;"
        f" {metrics['steps']} steps of the VQ-VAE, {metrics['prior_steps']} of the prior, and twice"
        f" {metrics['contrastive_steps']} of the contrastive models. All numbers: `metrics.json`."
    )
    return write_page(
        folder,
        "From a text to an image",
        f"A small DALL-E learned from {metrics['train_images']} images with captions ({metrics['data']}), and"
        f" {metrics['test_images']} were held out.",
        [
            Section("1. An emoji becomes 64 indices", codec),
            Section("2. Captions and indices: the prior", prior),
            Section("3. Does an image show its caption?", judged),
            Section("How this was made", [made]),
        ],
    )
