"""Pictures of a prior's samples: new examples by class, completions of held-out ones, nearest training examples.

This module samples and searches; `plots` draws the result. Pictures that need no prior: `pictures`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvq
from fastvq.data import Examples
from fastvq.data.examples import to_float
from fastvq.errors import ConfigError
from fastvq.files import StrPath
from fastvq.modalities import TrainConfig, modality_of
from fastvq.models import VQVAE, Prior, TextPrior
from fastvq.models.text import first_caption

from . import plots
from .load import held_out_labels
from .pictures import MEDIA, failures_as_warnings, shown_rows, spread

_REAL, _SAMPLED = 3, 7
_COMPLETED = 8
_NEIGHBORS = 5
_SEARCHED = 1 << 12
"""Training images among which neighbors are looked for at a time."""
_CLASSES = 20
"""Largest number of classes in a picture."""


def picture_prior_samples(
    folder: StrPath,
    prior: Prior,
    model: VQVAE,
    config: TrainConfig,
    examples: Examples,
    *,
    seed: int = 0,
    **settings: Any,
) -> list[Path]:
    """Draw samples, completions and neighbors for the page of a run in its folder, and return the paths.

    A picture that fails is a warning; indices of several scales have no completions. Arguments are those of
    `picture_samples`.
    """
    pictures = {"samples": picture_samples, "completions": picture_completions, "neighbors": picture_neighbors}
    if model.adapter.scales is not None:
        del pictures["completions"]
    paths = []
    for name, picture in pictures.items():
        path = Path(folder) / f"{name}.png"
        more = {} if name == "neighbors" else {"media": Path(folder) / MEDIA}
        with failures_as_warnings(f"picture of {name}"):
            picture(path, prior, model, config, examples, seed=seed, captioned=False, **more, **settings)
            paths.append(path)
    return paths


@torch.no_grad()
def picture_samples(
    path: StrPath,
    prior: Prior,
    model: VQVAE,
    config: TrainConfig,
    examples: Examples,
    *,
    seed: int = 0,
    captioned: bool = True,
    media: StrPath | None = None,
    **settings: Any,
) -> None:
    """Draw samples beside held-out examples: a row for each class, twenty at most, or four rows without classes.

    A prior of text draws what held-out captions say, beside the examples that have them.

    Args:
        path: file to write; its ending is in `figures.FORMATS`.
        prior, model: the prior, and the model that decodes its indices.
        config: the settings of the model.
        examples: the data set of the run.
        seed: seed of the samples.
        captioned: whether title and caption stand in the figure.
        media: folder that gets files of the samples to play beside the picture.
        settings: arguments of `Prior.sample`: temperature, top_k, top_p, guidance.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = _kinds(prior, examples, _CLASSES)
    beside, quality, real = "", "", _REAL
    if isinstance(prior, TextPrior):
        beside, quality, real = " of the caption", "show what the caption says, ", 1
    elif prior.classes:
        beside, quality = " of the class", "look like their class, "
    labels = _labels(kinds, _SAMPLED)
    indices = prior.sample(len(kinds) * _SAMPLED, labels, generator=generator, **settings)
    modality = modality_of(config.modality)
    many = modality.noun[1]
    restored = model.restore(indices)
    if media is not None:
        modality.write_media(media, "samples", {"sampled": restored}, config)
    sampled = restored.split(_SAMPLED)
    rows, names = [], []
    for row, kind in enumerate(kinds):
        start = row * real if kind.label is None else 0
        shown = _real_examples(kind.held_out, start, real, like=sampled[row], range=model.value_range)
        rows.append(modality.as_images(torch.cat([shown, sampled[row]]), config))
        names.append(kind.name)
    plots.save_grid(
        path,
        rows,
        names,
        ["real"] * real + ["sampled"] * _SAMPLED,
        title=f"{examples.name}: samples of the prior",
        caption=f"Indices sampled one after the other from the prior and decoded, beside held-out {many}"
        f"{beside}. Samples should {quality}differ from each other, and be coherent from beginning to end."
        f"{sampled_with(settings)}",
        captioned=captioned,
    )


@torch.no_grad()
def picture_completions(
    path: StrPath,
    prior: Prior,
    model: VQVAE,
    config: TrainConfig,
    examples: Examples,
    *,
    seed: int = 0,
    captioned: bool = True,
    media: StrPath | None = None,
    **settings: Any,
) -> None:
    """Draw held-out examples and three completions of each from the first half of its indices."""
    generator = torch.Generator().manual_seed(seed)
    modality = modality_of(config.modality)
    many = modality.noun[1]
    rows = shown_rows(examples, _COMPLETED)
    originals = to_float(examples.test[rows])
    indices = model.encode(originals)
    given, half = beginnings(model, config, indices, 0.5)
    labels = held_out_labels(prior, examples, rows)
    completed = [
        model.restore(prior.sample(len(rows), labels, given=given, generator=generator, **settings)) for _ in range(3)
    ]
    known = originals.clone()
    known[:, :, known.shape[2] - (indices.shape[1] - half) * model.strides[0] :] = sum(model.value_range) / 2
    names = ["original", "decoded", "given", "sampled", "sampled", "sampled"]
    signals = [originals, model.restore(indices), known, *completed]
    if media is not None:
        played = {"original": originals, "decoded": signals[1], "completed": completed[0]}
        modality.write_media(media, "completions", played, config)
    columns = [modality.as_images(x, config) for x in signals]
    plots.save_grid(
        path,
        list(torch.stack(columns, 1)),
        [examples.test_names[row] for row in rows],
        names,
        title=f"{examples.name}: the prior completes held-out {many}",
        caption=f"The first {half} of {indices.shape[1]} indices along the first axis are given; the prior samples the"
        " others. The seam should not show, and the samples should differ where one half does not determine the other.",
        captioned=captioned,
    )


def beginnings(model: VQVAE, config: TrainConfig, indices: Tensor, share: float) -> tuple[Tensor, int]:
    """Return indices (N, *grid) with -1 behind their beginnings, and the length of a beginning along the first axis.

    The first axis is that of rows of an image, of frames of a video, of time of a sound.

    Args:
        model, config: the model of the indices, and its settings.
        indices: as `model.encode` returns them.
        share: length of a beginning, as a share of the whole.

    Raises:
        ConfigError: the indices have no beginning, or the share leaves nothing to keep or nothing to sample.
    """
    if model.adapter.scales is not None:
        many = modality_of(config.modality).noun[1]
        raise ConfigError(f"complete: the indices of this run are scales of whole {many}, which have no beginning")
    length = indices.shape[1]
    kept = int(share * length) if 0 <= share <= 1 else 0  # not of NaN or infinity
    if not 0 < kept < length:
        raise ConfigError(f"share must keep 1 to {length - 1} of {length} positions, got {share}, which keeps {kept}")
    given = indices.clone()
    given[:, kept:] = -1
    return given, kept


@torch.no_grad()
def picture_neighbors(
    path: StrPath,
    prior: Prior,
    model: VQVAE,
    config: TrainConfig,
    examples: Examples,
    *,
    seed: int = 0,
    captioned: bool = True,
    **settings: Any,
) -> None:
    """Draw samples beside their nearest training examples, mirrored ones included: of classes, of captions, or ten."""
    kinds = _kinds(prior, examples, _CLASSES, without=10)
    labels = _labels(kinds, 1)
    indices = prior.sample(len(kinds), labels, generator=torch.Generator().manual_seed(seed), **settings)
    modality = modality_of(config.modality)
    many = modality.noun[1]
    mirrored = f" and the mirrored {many}" if config.mirrored else ""
    sampled = modality.as_images(model.restore(indices), config)
    nearest = nearest_images(
        sampled,
        examples.train,
        _NEIGHBORS,
        as_images=lambda x: modality.as_images(x, config),
        mirrored=config.mirrored,
    )
    rows = [torch.cat([image[None], found]) for image, found in zip(sampled, nearest, strict=True)]
    plots.save_grid(
        path,
        rows,
        [kind.name for kind in kinds],
        ["sampled", *(["nearest"] + [f"{n + 1}." for n in range(1, _NEIGHBORS)])],
        title=f"{examples.name}: samples and their nearest training {many}",
        caption=f"Nearest by the squared difference of all pixels, among all training {many}{mirrored}. A copy would"
        " look like its first neighbor in every detail.",
        captioned=captioned,
    )


def nearest_images(
    queries: Tensor,
    stored: Tensor,
    count: int,
    *,
    as_images: Callable[[Tensor], Tensor] = lambda x: x,
    mirrored: bool = True,
) -> Tensor:
    """Return pictures of the examples nearest to each query by squared difference, (B, count, C, H, W).

    Args:
        queries: pictures (B, C, H, W), float in [0, 1].
        stored: examples (N, C, *size); read a part at a time, for they may be mapped from a large file.
        count: number of neighbors, at most N, or 2 N with mirrored ones.
        as_images: pictures of floats (B, C, *size).
        mirrored: search among mirrored examples as well.
    """
    found = queries.new_empty(0, *queries.shape[1:])
    for flipped in (False, True)[: 1 + mirrored]:
        for part in stored.split(_SEARCHED):
            found = torch.cat([found, as_images(to_float(part.flip(-1) if flipped else part))])
            nearest = fastvq.topk_search(queries.flatten(1), found.flatten(1), min(count, len(found)))
            # Those of any query, in the order that they came in: equal distances go to the earlier one.
            used = nearest.unique()
            found = found[used]
    return found[torch.searchsorted(used, nearest)]


def sampled_with(settings: dict[str, Any]) -> str:
    """Return a sentence that names the settings of the sampling other than the defaults, or an empty text."""
    defaults = {"temperature": 1.0, "guidance": 1.0}
    given = [f"{name} {value}" for name, value in settings.items() if value not in (None, defaults.get(name))]
    return f" Sampled with {', '.join(given)}." if given else ""


class _Kind(NamedTuple):
    """Row of a picture.

    Attributes:
        name: its class or caption; empty without.
        label: what a prior takes as the label of one sample, (1, ...), or None.
        held_out: examples of it, or all.
    """

    name: str
    label: Tensor | None
    held_out: Tensor


def _kinds(prior: Prior, examples: Examples, most: int, *, without: int = 4) -> list[_Kind]:
    """Return at most `most` classes, or captions of held-out examples, or else `without` kinds without a name."""
    if isinstance(prior, TextPrior) and prior.tokenizer is not None:
        captions = [(row, first_caption(text)) for row, text in enumerate(examples.test_captions or ())]
        captions = [(row, text) for row, text in captions if text]
        chosen = [captions[place] for place in spread(len(captions), most)]
        return [
            _Kind(text, prior.tokenizer.rows([text])[:, 0], examples.test[row : row + 1]) for row, text in chosen
        ] or [_Kind("", None, examples.test)] * without
    if not prior.classes:
        return [_Kind("", None, examples.test)] * without
    kinds = []
    for label in spread(prior.classes, most):
        own = examples.test if examples.test_labels is None else examples.test[examples.test_labels == label]
        kinds.append(_Kind(class_name(examples, label), torch.tensor([label]), own))
    return kinds


def _labels(kinds: Sequence[_Kind], count: int) -> Tensor | None:
    """Return what a prior takes as labels of `count` samples of each kind, or None."""
    own = [kind.label for kind in kinds if kind.label is not None]
    return torch.cat(own).repeat_interleave(count, 0) if own else None


def _real_examples(stored: Tensor, start: int, count: int, *, like: Tensor, range: tuple[float, float]) -> Tensor:
    """Return `count` examples from `start` on, cyclically; if there are none, the middle of the range."""
    if len(stored) == 0:
        return torch.full_like(like[:1], sum(range) / 2).expand(count, *like.shape[1:])
    return to_float(stored[torch.arange(start, start + count) % len(stored)])


def class_name(examples: Examples, label: int) -> str:
    """Return the name of a class."""
    return examples.class_names[label] if examples.class_names else f"class {label}"
