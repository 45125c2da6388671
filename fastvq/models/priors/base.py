"""Base class of priors: likelihoods, sampling and validation of inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats
from .draw import draw

_IN_FLOAT64 = 1 << 22
"""Number of logits that are converted to float64 at a time."""


class Prior(nn.Module):
    """Learned distribution of the indices of a grid, place by place in raster order.

        p(indices | label) = prod_i p(index_i | index_0 ... index_{i-1}, label)

    With several indices at each position, from the stages of a residual quantizer or the like, these are the last axis
    of the grid, and a position's indices follow each other, unless the prior has another `order`.

    A prior defines its prediction twice: `forward` for all places of known indices at once, for training and
    likelihoods, and `step` for one place, from the state that `begin` and earlier steps left, for sampling and coding.
    Both give the same logits up to rounding.

    Args:
        codebook_size: K; for several indices at each position, a tuple with K of each.
        grid: shape of one sample's indices: (T,), (H, W) or (T, H, W), and with a tuple its length as the last axis.
        classes: number of labels; 0 for none.
        label_dropout: in training, the share of samples whose label is left out, which guidance needs.

    Attributes:
        sizes: K of the places in turn: (K,), or the tuple.
        places: number of indices of a sample.
        order: the places in the order of the steps.
        settings: the constructor's arguments other than parameters.
        class_names: the name of each label; empty where they have none.

    Shapes: indices (B, *grid) int64 in [0, K), by place for several; labels (B,) int64 in [0, classes), or None.

    Raises:
        ValueError: an invalid argument, by name; indices or labels of another shape, dtype or range.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017, section 3.3: a learned prior in place of
    the uniform one. Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, equation 6.
    """

    class_names: tuple[str, ...] = ()
    in_scales = False
    """True if the indices of a sample are a sequence of grids, whose shapes are the argument `scales`."""
    in_stages = False
    """True if there have to be several indices at each position."""

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        classes: int = 0,
        label_dropout: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.sizes = tuple(codebook_size) if isinstance(codebook_size, Sequence) else (codebook_size,)
        self.codebook_size = self.sizes if isinstance(codebook_size, Sequence) else codebook_size
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"codebook_size: must be at least 1, got {codebook_size}")
        if not grid or min(grid) < 1:
            raise ValueError(f"grid: must be one or more lengths of at least 1, got {grid}")
        if self.staged and (len(grid) < 2 or grid[-1] != len(self.sizes)):
            raise ValueError(f"grid: must end with the number of codebooks, {len(self.sizes)}, got {grid}")
        for name, share in (("dropout", settings.get("dropout", 0.0)), ("label_dropout", label_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {share}")
        self.grid, self.classes = tuple(grid), classes
        self.label_dropout = label_dropout
        self.places = math.prod(grid)
        self.order: Sequence[int] = range(self.places)
        self.settings: dict[str, Any] = {
            "codebook_size": list(self.sizes) if self.staged else codebook_size,
            "grid": list(grid),
            "classes": classes,
            "label_dropout": label_dropout,
            **settings,
        }

    @property
    def staged(self) -> bool:
        """True if the last axis of the indices runs over codebooks."""
        return not isinstance(self.codebook_size, int)

    @property
    def drawn_together(self) -> Sequence[Sequence[int]]:
        """The places in `order`, grouped: those of a group do not depend on each other, and are drawn at once."""
        return [(place,) for place in self.order]

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (B, places, K): at place i those of index i, given the indices before it.

        K is that of the largest codebook; logits of codes that a place does not have are -inf.
        """
        raise NotImplementedError

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> Any:
        """Return the state that `step` updates from place to place. labels (B,): as `label_rows` returns them."""
        raise NotImplementedError

    def step(self, arithmetic: Arithmetic, state: Any, indices: Tensor, place: int) -> Tensor:
        """Return logits (B, K of the place) of the index at `place`, given the indices (B, places) before it.

        Places come in `order`.
        """
        raise NotImplementedError

    def check_modules(self) -> None:
        """Refuse adapters and other modules in place of parts: `forward` calls them, `step` reads weights alone.

        Raises:
            ValueError: there is one; the message names it.
        """
        own = type(self).__module__.partition(".")[0]
        for name, module in self.named_modules():
            source = type(module).forward.__module__
            if ".parametrizations" in name:  # are part of the weight
                continue
            if "forward" in vars(module) or not source.startswith(("torch.nn.modules.", "fastvq.", f"{own}.")):
                raise ValueError(
                    f"{name}: must be the module that the prior was built with, got a {type(module).__name__} with a"
                    " forward of its own, which sampling and coding would pass over; merge adapters first"
                )

    def loss(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean negative log-likelihood () of an index, in nats."""
        return self.losses(indices, labels)[1]

    def losses(
        self, indices: Tensor, labels: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss to minimize and the mean negative log-likelihood of an index, both (), in nats.

        Here they are the same. `seen` (B, *grid): indices that stand in the place of those before each, see
        `fastvq.training.prior.corrupted`.
        """
        logits = self(indices if seen is None else seen, labels)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten())
        return nats, nats

    @torch.no_grad()
    def bits(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return -log2 p(indices | label) of each sample, (B,) float64: the length of an ideal code.

        Call it in eval mode. Under the uniform prior that the VQ-VAE is trained with it is log2 K for each place.
        """
        logits = self(indices, labels)
        rows = max(1, _IN_FLOAT64 // max(1, logits[:1].numel()))
        parts = zip(logits.split(rows), indices.flatten(1).split(rows), strict=True)
        nats = [F.cross_entropy(part.double().mT, own, reduction="none").sum(1) for part, own in parts]
        return torch.cat(nats) / math.log(2) if nats else logits.new_zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        given: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample indices (count, *grid) place by place, with what earlier places computed cached.

        Args:
            count: number of samples.
            labels: (count,), or None.
            temperature: divides the logits; 0 takes the most likely index.
            top_k: sample from the k most likely indices.
            top_p: sample from the smallest set of indices that has this total probability.
            guidance: g in  logits = g logits(label) + (1 - g) logits(no label);  1 is the model itself.
            given: (count, *grid), indices to keep, with -1 at the places to sample, for example to complete the upper
                half of an image. Places are sampled in `order`, conditioned on the indices before them alone.
            generator: random generator on the device of the model.

        Raises:
            ValueError: an invalid argument, by name.
        """
        self._check_sampling(count, temperature, top_k, top_p, guidance, labels, given)
        floats, guided = Floats(), guidance != 1.0
        device = next(self.parameters()).device
        rows = self.label_rows(labels, count, device)
        if guided:
            rows = torch.cat([rows, self.label_rows(None, count, device)])
        self.check_modules()
        state = self.begin(floats, rows)
        given = None if given is None else given.flatten(1).to(device)
        indices = torch.zeros(len(rows), self.places, dtype=torch.int64, device=device)
        for places in self.drawn_together:
            logits = torch.cat([self.step(floats, state, indices, place) for place in places]).float()
            if guided:
                with_label, without = logits.unflatten(0, (len(places), 2, count)).unbind(1)
                logits = (guidance * with_label + (1 - guidance) * without).flatten(0, 1)
            drawn = draw(logits, temperature, top_k, top_p, generator).unflatten(0, (len(places), count))
            for place, index in zip(places, drawn, strict=True):
                if given is not None:
                    index = torch.where(given[:, place] >= 0, given[:, place], index)
                indices[:, place] = torch.cat([index, index]) if guided else index
        return indices[:count].unflatten(1, self.grid)

    def label_rows(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        """Return the rows (count,) of a table of `classes` + 1 labels; the last row stands for "no label"."""
        none = torch.full((count,), self.classes, device=device)
        if labels is None:
            return none
        if self.classes == 0:
            raise ValueError("labels: this prior was built without classes")
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(f"labels: must be int64 of shape ({count},), got {labels.dtype} {tuple(labels.shape)}")
        self.check_labels(labels, self.classes)
        return labels.to(device)

    def check_labels(self, labels: Tensor, limit: int) -> None:
        """Raise a ValueError unless labels lie in [0, limit)."""
        _check_range("labels", labels, limit)

    def rows_to_learn(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        """Return `label_rows`; in training a random share of them is replaced by "no label"."""
        rows = self.label_rows(labels, count, device)
        if labels is not None and self.training and self.label_dropout:
            rows = rows.masked_fill(torch.rand(count, device=device) < self.label_dropout, self.classes)
        return rows

    def flattened(self, indices: Tensor) -> Tensor:
        """Validate indices (B, *grid) and return them as (B, places)."""
        if indices.shape[1:] != self.grid or indices.dtype != torch.int64:
            raise ValueError(
                f"indices: must be int64 of shape (B, {', '.join(map(str, self.grid))}), got {indices.dtype}"
                f" {tuple(indices.shape)}"
            )
        self._check_range("indices", indices)
        return indices.flatten(1)

    def _check_range(self, name: str, indices: Tensor, *, least: int = 0) -> None:
        """Check the range of indices (B, *grid)."""
        for stage, size in enumerate(self.sizes):
            _check_range(name, indices[..., stage] if self.staged else indices, size, least=least)

    def _check_sampling(
        self,
        count: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guidance: float,
        labels: Tensor | None,
        given: Tensor | None,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: must be at least 1, got {count}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: must not be negative, nor infinite, got {temperature}")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance: must be finite, got {guidance}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: must lie in (0, 1], got {top_p}")
        if guidance != 1.0 and labels is None:
            raise ValueError(f"guidance: needs labels or a text, got {guidance} without")
        if given is not None and (given.shape != (count, *self.grid) or given.dtype != torch.int64):
            raise ValueError(
                f"given: must be int64 of shape {(count, *self.grid)}, got {given.dtype} {tuple(given.shape)}"
            )
        if given is not None:
            self._check_range("given", given, least=-1)
        if self.training:
            raise ValueError("sample: call eval() first, since dropout would disturb it")


def _check_range(name: str, values: Tensor, limit: int, *, least: int = 0) -> None:
    # On other devices the lookup asserts; a check here would wait for the device.
    if values.device.type == "cpu" and values.numel() and not (values.min() >= least and values.max() < limit):
        raise ValueError(f"{name}: must lie in [{least}, {limit}), got {int(values.min())} to {int(values.max())}")
