"""Settings of a prior over indices, of a contrastive model, and of their trainings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvq.errors import ConfigError
from fastvq.modalities.settings import Settings, setting

# The keys of `fastvq.models.priors.PRIORS`, repeated so that reading settings imports no model.
PRIOR_KINDS = ("transformer", "pixelcnn", "lstm", "depth", "hierarchical", "next-scale")
WITH_HEADS = ("transformer", "depth", "hierarchical", "next-scale")
"""Kinds of priors with attention."""
# Those of `fastvq.models.priors.transformer`.
PATTERNS = ("flat", "delay")
_SIZES = ("dim", "depth", "stage_dim", "stage_depth")


@dataclass(frozen=True)
class _WarmedUp(Settings):
    """Base class of settings whose learning rate rises over `warmup_steps` and falls to zero at the last step."""

    if TYPE_CHECKING:
        learning_rate: float
        warmup_steps: int

    def learning_rate_at(self, step: int) -> float:
        """Return `peak * (step + 1) / warmup` during warm-up, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, left)))


@dataclass(frozen=True)
class PriorConfig(_WarmedUp):
    """Settings of a prior over indices and of its training."""

    kind: str = setting("transformer", f"one of {', '.join(PRIOR_KINDS)}")
    dim: int | None = setting(None, "width (default: the kind's own)")
    depth: int | None = setting(None, "blocks or layers (default: the kind's own)")
    heads: int = setting(4, f"attention heads of {', '.join(WITH_HEADS)}, which divide the width")
    pattern: str = setting("flat", "order of several indices at a position: flat, or delay for the transformer")
    stage_dim: int | None = setting(None, "width of the kind depth over the stages of a position (default: its own)")
    stage_depth: int | None = setting(None, "blocks of the kind depth over the stages of a position (default: its own)")
    dropout: float = setting(0.1, "dropout rate of the layers")
    label_dropout: float = setting(
        0.1, "share of training samples without their label or caption, which guidance needs"
    )
    corruption: float = setting(
        0.0, "largest share of a training sample's indices that random ones replace where later ones are predicted"
    )
    text: bool = setting(False, "learn the captions of the examples as well, so that samples follow a text")
    text_vocabulary: int = setting(1024, "largest number of text indices: bytes, parts of words, and words")
    text_length: int = setting(32, "largest number of text indices of a caption; longer ones are cut")
    text_weight: float = setting(0.125, "share of the loss that is the text's")

    steps: int = setting(1400, "optimizer steps")
    batch_size: int = setting(48, "grids of indices per step")
    learning_rate: float = setting(3e-3, "peak learning rate of AdamW")
    warmup_steps: int = setting(50, "steps of linear warm-up, before a cosine decay to zero")
    weight_decay: float = setting(0.05, "weight decay of AdamW")
    seed: int = setting(0, "seed of weights, data order and dropout")
    device: str = setting("cpu", "torch device to train on")

    log_every: int = setting(20, "steps between training records in prior/metrics.jsonl")
    evaluate_every: int = setting(350, "steps between evaluations on the held-out indices")
    checkpoint_every: int = setting(350, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in PRIOR_KINDS:
            raise ConfigError(f"kind must be one of {', '.join(PRIOR_KINDS)}, got {self.kind!r}")
        if self.pattern not in PATTERNS:
            raise ConfigError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        if self.pattern != "flat" and self.kind != "transformer":
            raise ConfigError(f"pattern must be flat for a prior of kind {self.kind}, got {self.pattern!r}")
        if self.kind != "depth":
            for name in ("stage_dim", "stage_depth"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} must be left out for a prior of kind {self.kind}: it is for depth")
        if self.text and (self.kind, self.pattern) != ("transformer", "flat"):
            raise ConfigError(
                f"text needs a transformer of the pattern flat, got {self.kind} of the pattern {self.pattern}"
            )

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments of a prior of this kind that do not depend on the data."""
        settings: dict[str, Any] = {"dropout": self.dropout, "label_dropout": self.label_dropout}
        settings |= {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        settings |= {"heads": self.heads} if self.kind in WITH_HEADS else {}
        if self.text:
            return settings | {"text_weight": self.text_weight, "summed": True}
        return settings | ({"pattern": self.pattern} if self.kind == "transformer" else {})


@dataclass(frozen=True)
class ContrastiveConfig(_WarmedUp):
    """Settings of a contrastive model of images and captions and of its training."""

    dim: int = setting(64, "length of the vectors of images and captions")
    width: int = setting(32, "channels of the first convolution; each next one has twice as many")
    text_width: int = setting(96, "width of the captions' transformer, a multiple of 4")
    text_depth: int = setting(1, "its blocks")
    dropout: float = setting(0.1, "dropout rate in its blocks")
    text_vocabulary: int = setting(1024, "largest number of text indices: bytes, parts of words, and words")
    text_length: int = setting(32, "largest number of text indices of a caption; longer ones are cut")
    shift: int = setting(2, "pixels by which images are shifted at random, at most")

    steps: int = setting(800, "optimizer steps")
    batch_size: int = setting(128, "images with their captions per step")
    learning_rate: float = setting(2e-3, "peak learning rate of AdamW")
    warmup_steps: int = setting(50, "steps of linear warm-up, before a cosine decay to zero")
    weight_decay: float = setting(0.1, "weight decay of AdamW")
    seed: int = setting(0, "seed of weights, data order, shifts and dropout")
    device: str = setting("cpu", "torch device to train on")

    log_every: int = setting(20, "steps between training records in contrastive/metrics.jsonl")
    evaluate_every: int = setting(200, "steps between evaluations on the held-out captions")
    checkpoint_every: int = setting(200, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_width % 4:
            raise ConfigError(f"text_width must be a multiple of 4, the number of heads, got {self.text_width}")

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments of the model that do not depend on the data."""
        return {name: getattr(self, name) for name in ("dim", "width", "text_width", "text_depth", "dropout")}
