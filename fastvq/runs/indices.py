"""A run's examples as grids of indices: computed once, memory-mapped afterwards."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.coding import fingerprint
from fastvq.data import Examples
from fastvq.data.examples import to_float
from fastvq.errors import ConfigError
from fastvq.extras import tracked
from fastvq.files import StrPath, whole, write_whole
from fastvq.models import VQVAE
from fastvq.training.prior import IndexData

from .load import PRIOR_FOLDER, load_model, run_examples

_NAME = "indices"
_BATCH = 250


def run_indices(run: StrPath, data: StrPath | None = None) -> tuple[VQVAE, IndexData, int | tuple[int, ...]]:
    """Return a run's model, its examples as indices, and the size of its codebook, or of each of them.

    Args:
        run: folder of the run.
        data: where its data set is now, see `run_examples`.

    Raises:
        CheckpointError: the run has no checkpoint.
        ConfigError: the run was trained without a bottleneck.
        DataError: the data are missing, or differ from those that the run was trained on.
    """
    model, config = load_model(run)
    if config.without_indices:
        raise ConfigError(f"{run} {config.without_indices} to learn a prior from")
    return model, index_examples(run, model, run_examples(run, data), mirrored=config.mirrored), model.codebook_size


def index_examples(run: StrPath, model: VQVAE, examples: Examples, *, mirrored: bool) -> IndexData:
    """Return the indices of a run's examples, (N, *grid) int32 in mapped files.

    They are read from RUN/prior/ if the files there belong to this model and these examples, else written there.

    Args:
        run: folder of the run.
        model: the run's model.
        examples: the data set.
        mirrored: also index the mirrored training examples, which the model has learned from as well.
    """
    folder = Path(run) / PRIOR_FOLDER
    description = {"model": fingerprint(model).hex(), "images": examples.fingerprint(), "flip": mirrored}
    paths = {split: folder / f"{_NAME}-{split}.npy" for split in ("train", "test")}
    description_path = folder / f"{_NAME}.json"
    arrays = _read(description_path, description, paths)
    if arrays is None:
        description_path.unlink(missing_ok=True)
        for split, stored in (("train", examples.train), ("test", examples.test)):
            parts: Iterator[Tensor] = iter(stored.split(_BATCH))  # views: they may be mapped from a large file
            if mirrored and split == "train":
                parts = chain(parts, (part.flip(-1) for part in stored.split(_BATCH)))
            total = len(stored) * (2 if mirrored and split == "train" else 1)
            shown = tracked(parts, total, examples.noun[0], count=len)
            indices = torch.cat([model.encode(to_float(part)) for part in shown])
            with whole(paths[split]) as file:
                np.save(file, indices.numpy().astype(np.int32))
        write_whole(description_path, json.dumps(description | {"sha256": _digests(paths)}) + "\n")
        arrays = _mapped(paths)
    labels, captions = examples.train_labels, None
    if labels is not None and mirrored:
        labels = labels.repeat(2)
    if examples.train_captions is not None and examples.test_captions is not None:
        captions = examples.train_captions * (2 if mirrored else 1), examples.test_captions
    return IndexData(
        arrays["train"],
        arrays["test"],
        labels,
        examples.test_labels,
        examples.class_names,
        model.adapter.scales,
        captions,
    )


def delete_indices(run: StrPath) -> None:
    """Delete the files of a run's indices."""
    for path in (Path(run) / PRIOR_FOLDER).glob(f"{_NAME}*"):
        path.unlink()


def _mapped(paths: dict[str, Path]) -> dict[str, Tensor]:
    # Mapped copy-on-write because torch warns about memory that is not writable; nothing writes to it.
    return {split: torch.from_numpy(np.load(path, mmap_mode="c")) for split, path in paths.items()}


def _digests(paths: dict[str, Path]) -> dict[str, str]:
    digests = {}
    for split, path in paths.items():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digests[split] = hashlib.sha256(content).hexdigest()
    return digests


def _read(description_path: Path, description: dict[str, Any], paths: dict[str, Path]) -> dict[str, Tensor] | None:
    """Return the indices written earlier, or None unless they match the description and its digests."""
    try:
        stored = json.loads(description_path.read_bytes())
        if stored != description | {"sha256": _digests(paths)}:
            return None
        return _mapped(paths)
    except (OSError, ValueError, RecursionError):
        return None
