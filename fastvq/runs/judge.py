"""Judgement of a prior's samples: of their class, like the data, as varied as the data, and no copies.

The definitions are in docs/evaluation.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.data import Examples
from fastvq.data.examples import to_float
from fastvq.errors import ConfigError, aligned, counted
from fastvq.files import StrPath, write_whole
from fastvq.modalities import TrainConfig
from fastvq.models import VQVAE, ContrastiveModel, Prior, TextPrior
from fastvq.models.contrastive import retrieval
from fastvq.training.checkpoint import Checkpoint, checkpoint_folders
from fastvq.training.contrastive import CANDIDATES

from .classifier import STEPS, Classifier, agreement, train_classifier
from .contrast import CONTRASTIVE_FOLDER, load_contrastive
from .indices import index_examples
from .load import held_out_labels, load_model, load_prior_checkpoint, load_prior_of, run_examples
from .sample_pictures import nearest_images

FILE = "samples.json"
"""Name of the file in the folder of a run that has the latest judgement of its samples."""
COUNT = 500
_NEIGHBORS = 3
_BATCH = 100
LABELS = {
    "class_agreement": "share that a classifier assigns to the requested class",
    "caption_retrieval": "share whose caption is the nearest, for the contrastive model of the run",
    "precision": "precision, share that looks like training {}",
    "recall": "recall, share of training {} that look like one of these",
    "nearest_rms": "distance to the nearest training {}, RMS",
    "copies": "share nearer to it than 99 % of the decoded held-out {}",
    "equal_indices": "share with the indices of a training {}",
}
"""Label of each measure, with a gap for the noun of an example."""
COLUMNS = ("samples", "decoded")
"""Columns of the table: samples, and held-out examples that are decoded from their indices."""


def judge_run(
    run: StrPath,
    *,
    count: int = COUNT,
    data: StrPath | None = None,
    seed: int = 0,
    steps: int = STEPS,
    **settings: Any,
) -> list[str]:
    """Judge samples of a run's prior, write RUN/samples.json and return the lines of a table.

    Args:
        run: folder of a run with a prior.
        count: largest number of samples; there are no more than held-out examples.
        data: where the data set of the run is now, see `run_examples`.
        seed: seed of the samples, and of the training examples that they are compared with.
        steps: training steps of the classifier.
        settings: arguments of `Prior.sample`: temperature, top_k, top_p, guidance.

    Raises:
        CheckpointError: the run has no prior.
        ConfigError: a count below 7, or too few examples.
        DataError: the data are missing, or others.
        ValueError: an invalid argument of `Prior.sample`.
    """
    model, config = load_model(run)
    prior = load_prior_of(run, model)
    texts = isinstance(prior, TextPrior) and checkpoint_folders(Path(run) / CONTRASTIVE_FOLDER)
    contrastive = load_contrastive(run, model) if texts else None
    examples = run_examples(run, data)
    known = index_examples(run, model, examples, mirrored=config.mirrored).train
    record = judge(prior, model, config, examples, known, contrastive, count=count, seed=seed, steps=steps, **settings)
    of = identity(load_prior_checkpoint(run, model))
    write_whole(Path(run) / FILE, json.dumps({"of": of, **record}, indent=2) + "\n")
    one, many = examples.noun
    title = f"{examples.name}: {counted(record['count'], 'sample')} of the prior, and as many held-out {many}"
    rows = [("measure", "samples", f"decoded held-out {many}"), *rows_of(record, one, many)]
    return [title, "", *aligned(rows, right=[1, 2]), "", f"numbers: {Path(run) / FILE}"]


def identity(prior: Checkpoint) -> dict[str, Any]:
    """Return what tells a prior from others of the run: its step, its settings and the model that it belongs to."""
    return {"step": prior.step, "settings": prior.config.to_json(), "model": prior.data_fingerprint}


def rows_of(record: dict[str, Any], one: str, many: str) -> list[tuple[str, str, str]]:
    """Return (measure, that of the samples, that of the held-out examples) as texts."""
    rows = []
    for name, label in LABELS.items():
        if name in record["measures"]:
            samples, decoded = (f"{record['measures'][name][column]:.3f}" for column in COLUMNS)
            word = one if name in ("nearest_rms", "equal_indices") else many
            rows.append((label.format(word), samples, decoded))
    return rows


@torch.no_grad()
def judge(
    prior: Prior,
    model: VQVAE,
    config: TrainConfig,
    examples: Examples,
    known: Tensor,
    contrastive: ContrastiveModel | None = None,
    *,
    count: int = COUNT,
    seed: int = 0,
    steps: int = STEPS,
    **settings: Any,
) -> dict[str, Any]:
    """Return measures of samples and, for comparison, of as many decoded held-out examples.

    Args:
        prior, model, config: the prior, the model that decodes its indices, and the settings of the model.
        examples: the data set.
        known: (N, *grid), the indices of the training examples.
        contrastive: model that looks for the caption of each sample of a prior of text, among at most `CANDIDATES`.
        count, seed, steps, settings: see `judge_run`.

    Raises:
        ConfigError, ValueError: see `judge_run`.
    """
    count = min(count, len(examples.test), len(examples.train))
    if count <= 2 * _NEIGHBORS:
        raise ConfigError(f"samples must be at least {2 * _NEIGHBORS + 1}, and as many held-out examples, got {count}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(examples.test), generator=generator)[:count]
    labels = held_out_labels(prior, examples, rows)
    real = to_float(examples.train[torch.randperm(len(examples.train), generator=generator)[:count]])
    indices = _sampled(prior, labels, count, generator, settings)
    originals = to_float(examples.test[rows])
    held_out = torch.cat([model.encode(part) for part in originals.split(_BATCH)])
    found = {"samples": indices, "decoded": held_out}
    signals = {name: torch.cat([model.restore(p) for p in own.split(_BATCH)]) for name, own in found.items()}
    measures: dict[str, dict[str, float]] = {}
    features, judged_by = _features(model, examples, steps, mirrored=config.mirrored)
    if isinstance(features, Classifier) and examples.test_labels is not None:
        expected = examples.test_labels[rows]
        if labels is not None:
            measures["class_agreement"] = {name: agreement(features, own, expected) for name, own in signals.items()}
        features = features.features
    if contrastive is not None and contrastive.tokenizer is not None:
        texts = [(examples.test_captions or ())[row] for row in rows.tolist()]
        captioned = [place for place, text in enumerate(texts) if text.strip()][:CANDIDATES]
        captions = contrastive.tokenizer.rows([texts[place] for place in captioned])[:, 0]
        measures["caption_retrieval"] = {
            name: retrieval(contrastive, own[captioned], captions) for name, own in signals.items()
        }
    seen = _by_parts(features, real)
    alike = {name: precision_and_recall(seen, _by_parts(features, own)) for name, own in signals.items()}
    for place, name in enumerate(("precision", "recall")):
        measures[name] = {column: values[place] for column, values in alike.items()}
    distances = {name: _nearest(own, examples, mirrored=config.mirrored) for name, own in signals.items()}
    measures["nearest_rms"] = {name: float(own.mean()) for name, own in distances.items()}
    nearest = distances["decoded"].quantile(0.01)
    measures["copies"] = {name: float((own < nearest).float().mean()) for name, own in distances.items()}
    rows_known = {bytes(row) for row in known.flatten(1).to(torch.int32).numpy()}
    measures["equal_indices"] = {
        name: sum(bytes(row) in rows_known for row in own.flatten(1).to(torch.int32).numpy()) / count
        for name, own in found.items()
    }
    return {
        "prior": type(prior).__name__,
        "count": count,
        "features": judged_by,
        "sampling": {name: value for name, value in settings.items() if value is not None},
        "seed": seed,
        "measures": {name: measures[name] for name in LABELS if name in measures},
    }


def precision_and_recall(real: Tensor, other: Tensor, neighbors: int = _NEIGHBORS) -> tuple[float, float]:
    """Return the shares of `other` (N, D) among `real` (N, D), and of `real` among `other`.

    A vector is among a set if it is not farther from one of its vectors than that vector's k-th nearest neighbor within
    the set. Both sets should have one size: more vectors cover more.

    Source: Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, 2019.
    """
    between = torch.cdist(other.double(), real.double())
    radii = [torch.cdist(own.double(), own.double()).kthvalue(neighbors + 1).values for own in (real, other)]
    precision = (between <= radii[0]).any(1)
    recall = (between.mT <= radii[1]).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def _features(
    model: VQVAE, examples: Examples, steps: int, *, mirrored: bool
) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return what turns signals into features to compare, and its name: a classifier of images with classes."""
    if examples.train_labels is not None and examples.train.dim() == 4:
        with torch.enable_grad():
            return train_classifier(examples, steps=steps, mirrored=mirrored), "classifier"
    return lambda x: _all_halves(model.encoder(x)), "encoder"


def _all_halves(features: Tensor | dict[int, Tensor]) -> Tensor:
    """Return `_halves` of features, or of those of all scales side by side."""
    if isinstance(features, Tensor):
        return _halves(features)
    return torch.cat([_halves(own) for own in features.values()], 1)


def _halves(features: Tensor) -> Tensor:
    """Return features (B, D, *grid), averaged over the halves of every axis, as (B, 2^axes D)."""
    for axis in range(2, features.dim()):
        moved = features.movedim(axis, -1).flatten(0, -2)
        shape = features.movedim(axis, -1).shape[:-1]
        features = F.adaptive_avg_pool1d(moved[:, None], 2)[:, 0].unflatten(0, shape).movedim(-1, axis)
    return features.flatten(1)


def _by_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(part) for part in x.split(_BATCH)])


def _sampled(
    prior: Prior, labels: Tensor | None, count: int, generator: torch.Generator, settings: dict[str, Any]
) -> Tensor:
    parts = []
    for first in range(0, count, _BATCH):
        own = None if labels is None else labels[first : first + _BATCH]
        parts.append(prior.sample(min(_BATCH, count - first), own, generator=generator, **settings))
    return torch.cat(parts)


def _nearest(signals: Tensor, examples: Examples, *, mirrored: bool) -> Tensor:
    """Return the RMS distance (B,) of signals to the nearest training example."""
    found = nearest_images(signals, examples.train, 1, mirrored=mirrored)[:, 0]
    return (signals - found).square().flatten(1).mean(1).sqrt()
