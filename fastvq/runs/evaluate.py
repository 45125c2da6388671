"""Evaluation of a run on a set of images: quality, bits, use of the codebook, and intervals by bootstrap.

The protocol is in docs/evaluation.md; `measures` has the measures of images.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvq
from fastvq.data import DATA_SETS, Images
from fastvq.data.images import to_float
from fastvq.errors import DataError, aligned, counted
from fastvq.extras import Progress
from fastvq.files import StrPath, write_whole
from fastvq.models import NoBottleneck
from fastvq.training.build import load_images
from fastvq.training.checkpoint import load_latest
from fastvq.training.config import TrainConfig
from fastvq.training.evaluation import psnr_db

from .load import run_images
from .measures import image_measures, versions
from .outputs import check_ending
from .trained import TrainedModel, load

FILE = "evaluation.json"
"""Name of the file in the folder of a run that has its latest evaluation."""
RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0
_BATCH = 100
_DRAWN = 1 << 24
"""Limit of the numbers that a part of the bootstrap holds."""
LABELS = {
    "psnr_db": "PSNR of the mean squared error (dB)",
    "psnr_db_mean": "PSNR, mean over images (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS (AlexNet)",
    "rfid": "rFID",
    "bits_per_index": "bits per index, stored",
    "prior_bits_per_index": "bits per index under the prior",
    "bits_per_dimension": "bits per dimension, stored",
    "prior_bits_per_dimension": "bits per dimension under the prior",
    "usage": "usage, share of codes chosen",
    "perplexity": "perplexity",
}
"""Measures in the order of the table, by their names in the JSON file."""
_DECIMALS = {
    "psnr_db": 2,
    "psnr_db_mean": 2,
    "rfid": 2,
    "bits_per_index": 3,
    "prior_bits_per_index": 3,
    "perplexity": 1,
}


@dataclass(frozen=True)
class _Sums:
    """Results of one pass over the images: numbers for each image, and counts over all."""

    per_image: dict[str, Tensor]  # (N,) float64 each; squared_error is the mean over the pixels of an image
    counts: tuple[Tensor, ...]  # (K,) int64 for each codebook
    sizes: tuple[int, ...]  # K of each codebook
    stage_indices: tuple[int, ...]  # number of indices of an image in each codebook
    rfid: float | None

    @property
    def indices_per_image(self) -> int:
        return sum(self.stage_indices)


def evaluate_run(
    run: StrPath,
    out: StrPath | None = None,
    *,
    data: StrPath | None = None,
    device: str = "cpu",
    download: bool = False,
) -> list[str]:
    """Measure a run on images, write the results as JSON and return the lines of a table.

    Args:
        run: folder of the run.
        out: the JSON file; by default `FILE` in the folder of the run.
        data: other images: a name in `DATA_SETS`, whose held-out images are taken, or a folder, all of whose images are
            taken. By default, and where they are the data of the run, which may have moved, its held-out images.
        device: torch device of the models.
        download: download the weights that LPIPS and rFID need.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
        ConfigError: an ending of `out` other than .json, or a device that cannot be used.
        DataError: the data are missing, unreadable, or, where they are the run's, others than it was trained on.
    """
    out = Path(run) / FILE if out is None else Path(out)
    check_ending(out, [".json"])
    model = load(run, device=device)
    name, parts, labels, digest = _images(run, model, data)
    record = _evaluate(model, parts, labels, download=download)
    step = load_latest(run).step
    about = {"run": str(run), "step": step, "data": name, "fingerprint": digest}
    write_whole(out, json.dumps(about | record, indent=2) + "\n")
    return [f"{name}: {counted(record['images'], 'image')}", "", *table(record), "", f"numbers: {out}"]


def table(record: dict[str, Any]) -> list[str]:
    """Return the measures of an evaluation as lines in columns; refused ones with the reason."""
    rows = [("measure", "value", f"{record['confidence']:.0%} interval"), *rows_of(record)]
    refused = [f"{LABELS[name]}: not measured, {reason}" for name, reason in record["refused"].items()]
    lines = aligned(rows, right=[1])
    return [*lines, *([""] if refused else []), *refused]


def rows_of(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (measure, value, interval) of each measure that was taken, as texts."""
    rows = []
    for name, label in LABELS.items():
        measured = record["measures"].get(name)
        if measured is not None:
            low, high = measured.get("low"), measured.get("high")
            interval = "" if low is None else f"{_number(name, low)} to {_number(name, high)}"
            rows.append((label, _number(name, measured["value"]), interval))
            rows += [
                (f"  of codebook {number}", _number(name, value), "")
                for number, value in enumerate(measured.get("codebooks", ()), start=1)
            ]
    return rows


def _number(name: str, value: float) -> str:
    return f"{value:.{_DECIMALS.get(name, 4)}f}"


def _images(
    run: StrPath, model: TrainedModel, data: StrPath | None
) -> tuple[str, list[Tensor], list[Tensor] | None, str]:
    """Return a name, the images as parts (N, C, H, W), labels that fit the prior, and a fingerprint."""
    if data is None:
        images = run_images(run)
        return _held_out(images)
    other = str(data) if str(data) in DATA_SETS else str(Path(data).resolve())
    config, own = model.config, model.config.image_format()
    known = DATA_SETS.get(other)
    if known and (known.image_size, known.image_size, known.grayscale) != (own.height, own.width, own.grayscale):
        theirs = f"{known.image_size} x {known.image_size}, {_color(known.grayscale)}"
        ours = f"{own.height} x {own.width}, {_color(own.grayscale)}"
        raise DataError(f"data: {other} has images of {theirs}; the run learned from {ours}")
    as_they_are: dict[str, Any] = {"fit": TrainConfig.fit, "crop_from": None} if known else {}
    images = load_images(dataclasses.replace(config, data=other, skip_unreadable=True, **as_they_are), progress=True)
    if other in DATA_SETS or images.fingerprint() == load_latest(run).data_fingerprint:
        return _held_out(images)
    return f"{images.name}, all images", [images.train, images.test], None, images.fingerprint()


def _color(grayscale: bool) -> str:
    return "gray" if grayscale else "in color"


def _held_out(images: Images) -> tuple[str, list[Tensor], list[Tensor] | None, str]:
    labels = None if images.test_labels is None else [images.test_labels]
    return f"{images.name}, held-out images", [images.test], labels, images.fingerprint()


def _evaluate(
    model: TrainedModel, parts: Sequence[Tensor], labels: Sequence[Tensor] | None, *, download: bool
) -> dict[str, Any]:
    """Return the measures of a model on images, and how they were taken."""
    count, shape = sum(map(len, parts)), tuple(parts[0].shape[1:])
    sums, refused = _pass_over(model, parts, labels, count, download=download)
    measures: dict[str, dict[str, Any]] = {}
    for name, values in sums.per_image.items():
        if name != "squared_error":
            measures[name] = _with_interval(values)
    error = _with_interval(sums.per_image["squared_error"])
    # The interval of a decreasing function of the error has its ends the other way round.
    measures["psnr_db"] = {
        name: psnr_db(error[of]) for name, of in (("value", "value"), ("low", "high"), ("high", "low")) if of in error
    }
    dimensions = math.prod(shape)
    if sums.indices_per_image:
        stored = sum(n * math.log2(size) for n, size in zip(sums.stage_indices, sums.sizes, strict=True))
        measures["bits_per_index"] = {"value": stored / sums.indices_per_image}
        measures["bits_per_dimension"] = {"value": stored / dimensions}
        usages = [float(fastvq.usage(counts)) for counts in sums.counts]
        perplexities = [float(fastvq.perplexity(counts)) for counts in sums.counts]
        measures["usage"] = {"value": sum(usages) / len(usages)}
        measures["perplexity"] = {"value": sum(perplexities) / len(perplexities)}
        if len(sums.sizes) > 1:
            measures["usage"]["codebooks"] = usages
            measures["perplexity"]["codebooks"] = perplexities
    if "prior_bits" in measures:
        bits = measures.pop("prior_bits")
        for name, divisor in (("index", sums.indices_per_image), ("dimension", dimensions)):
            measures[f"prior_bits_per_{name}"] = {end: value / divisor for end, value in bits.items()}
    if sums.rfid is not None:
        measures["rfid"] = {"value": sums.rfid}
    return {
        "images": count,
        "size": list(shape),
        "codebook_sizes": list(sums.sizes),
        "indices_per_image": sums.indices_per_image,
        "measures": {name: measures[name] for name in LABELS if name in measures},
        "refused": refused,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "versions": {"fastvq": fastvq.__version__, **versions()},
    }


@torch.no_grad()
def _pass_over(
    model: TrainedModel, parts: Sequence[Tensor], labels: Sequence[Tensor] | None, count: int, *, download: bool
) -> tuple[_Sums, dict[str, str]]:
    """Encode and decode all images once; return what was measured, and why the rest was not."""
    height, width = parts[0].shape[-2:]
    taken = image_measures((height, width), count, model.device, download=download)
    refused = dict(taken.refused)
    without = isinstance(model.vqvae.bottleneck, NoBottleneck)
    adapter = model.vqvae.adapter
    sizes = () if without else adapter.stage_sizes()
    prior = model.prior
    if without:
        refused |= dict.fromkeys(("bits_per_index", "usage", "perplexity"), "the run was trained without a bottleneck")
    elif prior is None:
        refused["prior_bits_per_index"] = model.no_prior
    values: dict[str, list[Tensor]] = {}
    counts = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    stage_indices: tuple[int, ...] = ()
    with Progress(count, "image") as progress:
        for pixels, classes in _batches(parts, labels if prior is not None and prior.classes else None):
            originals = to_float(pixels.to(model.device))
            if without:
                restored = model.reconstruct(originals)
            else:
                indices = model.encode(originals)
                restored = model.decode(indices)
                stages = [chosen.flatten(1) for chosen in adapter.stages(indices.cpu())]
                stage_indices = tuple(chosen.shape[1] for chosen in stages)
                for own, chosen in zip(counts, stages, strict=True):
                    own += torch.bincount(chosen[chosen >= 0], minlength=len(own))
                if prior is not None:
                    given = None if classes is None else classes.to(model.device)
                    values.setdefault("prior_bits", []).append(prior.bits(indices, given).cpu())
            error = (restored - originals).square().flatten(1).mean(1, dtype=torch.float64)
            values.setdefault("squared_error", []).append(error.cpu())
            for name, measure in taken.per_image.items():
                values.setdefault(name, []).append(measure(restored, originals).double().reshape(-1).cpu())
            if taken.rfid is not None:
                taken.rfid.update(restored, originals)
            progress.update(len(pixels))
    rfid = None if taken.rfid is None else taken.rfid.result()
    per_image = {name: torch.cat(own) for name, own in values.items()}
    return _Sums(per_image, tuple(counts), sizes, stage_indices, rfid), refused


def _batches(parts: Sequence[Tensor], labels: Sequence[Tensor] | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for number, part in enumerate(parts):
        for first in range(0, len(part), _BATCH):
            own = None if labels is None else labels[number][first : first + _BATCH]
            yield part[first : first + _BATCH], own


def _with_interval(values: Tensor) -> dict[str, float]:
    """Return the mean of numbers (N,), and the ends of its interval; of one number, the mean alone."""
    if len(values) < 2:
        return {"value": values.mean().item()}
    means = bootstrap_means(values)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {"value": values.mean().item(), "low": low, "high": high}


def bootstrap_means(values: Tensor) -> Tensor:
    """Return the means (RESAMPLES,) of resamples of numbers (N,), drawn with replacement from a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    rows = max(1, _DRAWN // len(values))
    means = []
    for first in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - first), len(values))
        means.append(values[torch.randint(len(values), shape, generator=generator)].mean(1))
    return torch.cat(means)
