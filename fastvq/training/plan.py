"""Size, memory, steps, traffic and bits of a training, from its settings alone.

Models are built on the device "meta", where weights and features have shapes but no values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastvq.codebook import Codebook
from fastvq.data import DATA_SETS
from fastvq.data.source import suffixes_in
from fastvq.errors import counted
from fastvq.modalities import ImageConfig, TrainConfig, modality_of
from fastvq.models import VQVAE, Continuous

from .adversary import adversary_of
from .build import build_model

_FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Plan:
    """Size, cost and bits of a training.

    Attributes:
        config: its settings.
        parameters: numbers that the optimizer changes, of encoder, bottleneck, decoder and discriminator.
        buffers: further numbers of the model: codebooks that learn by averages, and these averages.
        saved: bytes that the networks keep for the backward pass of one example, in float32.
        stages: (indices of an example, K) of each codebook; empty without indices.
        codebook_traffic: bytes in a step's all-reduce of codebook statistics, where there are several ranks.
        examples: number of examples to learn from, None if only reading them would tell.
    """

    config: TrainConfig
    parameters: dict[str, int]
    buffers: int
    saved: int
    stages: tuple[tuple[int, int], ...]
    codebook_traffic: int
    examples: int | None

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by what they are for, in a training of one process."""
        weights = _FLOAT * sum(self.parameters.values())
        buffers = _FLOAT * self.buffers
        found = {"weights and codebooks": weights + buffers, "gradients": weights, "Adam": 2 * weights}
        if self.config.weight_average:
            model = weights - _FLOAT * self.parameters.get("discriminator", 0)
            found["averaged weights"] = model + buffers
        return found | {"features for the backward pass": self.saved * self.config.batch_size // self.config.accumulate}

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes in the all-reduces of a step, where there are several ranks."""
        discriminator = _FLOAT * self.parameters.get("discriminator", 0)
        model = _FLOAT * sum(self.parameters.values()) - discriminator
        found = {"gradients": model, "codebooks": self.codebook_traffic, "discriminator": discriminator}
        return {name: size for name, size in found.items() if size}

    @property
    def bits(self) -> float:
        """Bits of an example's indices, each stored in log2 K bits."""
        return sum(count * math.log2(size) for count, size in self.stages)


def plan_training(config: TrainConfig) -> Plan:
    """Return the plan of a training with these settings; nothing is read but names of files.

    Raises:
        ConfigError: the settings fit no model.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config)
        parts: dict[str, nn.Module] = {name: getattr(model, name) for name in ("encoder", "bottleneck", "decoder")}
        if adversary := adversary_of(config, torch.device("meta")):
            parts["discriminator"] = adversary.discriminator
        saved = _saved(model, config)
    parameters = {
        name: sum(weight.numel() for weight in part.parameters() if weight.requires_grad)
        for name, part in parts.items()
    }
    stages: tuple[tuple[int, int], ...] = ()
    if not isinstance(model.bottleneck, Continuous):
        adapter = model.adapter
        indices = torch.empty(1, *adapter.index_shape(config.feature_grid), dtype=torch.int64, device="meta")
        chosen = adapter.stages(indices)
        stages = tuple((one.numel(), size) for one, size in zip(chosen, adapter.stage_sizes(), strict=True))
    return Plan(
        config,
        {name: count for name, count in parameters.items() if count},
        sum(buffer.numel() for buffer in model.buffers()),
        saved,
        stages,
        sum(_statistics(module) for module in parts["bottleneck"].modules()),
        _examples(config),
    )


def _saved(model: VQVAE, config: TrainConfig) -> int:
    """Return the bytes that encoder and decoder save for the backward pass of one example."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage takes the place of another one
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept.append(tensor)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        features = model.encoder(torch.empty(1, *_learned_shape(config), device="meta"))
        model.decoder(features)
    return sum(sizes.values())


def _learned_shape(config: TrainConfig) -> tuple[int, ...]:
    """Return the shape of the part of an example that is learned from at a time."""
    shape = tuple(config.example_format.shape)
    crop: int | None = getattr(config, "crop_length", None)
    return shape if crop is None else (*shape[:-1], crop)


def _statistics(module: nn.Module) -> int:
    """Return the bytes that a codebook adds to an all-reduce: counts, sums, and candidates for dead codes."""
    if not isinstance(module, Codebook) or not module.learns(None):
        return 0
    rows = module.heads * module.size * (1 if module.replacer is None else 2)
    return _FLOAT * rows * (1 + module.dim)


def _examples(config: TrainConfig) -> int | None:
    if config.data in DATA_SETS:
        return DATA_SETS[config.data].count[0]
    if not isinstance(config, ImageConfig) or not Path(config.data).exists():
        return None
    suffixes = modality_of(config.modality).reader.suffixes
    files = sum(count for ending, count in suffixes_in(config.data).items() if ending in suffixes)
    return round(files * (1 - config.test_fraction))


def lines_of(plan: Plan) -> list[str]:
    """Return a plan as lines to print."""
    config, modality = plan.config, modality_of(plan.config.modality)
    one, many = modality.noun
    shape = config.example_format.shape
    lines = [
        f"parameters    {_listed(plan.parameters, '{:,}'.format)}; codebooks and averages {plan.buffers:,}",
        f"memory        {_listed(plan.memory, _megabytes)} (float32, without those of the bottleneck and of losses)",
        f"steps         {config.steps:,} of {counted(config.batch_size, one, many)}{_epochs(plan)}",
        f"all-reduce    {_listed(plan.traffic, _megabytes)} a step on several processes",
    ]
    if not plan.stages:
        return [*lines, f"bits          none: the bottleneck {config.bottleneck} has no indices"]
    dimensions = math.prod(shape)
    stored = 8 * dimensions * (2 if modality.value_range[0] < 0 else 1)
    lines.append(
        f"bits          {plan.bits:,.0f} for each {one} of {' x '.join(map(str, shape))}: {_stages(plan.stages)};"
        f" {plan.bits / dimensions:.4f} a value, {stored / plan.bits:,.1f} times less than stored"
    )
    if (seconds := modality.seconds(config)) is not None:
        lines[-1] += f", {plan.bits / seconds / 1000:.2f} kbit/s"
    return lines


def _stages(stages: Sequence[tuple[int, int]]) -> str:
    """Return indices and codes of each codebook in words, alike ones together."""
    different = list(dict.fromkeys(stages))
    texts = []
    for stage in different:
        times = stages.count(stage)
        texts.append(f"{f'{times} x ' if times > 1 else ''}{stage[0]:,} of {stage[1]:,} codes")
    return "indices " + " + ".join(texts)


def _epochs(plan: Plan) -> str:
    if plan.examples is None:
        return ""
    epochs = plan.config.steps * plan.config.batch_size / max(1, plan.examples)
    return f": {epochs:.1f} passes over {plan.examples:,}"


def _listed(sizes: dict[str, int], text: Any) -> str:
    total = f"{text(sum(sizes.values()))}" if len(sizes) != 1 else ""
    parts = ", ".join(f"{name} {text(size)}" for name, size in sizes.items())
    return f"{total}: {parts}" if total else parts


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
