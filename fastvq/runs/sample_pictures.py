"""Pictures of a prior's samples: new images by class, completions of held-out images, nearest training images.

This module samples and searches; `plots` draws the result. Pictures that need no prior: `pictures`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvq
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.errors import ConfigError
from fastvq.files import StrPath
from fastvq.models import VQVAE, Prior

from . import plots
from .pictures import failures_as_warnings, shown_rows, spread

_REAL, _SAMPLED = 3, 7
_COMPLETED = 8
_NEIGHBORS = 5
_SEARCHED = 1 << 12
"""Training images among which neighbors are looked for at a time."""
_CLASSES = 20
"""Largest number of classes in a picture."""


def picture_prior_samples(
    folder: StrPath, prior: Prior, model: VQVAE, images: Images, *, seed: int = 0, **settings: Any
) -> list[Path]:
    """Draw samples, completions and neighbors for the page of a run in its folder, and return the paths.

    A picture that fails is a warning. Arguments are those of `picture_samples`.
    """
    paths = []
    for name, picture in (
        ("samples", picture_samples),
        ("completions", picture_completions),
        ("neighbors", picture_neighbors),
    ):
        path = Path(folder) / f"{name}.png"
        with failures_as_warnings(f"picture of {name}"):
            picture(path, prior, model, images, seed=seed, captioned=False, **settings)
            paths.append(path)
    return paths


@torch.no_grad()
def picture_samples(
    path: StrPath,
    prior: Prior,
    model: VQVAE,
    images: Images,
    *,
    seed: int = 0,
    captioned: bool = True,
    **settings: Any,
) -> None:
    """Draw samples beside held-out images: a row for each class, twenty at most, or four rows without classes.

    Args:
        path: file to write; its ending is in `plots.FORMATS`.
        prior, model: the prior, and the model that decodes its indices.
        images: the data set of the run.
        seed: seed of the samples.
        captioned: whether title and caption stand in the figure.
        settings: arguments of `Prior.sample`: temperature, top_k, top_p, guidance.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = spread(prior.classes, _CLASSES) if prior.classes else [None] * 4
    labels = None
    if prior.classes:
        labels = torch.tensor(classes).repeat_interleave(_SAMPLED)
    beside, quality = ("", "")
    if prior.classes:
        beside, quality = " of the class", "look like their class, "
    indices = prior.sample(len(classes) * _SAMPLED, labels, generator=generator, **settings)
    sampled = model.decode(indices).clamp(0, 1).split(_SAMPLED)
    rows, names = [], []
    for row, label in enumerate(classes):
        class_images = (
            images.test if label is None or images.test_labels is None else images.test[images.test_labels == label]
        )
        start = row * _REAL if label is None else 0
        rows.append(torch.cat([_real_images(class_images, start, like=sampled[row]), sampled[row]]))
        names.append("" if label is None else class_name(images, label))
    plots.save_grid(
        path,
        rows,
        names,
        ["real"] * _REAL + ["sampled"] * _SAMPLED,
        title=f"{images.name}: samples of the prior",
        caption="Indices sampled one after the other from the prior and decoded to pixels, beside held-out images"
        f"{beside}. Samples should {quality}differ from each other, and be coherent from top to bottom."
        f"{sampled_with(settings)}",
        captioned=captioned,
    )


@torch.no_grad()
def picture_completions(
    path: StrPath,
    prior: Prior,
    model: VQVAE,
    images: Images,
    *,
    seed: int = 0,
    captioned: bool = True,
    **settings: Any,
) -> None:
    """Draw held-out images and three completions of each from the upper half of its indices."""
    generator = torch.Generator().manual_seed(seed)
    rows = shown_rows(images, _COMPLETED)
    originals = to_float(images.test[rows])
    indices = model.encode(originals)
    if indices.dim() < 3:
        raise ConfigError("complete: the indices of this run are scales of whole images, which have no upper half")
    half = indices.shape[1] // 2
    given = indices.clone()
    given[:, half:] = -1
    labels = images.test_labels[rows] if prior.classes and images.test_labels is not None else None
    completed = [
        model.decode(prior.sample(len(rows), labels, given=given, generator=generator, **settings)).clamp(0, 1)
        for _ in range(3)
    ]
    upper = originals.clone()
    upper[:, :, upper.shape[2] * half // indices.shape[1] :] = 0.5
    columns = [originals, model.decode(indices).clamp(0, 1), upper, *completed]
    plots.save_grid(
        path,
        list(torch.stack(columns, 1)),
        [images.test_names[row] for row in rows],
        ["original", "decoded", "given", "sampled", "sampled", "sampled"],
        title=f"{images.name}: the prior completes held-out images",
        caption=f"The first {half} of {indices.shape[1]} rows of indices are given; the prior samples the others. The"
        " seam should not show, and the samples should differ where the upper half does not determine the lower one.",
        captioned=captioned,
    )


@torch.no_grad()
def picture_neighbors(
    path: StrPath,
    prior: Prior,
    model: VQVAE,
    images: Images,
    *,
    seed: int = 0,
    captioned: bool = True,
    **settings: Any,
) -> None:
    """Draw samples, one of each class or ten, beside their nearest training images, mirrored ones included."""
    classes = spread(prior.classes, _CLASSES) if prior.classes else []
    count = len(classes) or 10
    labels = torch.tensor(classes) if classes else None
    indices = prior.sample(count, labels, generator=torch.Generator().manual_seed(seed), **settings)
    sampled = model.decode(indices).clamp(0, 1)
    nearest = nearest_images(sampled, images.train, _NEIGHBORS)
    rows = [torch.cat([image[None], found]) for image, found in zip(sampled, nearest, strict=True)]
    plots.save_grid(
        path,
        rows,
        [class_name(images, label) for label in classes] or [""] * count,
        ["sampled", *(["nearest"] + [f"{n + 1}." for n in range(1, _NEIGHBORS)])],
        title=f"{images.name}: samples and their nearest training images",
        caption="Nearest by the squared difference of all pixels, among all training images and their mirror images. A"
        " copy would look like its first neighbor in every detail.",
        captioned=captioned,
    )


def nearest_images(queries: Tensor, images: Tensor, count: int) -> Tensor:
    """Return the images nearest to each query by squared difference, (B, count, C, H, W), mirrored ones included.

    Args:
        queries: (B, C, H, W), float in [0, 1].
        images: (N, C, H, W), uint8; read a part at a time, for they may be mapped from a large file.
        count: number of neighbors, at most 2 N.
    """
    found = queries.new_empty(0, *images.shape[1:])
    for mirrored in (False, True):
        for part in images.split(_SEARCHED):
            found = torch.cat([found, to_float(part.flip(-1) if mirrored else part)])
            nearest = fastvq.topk_search(queries.flatten(1), found.flatten(1), min(count, len(found)))
            # Those of any query, in the order that they came in: equal distances go to the earlier image.
            used = nearest.unique()
            found = found[used]
    return found[torch.searchsorted(used, nearest)]


def sampled_with(settings: dict[str, Any]) -> str:
    """Return a sentence that names the settings of the sampling other than the defaults, or an empty text."""
    defaults = {"temperature": 1.0, "guidance": 1.0}
    given = [f"{name} {value}" for name, value in settings.items() if value not in (None, defaults.get(name))]
    return f" Sampled with {', '.join(given)}." if given else ""


def _real_images(images: Tensor, start: int, *, like: Tensor) -> Tensor:
    """Return `_REAL` images from `start` on, cyclically; gray ones if there are none."""
    if len(images) == 0:
        return torch.full_like(like[:1], 0.5).expand(_REAL, *like.shape[1:])
    return to_float(images[torch.arange(start, start + _REAL) % len(images)])


def class_name(images: Images, label: int) -> str:
    """Return the name of a class."""
    return images.class_names[label] if images.class_names else f"class {label}"
