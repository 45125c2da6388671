"""What all priors share: likelihoods, sampling, and the checks of what they are given."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import Arithmetic, Floats
from .draw import draw

_IN_FLOAT64 = 1 << 22
"""Logits that are widened at a time."""


class Prior(nn.Module):
    """p(codes | label) = prod_i p(code_i | code_0 ... code_{i-1}, label), over the places of a grid in raster order.

    A prior says twice how it predicts: `forward` for all places of known codes at once, to learn and to measure, and
    `step` for one place, from what `begin` and the earlier steps have kept, to sample and to code. Both give the same
    logits to rounding.

    Args:
        codebook_size: K.
        grid: shape of one sample's codes: (T,), (H, W) or (T, H, W).
        classes: how many labels there are; 0 for none.
        label_dropout: in training, the share of samples whose label is left out, so that guidance has a model without.

    Attributes:
        places: codes of a sample.
        settings: what the constructor was given, besides parameters.

    Shapes: codes (B, *grid) int64 in [0, K); labels (B,) int64 in [0, classes), or None for none.

    Raises:
        ValueError: an argument that can't be, by name; codes or labels that don't fit.

    Source: van den Oord et al., Neural Discrete Representation Learning, 2017, section 3.3: a learned prior in place of
    the uniform one. Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, equation 6.
    """

    def __init__(
        self,
        codebook_size: int,
        grid: tuple[int, ...],
        *,
        classes: int = 0,
        label_dropout: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__()
        if codebook_size < 1:
            raise ValueError(f"codebook_size: must be at least 1, got {codebook_size}")
        if not grid or min(grid) < 1:
            raise ValueError(f"grid: must be one or more lengths of at least 1, got {grid}")
        for name, share in (("dropout", settings.get("dropout", 0.0)), ("label_dropout", label_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {share}")
        self.codebook_size, self.grid, self.classes = codebook_size, tuple(grid), classes
        self.label_dropout = label_dropout
        self.places = math.prod(grid)
        self.settings: dict[str, Any] = {
            "codebook_size": codebook_size,
            "grid": list(grid),
            "classes": classes,
            "label_dropout": label_dropout,
            **settings,
        }

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, places, K): at place i those of code i, given the codes before it."""
        raise NotImplementedError

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> Any:
        """What `step` keeps between places. labels (B,): from `label_rows`."""
        raise NotImplementedError

    def step(self, arithmetic: Arithmetic, state: Any, codes: Tensor, place: int) -> Tensor:
        """Logits (B, K) of the code at `place`, from codes (B, places) known before it. Places come in order."""
        raise NotImplementedError

    def loss(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of a code, in nats, ()."""
        logits = self(codes, labels)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    @torch.no_grad()
    def bits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log2 p(codes | label) of each sample, (B,) float64: what an ideal coder needs for it. Call it in eval mode.

        Under the uniform prior that the VQ-VAE is trained with it is (places) log2 K.
        """
        logits = self(codes, labels)
        rows = max(1, _IN_FLOAT64 // max(1, logits[:1].numel()))
        parts = zip(logits.split(rows), codes.flatten(1).split(rows), strict=True)
        nats = [F.cross_entropy(some.double().mT, its, reduction="none").sum(1) for some, its in parts]
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
        """New codes (count, *grid), one place after the other; what earlier places computed is kept.

        Args:
            count: how many samples.
            labels: (count,), or None.
            temperature: divides the logits; 0 takes the likeliest code.
            top_k: draw among the k likeliest codes.
            top_p: draw among the fewest codes that have this probability together.
            guidance: g in  logits = g logits(label) + (1 - g) logits(no label);  1 is the model itself.
            given: (count, *grid), codes to keep, -1 where one is to be drawn: an image's upper half, for example.
                Places are drawn in raster order, from the codes before them alone.
            generator: for the draws, on the device of the model.

        Raises:
            ValueError: an argument that can't be, by name.
        """
        self._check_sampling(count, temperature, top_k, top_p, guidance, labels, given)
        floats, guided = Floats(), guidance != 1.0
        device = next(self.parameters()).device
        rows = self.label_rows(labels, count, device)
        if guided:
            rows = torch.cat([rows, self.label_rows(None, count, device)])
        state = self.begin(floats, rows)
        kept = None if given is None else given.flatten(1).to(device)
        codes = torch.zeros(len(rows), self.places, dtype=torch.int64, device=device)
        for place in range(self.places):
            logits = self.step(floats, state, codes, place).float()
            if guided:
                logits = guidance * logits[:count] + (1 - guidance) * logits[count:]
            code = draw(logits, temperature, top_k, top_p, generator)
            if kept is not None:
                code = torch.where(kept[:, place] >= 0, kept[:, place], code)
            codes[:, place] = torch.cat([code, code]) if guided else code
        return codes[:count].unflatten(1, self.grid)

    def label_rows(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        """(count,): rows of a table of `classes` + 1 labels, the last of which stands for "no label"."""
        none = torch.full((count,), self.classes, device=device)
        if labels is None:
            return none
        if self.classes == 0:
            raise ValueError("labels: this prior was made without classes")
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(f"labels: must be int64 of shape ({count},), got {labels.dtype} {tuple(labels.shape)}")
        _check_range("labels", labels, self.classes)
        return labels.to(device)

    def rows_to_learn(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        """`label_rows`, of which in training some are left out."""
        rows = self.label_rows(labels, count, device)
        if labels is not None and self.training and self.label_dropout:
            rows = rows.masked_fill(torch.rand(count, device=device) < self.label_dropout, self.classes)
        return rows

    def checked(self, codes: Tensor) -> Tensor:
        """Codes that fit, as (B, places)."""
        if codes.shape[1:] != self.grid or codes.dtype != torch.int64:
            raise ValueError(
                f"codes: must be int64 of shape (B, {', '.join(map(str, self.grid))}), got {codes.dtype}"
                f" {tuple(codes.shape)}"
            )
        _check_range("codes", codes, self.codebook_size)
        return codes.flatten(1)

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
            raise ValueError(f"guidance: of {guidance} needs labels to guide by")
        if given is not None and (given.shape != (count, *self.grid) or given.dtype != torch.int64):
            raise ValueError(
                f"given: must be int64 of shape {(count, *self.grid)}, got {given.dtype} {tuple(given.shape)}"
            )
        if given is not None:
            _check_range("given", given, self.codebook_size, least=-1)
        if self.training:
            raise ValueError("sample: call eval() first, or dropout disturbs it")


def _check_range(name: str, values: Tensor, limit: int, *, least: int = 0) -> None:
    # Elsewhere than on the CPU the device asserts when it looks them up: looking here would wait for it.
    if values.device.type == "cpu" and values.numel() and not (values.min() >= least and values.max() < limit):
        raise ValueError(f"{name}: must lie in [{least}, {limit}), got {int(values.min())} to {int(values.max())}")
