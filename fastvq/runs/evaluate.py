"""Evaluation of a run on a set of examples: quality, bits, use of the codebook, and intervals by bootstrap.

The protocol is in docs/evaluation.md; a modality has its measures.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvq
from fastvq import distributed
from fastvq.data import DATA_SETS, Examples
from fastvq.data.examples import to_float
from fastvq.errors import DataError, aligned, counted
from fastvq.extras import Progress
from fastvq.files import StrPath, write_whole
from fastvq.modalities import Modality, plural
from fastvq.modalities.base import Measure
from fastvq.models import Continuous, Prior
from fastvq.training import ranks
from fastvq.training.build import load_examples
from fastvq.training.checkpoint import load_latest

from .load import held_out_labels, run_examples
from .outputs import check_ending
from .trained import TrainedModel, load

FILE = "evaluation.json"
"""Name of the file in the folder of a run that has its latest evaluation."""
RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0
_BATCH = 100
_DRAWN = 1 << 24
"""Limit of the numbers that a part of the bootstrap holds."""
_OF_INDICES = {
    "bits_per_index": Measure("bits per index, stored", 3),
    "prior_bits_per_index": Measure("bits per index under the prior", 3),
    "bits_per_dimension": Measure("bits per dimension, stored"),
    "prior_bits_per_dimension": Measure("bits per dimension under the prior"),
    "usage": Measure("usage, share of codes chosen"),
    "perplexity": Measure("perplexity", 1),
}


def measures_of(modality: Modality) -> dict[str, Measure]:
    """Return the measures of a modality and those of indices, in the order of the table, by their names in the file."""
    return {**modality.measures, **_OF_INDICES}


@dataclass(frozen=True)
class _Sums:
    """Results of one pass over the examples: numbers for each example, and counts over all."""

    error: Tensor  # (N,) float64, the error of the objective
    per_example: dict[str, Tensor]  # (N,) float64 each
    counts: tuple[Tensor, ...]  # (K,) int64 for each codebook
    sizes: tuple[int, ...]  # K of each codebook
    stage_indices: tuple[int, ...]  # number of indices of an example in each codebook
    distances: dict[str, float]

    @property
    def indices_per_example(self) -> int:
        return sum(self.stage_indices)


def evaluate_run(
    run: StrPath,
    out: StrPath | None = None,
    *,
    data: StrPath | None = None,
    device: str = "cpu",
    download: bool = False,
) -> list[str]:
    """Measure a run on examples, write the results as JSON and return the lines of a table.

    Called by several processes of torchrun, each measures a part of the examples; rank 0 writes, and returns the lines.

    Args:
        run: folder of the run.
        out: the JSON file; by default `FILE` in the folder of the run.
        data: other examples: a name in `DATA_SETS`, whose held-out examples are taken, or a folder, all of whose files
            are taken. By default, and where they are the data of the run, which may have moved, its held-out ones.
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
    name, parts, labels, digest = ranks.rank_0_first(lambda: _examples(run, model, data))
    record = _evaluate(model, parts, labels, download=download)
    if not ranks.leads():
        return []
    step = load_latest(run).step
    about = {"run": str(run), "step": step, "data": name, "fingerprint": digest}
    write_whole(out, json.dumps(about | record, indent=2) + "\n")
    count = counted(record["examples"], *model.modality.noun)
    return [f"{name}: {count}", "", *table(record, model.modality), "", f"numbers: {out}"]


def table(record: dict[str, Any], modality: Modality) -> list[str]:
    """Return the measures of an evaluation as lines in columns; refused ones with the reason."""
    rows = [("measure", "value", f"{record['confidence']:.0%} interval"), *rows_of(record, modality)]
    refused = [
        f"{measures_of(modality)[name].label}: not measured, {reason}" for name, reason in record["refused"].items()
    ]
    lines = aligned(rows, right=[1])
    return [*lines, *([""] if refused else []), *refused]


def rows_of(record: dict[str, Any], modality: Modality) -> list[tuple[str, str, str]]:
    """Return (measure, value, interval) of each measure that was taken, as texts."""
    rows = []
    for name, measure in measures_of(modality).items():
        measured = record["measures"].get(name)
        if measured is not None:
            low, high = measured.get("low"), measured.get("high")
            interval = "" if low is None else f"{measure.number(low)} to {measure.number(high)}"
            fewer = f", of {measured['examples']} {modality.noun[1]}" if "examples" in measured else ""
            rows.append((measure.label + fewer, measure.number(measured["value"]), interval))
            rows += [
                (f"  of codebook {number}", measure.number(value), "")
                for number, value in enumerate(measured.get("codebooks", ()), start=1)
            ]
    return rows


def _examples(
    run: StrPath, model: TrainedModel, data: StrPath | None
) -> tuple[str, list[Tensor], list[Tensor] | None, str]:
    """Return a name, the examples as parts (N, C, *size), labels that fit the prior, and a fingerprint."""
    if data is None:
        examples = run_examples(run)
        return _held_out(examples, model.prior)
    other = str(data) if str(data) in DATA_SETS else str(Path(data).resolve())
    config, many = model.config, model.modality.noun[1]
    known = DATA_SETS.get(other)
    if known is None:
        theirs: dict[str, Any] = {}
    elif known.modality != config.modality or any(getattr(config, n) != v for n, v in known.settings.items()):
        ours = ", ".join(f"{name} {getattr(config, name, None)}" for name in known.settings)
        raise DataError(
            f"data: {other} has {plural(known.modality)}, {known.form}; the run learned from"
            f" {plural(config.modality)}, {ours}"
        )
    else:
        # As they are, whatever the run does with files.
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        theirs = {name: defaults[name] for name in ("fit", "crop_from", "image_width") if name in defaults}
    own = dataclasses.replace(config, data=other, skip_unreadable=True, **theirs)
    examples = load_examples(own, progress=True)
    if other in DATA_SETS or examples.fingerprint() == load_latest(run).data_fingerprint:
        return _held_out(examples, model.prior)
    return f"{examples.name}, all {many}", [examples.train, examples.test], None, examples.fingerprint()


def _held_out(examples: Examples, prior: Prior | None) -> tuple[str, list[Tensor], list[Tensor] | None, str]:
    given = None if prior is None else held_out_labels(prior, examples, torch.arange(len(examples.test)))
    labels = None if given is None else [given]
    return f"{examples.name}, held-out {examples.noun[1]}", [examples.test], labels, examples.fingerprint()


def _evaluate(
    model: TrainedModel, parts: Sequence[Tensor], labels: Sequence[Tensor] | None, *, download: bool
) -> dict[str, Any]:
    """Return the measures of a model on examples, and how they were taken."""
    count, shape = sum(map(len, parts)), tuple(parts[0].shape[1:])
    sums, refused = _pass_over(model, parts, labels, count, download=download)
    measures: dict[str, dict[str, Any]] = {}
    for name, values in sums.per_example.items():
        has_value = ~values.isnan()
        if has_value.any():
            measures[name] = _with_interval(values[has_value])
        else:
            refused[name] = f"it has a value for none of the {counted(count, *model.modality.noun)}"
        if has_value.any() and not has_value.all():
            measures[name]["examples"] = int(has_value.sum())
    objective = model.modality.objective(model.config)
    interval = {end: objective.value(error) for end, error in _with_interval(sums.error).items()}
    if interval.get("low", 0) > interval.get("high", 0):  # the measure falls with the error
        interval["low"], interval["high"] = interval["high"], interval["low"]
    measures[objective.measure] = interval
    dimensions = math.prod(shape)
    if sums.indices_per_example:
        stored = sum(n * math.log2(size) for n, size in zip(sums.stage_indices, sums.sizes, strict=True))
        measures["bits_per_index"] = {"value": stored / sums.indices_per_example}
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
        for name, divisor in (("index", sums.indices_per_example), ("dimension", dimensions)):
            measures[f"prior_bits_per_{name}"] = {end: value / divisor for end, value in bits.items()}
    measures |= {name: {"value": distance} for name, distance in sums.distances.items()}
    return {
        "examples": count,
        "size": list(shape),
        "codebook_sizes": list(sums.sizes),
        "indices_per_example": sums.indices_per_example,
        "measures": {name: measures[name] for name in measures_of(model.modality) if name in measures},
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
    """Encode and decode all examples once; return what was measured, and why the rest was not."""
    modality, config = model.modality, model.config
    objective = modality.objective(config).to(model.device)
    taken = modality.measures_of(config, count, model.device, download=download)
    refused = dict(taken.refused)
    if not ranks.alone():
        refused |= dict.fromkeys(taken.distances, "it needs all examples in one process")
        taken.distances.clear()
    without = isinstance(model.vqvae.bottleneck, Continuous)
    adapter = model.vqvae.adapter
    sizes = () if without else adapter.stage_sizes()
    prior = model.prior
    if without:
        refused |= dict.fromkeys(("bits_per_index", "usage", "perplexity"), f"the run {model.config.without_indices}")
    elif prior is None:
        refused["prior_bits_per_index"] = model.no_prior
    values: dict[str, list[Tensor]] = {}
    errors: list[Tensor] = []
    counts = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    stage_indices: tuple[int, ...] = ()
    batches = 0
    with Progress(count, modality.noun[0], shown=ranks.leads()) as progress:
        for number, (stored, classes) in enumerate(_batches(parts, labels)):
            progress.update(len(stored))
            batches += 1
            if number % distributed.world_size() != distributed.rank():
                continue
            originals = to_float(stored.to(model.device))
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
            errors.append(objective.errors(restored, originals).cpu())
            for name, measure in taken.per_example.items():
                values.setdefault(name, []).append(measure(restored, originals).double().reshape(-1).cpu())
            for distance in taken.distances.values():
                distance.update(restored, originals)
    distances = {name: distance.result() for name, distance in taken.distances.items()}
    per_example = {name: _of_all(own, batches) for name, own in _common(values).items()}
    ranks.sum_over_ranks_(*counts)
    stage_indices = max(ranks.gathered_objects(stage_indices), key=len)
    return _Sums(_of_all(errors, batches), per_example, tuple(counts), sizes, stage_indices, distances), refused


def _common(values: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return the lists of this rank for the names that any rank has: one without a batch has none."""
    names = dict.fromkeys(name for own in ranks.gathered_objects(list(values)) for name in own)
    return {name: values.get(name, []) for name in names}


def _of_all(own: list[Tensor], batches: int) -> Tensor:
    """Return the numbers of all examples in their order; the ranks have measured batches in turn."""
    found = ranks.gathered_objects(own)
    return torch.cat([found[number % len(found)][number // len(found)] for number in range(batches)])


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


def versions() -> dict[str, str]:
    """Return the versions of the packages that measures come from, of those that are imported."""
    names = ("torch", "torchmetrics", "torchvision", "torch_fidelity")
    return {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}
