"""Pictures of what a prior makes up: new images by class, and lower halves to upper ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvq
from fastvq.data import Images
from fastvq.data.images import to_float
from fastvq.models import VQVAE, Prior

from . import plots
from .pictures import shown_rows

_REAL, _DRAWN = 3, 7
_COMPLETED = 8
_NEAREST = 5


@torch.no_grad()
def picture_samples(path: Path, prior: Prior, model: VQVAE, images: Images, *, seed: int = 0, **settings: Any) -> None:
    """Draw samples beside held-out images: a row for each class, or four rows where there are no classes.

    Args:
        settings: of `Prior.sample`: temperature, top_k, top_p, guidance.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = list(range(prior.classes)) if prior.classes else [None] * 4
    labels = None
    if prior.classes:
        labels = torch.arange(prior.classes).repeat_interleave(_DRAWN)
    codes = prior.sample(len(classes) * _DRAWN, labels, generator=generator, **settings)
    drawn = model.decode(codes).clamp(0, 1).split(_DRAWN)
    rows, names = [], []
    for row, label in enumerate(classes):
        of_class = (
            images.test if label is None or images.test_labels is None else images.test[images.test_labels == label]
        )
        start = row * _REAL if label is None else 0
        rows.append(torch.cat([_some(of_class, start, like=drawn[row]), drawn[row]]))
        names.append("" if label is None else class_name(images, label))
    plots.save_grid(
        path,
        rows,
        names,
        ["real"] * _REAL + ["sampled"] * _DRAWN,
        title=f"{images.name}: samples of the prior",
        caption="Codes drawn one after the other by the prior, decoded to pixels, beside held-out images of the class."
        " Samples should look like the class, differ from each other, and hang together from top to bottom.",
    )


@torch.no_grad()
def picture_completions(
    path: Path, prior: Prior, model: VQVAE, images: Images, *, seed: int = 0, **settings: Any
) -> None:
    """Draw held-out images whose upper half of codes the prior completes, three times each."""
    generator = torch.Generator().manual_seed(seed)
    rows = shown_rows(images)[:_COMPLETED]
    originals = to_float(images.test[rows])
    codes = model.encode(originals)
    half = codes.shape[1] // 2
    given = codes.clone()
    given[:, half:] = -1
    labels = images.test_labels[rows] if prior.classes and images.test_labels is not None else None
    completed = [
        model.decode(prior.sample(len(rows), labels, given=given, generator=generator, **settings)).clamp(0, 1)
        for _ in range(3)
    ]
    upper = originals.clone()
    upper[:, :, upper.shape[2] * half // codes.shape[1] :] = 0.5
    columns = [originals, model.decode(codes).clamp(0, 1), upper, *completed]
    plots.save_grid(
        path,
        list(torch.stack(columns, 1)),
        [images.test_names[row] for row in rows],
        ["original", "its codes", "given", "drawn", "drawn", "drawn"],
        title=f"{images.name}: the prior completes held-out images",
        caption=f"The first {half} of {codes.shape[1]} rows of codes are given; the prior draws the others. The"
        " seam should not show, and where the upper half leaves it open, the drawn ones should differ.",
    )


@torch.no_grad()
def picture_neighbours(
    path: Path, prior: Prior, model: VQVAE, images: Images, *, seed: int = 0, **settings: Any
) -> None:
    """Draw samples, one of each class or ten, beside the training images nearest to each, mirrored ones included."""
    count = prior.classes or 10
    labels = torch.arange(count) if prior.classes else None
    codes = prior.sample(count, labels, generator=torch.Generator().manual_seed(seed), **settings)
    drawn = model.decode(codes).clamp(0, 1)
    learned = to_float(torch.cat([images.train, images.train.flip(-1)]))
    near = fastvq.topk_search(drawn.flatten(1), learned.flatten(1), _NEAREST)
    rows = [torch.cat([image[None], learned[of]]) for image, of in zip(drawn, near, strict=True)]
    plots.save_grid(
        path,
        rows,
        [class_name(images, label) if prior.classes else "" for label in range(count)],
        ["sampled", *(["nearest"] + [f"{n + 1}." for n in range(1, _NEAREST)])],
        title=f"{images.name}: samples and the training images nearest to them",
        caption="Nearest by the squared difference of all pixels, among all images that the models learned from and"
        " their mirror images. A copy would look like its first neighbour in every detail.",
    )


def _some(images: Tensor, start: int, *, like: Tensor) -> Tensor:
    """_REAL images from `start` on, again from the first one where they end; gray ones where there are none."""
    if len(images) == 0:
        return torch.full_like(like[:1], 0.5).expand(_REAL, *like.shape[1:])
    return to_float(images[torch.arange(start, start + _REAL) % len(images)])


def class_name(images: Images, label: int) -> str:
    """What a class of a data set is called, by a held-out image of it."""
    assert images.test_labels is not None
    rows = (images.test_labels == label).nonzero()
    return images.test_names[int(rows[0])] if len(rows) else f"class {label}"
