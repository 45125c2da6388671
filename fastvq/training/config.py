"""Settings of a prior over indices and of its training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastvq.errors import ConfigError
from fastvq.settings import Settings, setting

# The keys of `fastvq.models.priors.PRIORS`, repeated so that reading settings imports no model.
PRIOR_KINDS = ("transformer", "pixelcnn", "lstm", "hierarchical", "next-scale")
WITH_HEADS = ("transformer", "hierarchical", "next-scale")
"""Kinds of priors with attention."""
# Those of `fastvq.models.priors.transformer`.
PATTERNS = ("flat", "delay")


@dataclass(frozen=True)
class PriorConfig(Settings):
    """Settings of a prior over indices and of its training."""

    kind: str = setting("transformer", f"one of {', '.join(PRIOR_KINDS)}")
    dim: int | None = setting(None, "width (default: the kind's own)")
    depth: int | None = setting(None, "blocks or layers (default: the kind's own)")
    heads: int = setting(4, f"attention heads of {', '.join(WITH_HEADS)}, which divide the width")
    pattern: str = setting("flat", "order of several indices at a position: flat, or delay for the transformer")
    dropout: float = setting(0.1, "dropout rate of the layers")
    label_dropout: float = setting(0.1, "share of training samples without their label, which guidance needs")

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

    def learning_rate_at(self, step: int) -> float:
        """Return `peak * (step + 1) / warmup` during warm-up, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, left)))

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments of a prior of this kind that do not depend on the data."""
        settings: dict[str, Any] = {"dropout": self.dropout, "label_dropout": self.label_dropout}
        settings |= {name: getattr(self, name) for name in ("dim", "depth") if getattr(self, name) is not None}
        settings |= {"heads": self.heads} if self.kind in WITH_HEADS else {}
        return settings | ({"pattern": self.pattern} if self.kind == "transformer" else {})
