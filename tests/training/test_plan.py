"""Plans of trainings: sizes, traffic and bits are those that models have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastvq import distributed
from fastvq.cli.main import main
from fastvq.modalities import NAMES, ImageConfig, config_of
from fastvq.models import Continuous
from fastvq.models.bottlenecks import KINDS, describe_options
from fastvq.training import build_model
from fastvq.training.plan import lines_of, plan_training

SMALL: dict[str, Any] = {
    "data": "folder", "image_size": 16, "grayscale": False, "width": 8, "residual_width": 4, "encoder_blocks": 1,
    "decoder_blocks": 1,
}  # fmt: skip


@pytest.mark.parametrize("bottleneck", KINDS)
def test_every_bottleneck_has_the_parameters_and_indices_of_the_plan(bottleneck: str) -> None:
    config = ImageConfig(**SMALL, bottleneck=bottleneck)
    plan = plan_training(config)
    model = build_model(config)
    assert sum(plan.parameters.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.buffers == sum(buffer.numel() for buffer in model.buffers())
    stages = []
    if not isinstance(model.bottleneck, Continuous):
        adapter = model.adapter
        chosen = adapter.stages(model.encode(torch.rand(1, 3, 16, 16)))
        stages = [(one.numel(), size) for one, size in zip(chosen, adapter.stage_sizes(), strict=True)]
    assert list(plan.stages) == stages
    bits = lines_of(plan)[-1]
    assert bits.startswith("bits ")
    assert ("no indices" in bits) == (not stages)


@pytest.mark.parametrize("modality", NAMES)
def test_every_modality_has_a_plan(modality: str) -> None:
    config = config_of(modality)()
    plan = plan_training(config)
    assert plan.saved > 0
    assert plan.examples is not None
    half = plan_training(dataclasses.replace(config, accumulate=2, weight_average=0.9))
    features = "features for the backward pass"
    assert half.memory[features] == plan.memory[features] // 2
    assert half.memory["averaged weights"] == plan.memory["weights and codebooks"]


@pytest.mark.parametrize(
    ("bottleneck", "options"),
    [("vq", {"heads": 2}), ("rvq", {}), ("grouped-rvq", {}), ("sim-vq", {}), ("fsq", {})],
)
def test_the_all_reduce_of_codebooks_has_the_planned_bytes(
    monkeypatch: pytest.MonkeyPatch, bottleneck: str, options: dict[str, Any]
) -> None:
    config = ImageConfig(**SMALL, dim=8, bottleneck=bottleneck, bottleneck_options=options)
    if bottleneck in ("vq", "rvq", "grouped-rvq"):
        config = dataclasses.replace(config, codebook_size=16)
    model = build_model(config)
    x = torch.rand(4, 3, 16, 16)
    model(x)  # initializes the codebooks
    sent: list[int] = []

    def all_reduce(tensor: Tensor) -> None:
        sent.append(tensor.nbytes)

    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model(x)
    assert sum(sent) == plan_training(config).codebook_traffic


def test_the_plan_needs_no_folder_and_writes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--plan", "--bottleneck", "rvq", "--num-quantizers", "2", "--adversarial-weight", "1"]) == 0
    printed = capsys.readouterr().out
    assert "discriminator" in printed
    assert "882 for each image of 1 x 28 x 28: indices 2 x 49 of 512 codes" in printed
    assert main(["train", "--plan", "--resume"]) == 2
    assert "--out: --resume needs the folder of the run" in capsys.readouterr().err
    assert main(["train", "--help-bottleneck", "vqq"]) == 2
    assert "bottleneck must be one of vq, rvq" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_of_a_bottleneck_are_listed_with_their_defaults() -> None:
    lines = describe_options("fsq")
    assert lines[0] == "fsq: FSQ"
    assert any("--levels " in line and "(default: 8,8,8)" in line for line in lines)
    assert describe_options("none")[0] == "none: NoBottleneck"
