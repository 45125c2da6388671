"""A run's data set as codes: written once, memory-mapped afterwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.coding import fingerprint
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.files import whole
from fastvq.models import VQVAE

FOLDER, _NAME = "prior", "codes"
BATCH = 250


@dataclasses.dataclass(frozen=True)
class Codes:
    """A run's data set as codes, (N, *grid) int32 in mapped files, with the labels of its images if there are any."""

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None

    @property
    def classes(self) -> int:
        return 0 if self.train_labels is None else int(self.train_labels.max()) + 1


def tokenize(run: Path, model: VQVAE, images: Images, *, flip: bool) -> Codes:
    """The codes of a run's images, read from RUN/prior/ where they are those of this model, else written there.

    Args:
        flip: also the mirrored images to learn from, where the run learned from them as well.
    """
    folder = run / FOLDER
    description = {"model": fingerprint(model).hex(), "images": images.fingerprint(), "flip": flip}
    paths = {split: folder / f"{_NAME}-{split}.npy" for split in ("train", "test")}
    described = folder / f"{_NAME}.json"
    loaded = _stored(described, description, paths)
    if loaded is None:
        described.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        train = torch.cat([images.train, images.train.flip(-1)]) if flip else images.train
        for split, pixels in (("train", train), ("test", images.test)):
            codes = torch.cat([model.encode(to_float(part)) for part in pixels.split(BATCH)])
            with whole(paths[split]) as partial, partial.open("wb") as stream:
                np.save(stream, codes.numpy().astype(np.int32))
        with whole(described) as partial:
            partial.write_text(json.dumps(description | {"shapes": _shapes(_mapped(paths))}) + "\n")
        loaded = _mapped(paths)
    labels = images.train_labels
    if labels is not None and flip:
        labels = labels.repeat(2)
    return Codes(loaded["train"], loaded["test"], labels, images.test_labels)


def _mapped(paths: dict[str, Path]) -> dict[str, Tensor]:
    # Copy-on-write, as torch wants memory that it could write to; nothing does.
    return {split: torch.from_numpy(np.load(path, mmap_mode="c")) for split, path in paths.items()}


def _shapes(arrays: dict[str, Tensor]) -> dict[str, list[int]]:
    return {split: list(codes.shape) for split, codes in arrays.items()}


def _stored(described: Path, description: dict[str, Any], paths: dict[str, Path]) -> dict[str, Tensor] | None:
    """The codes that were written before, where they are all there and what they are described as."""
    try:
        found = json.loads(described.read_text())
        loaded = _mapped(paths)
    except (OSError, ValueError, TypeError):
        return None
    return loaded if found == description | {"shapes": _shapes(loaded)} else None


def forget_codes(run: Path) -> None:
    """Delete them."""
    for path in (run / FOLDER).glob(f"{_NAME}*"):
        path.unlink()
