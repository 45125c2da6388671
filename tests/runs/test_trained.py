"""The trained models of a run as one object."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import fastvq
from fastvq.errors import CheckpointError, ConfigError
from fastvq.models.bottlenecks import SHARED
from fastvq.runs.load import load_model, run_examples
from fastvq.runs.train_prior import train_prior
from fastvq.runs.trained import TrainedModel
from fastvq.training import Trainer, load_examples
from fastvq.training.config import PriorConfig
from fastvq.training.evaluation import reconstruct

from ..tiny_runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, _ = tiny_run(tmp_path_factory.mktemp("trained"), count=30, grayscale=False)
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1), progress=False)
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return fastvq.load(run)


def test_it_does_what_the_models_of_the_run_do(run: Path, model: TrainedModel) -> None:
    images = run_examples(run).test
    vqvae, _ = load_model(run)
    restored, indices = reconstruct(vqvae, images / 255)
    assert torch.equal(model.encode(images), indices)
    assert torch.equal(model.decode(indices), restored)
    assert torch.equal(model.reconstruct(images), restored)
    assert torch.equal(model(images / 255), restored)
    assert model.decode(indices.int()).dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert not model.training
    assert not model.vqvae.training
    assert "multiples of 4" in repr(model)


def test_images_may_be_of_another_size_than_those_of_the_training(model: TrainedModel) -> None:
    images = torch.rand(2, 3, 24, 8)
    assert model.encode(images).shape == (2, 6, 2)
    assert model.reconstruct(images).shape == images.shape


def test_samples_follow_the_seed(model: TrainedModel) -> None:
    first = model.sample(3, seed=5)
    assert first.shape == (3, 3, 16, 16)
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, model.sample(3, seed=5, temperature=1.0))
    assert not torch.equal(first, model.sample(3, seed=6))


def test_nothing_changes(run: Path, model: TrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not model.reconstruct(torch.rand(2, 3, 16, 16, requires_grad=True)).requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="eval mode"):
        model.train()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 16, 16), r"images\[None\]"),
        (torch.zeros(1, 16, 16, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(1, 1, 16, 16), r"expand\(-1, 3"),
        (torch.zeros(1, 3, 16, 18), r"H and W multiples of 4, such as the 16 x 16 .* got \(1, 3, 16, 18\)"),
        (torch.zeros(1, 3, 0, 16), "multiples of 4"),
        (torch.full((1, 3, 16, 16), 200.0), "values from 200 to 200"),
        (torch.full((1, 3, 16, 16), torch.nan), "values from nan"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), r"got \(1, 3, 16, 16\) torch.int64"),
    ],
)
def test_other_images_are_refused_with_what_they_may_be(
    model: TrainedModel, images: torch.Tensor, message: str
) -> None:
    for function in (model.encode, model.reconstruct):
        with pytest.raises(ValueError, match=f"^images: must be uint8, or floats .*{message}"):
            function(images)


def test_other_arguments_are_refused_by_name(model: TrainedModel) -> None:
    with pytest.raises(TypeError, match="images: must be a tensor, got ndarray"):
        model.encode(torch.zeros(1, 3, 16, 16).numpy())
    with pytest.raises(ValueError, match=r"indices: must be \(B, h, w\)"):
        model.decode(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="count: must be at least 1, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match="label: this prior was trained without classes, got 1"):
        model.sample(label=1)


def test_a_checkpoint_is_loaded_too_wherever_it_is(run: Path, model: TrainedModel, tmp_path: Path) -> None:
    [folder] = (run / "checkpoints").iterdir()
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(fastvq.load(folder).sample(2, seed=0), model.sample(2, seed=0))
    copy = fastvq.load(shutil.copytree(folder, tmp_path / "best"))
    assert torch.equal(copy.encode(images), model.encode(images))
    with pytest.raises(CheckpointError, match="best is a checkpoint away from its run"):
        copy.sample()


def test_folders_without_a_run_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent holds no checkpoint: it does not exist"):
        fastvq.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl holds no checkpoint: it is not a folder"):
        fastvq.load(run / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=f"(?s)holds no checkpoint, but these runs:.*{run}"):
        fastvq.load(run.parent)
    for prior in (run / "prior", next((run / "prior" / "checkpoints").iterdir())):
        with pytest.raises(CheckpointError, match=f"is the prior of the run {run}: load that one"):
            fastvq.load(prior)
    with pytest.raises(ConfigError, match="'nowhere' cannot be used"):
        fastvq.load(run, device="nowhere")


def test_damage(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    [prior] = (copy / "prior" / "checkpoints").iterdir()
    (prior / "state.safetensors").write_bytes(b"")
    loaded = fastvq.load(copy)
    assert loaded.prior is None
    with pytest.raises(CheckpointError, match="is damaged"):
        loaded.sample()
    shutil.rmtree(copy / "prior")
    with pytest.raises(CheckpointError, match="has no prior yet: fastvq prior"):
        fastvq.load(copy).sample()
    [folder] = (copy / "checkpoints").iterdir()
    (folder / "state.safetensors").unlink()
    for damaged in (copy, folder):
        with pytest.raises(CheckpointError, match=r"step-00000003 is damaged"):
            fastvq.load(damaged)


@pytest.mark.parametrize("bottleneck", ["none", "vae"])
def test_a_run_without_indices_reconstructs(run: Path, tmp_path: Path, bottleneck: str) -> None:
    _, config = load_model(run)
    shared = {} if bottleneck == "none" else SHARED
    config = dataclasses.replace(config, bottleneck=bottleneck, steps=1, **shared)
    Trainer(config, load_examples(config), tmp_path / "plain").fit(progress=False)
    plain = fastvq.load(tmp_path / "plain")
    assert plain.reconstruct(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    for call in (lambda: plain.encode(torch.rand(1, 3, 16, 16)), lambda: plain.decode(torch.zeros(1, 4, 4).long())):
        with pytest.raises(ConfigError, match=r"trained with.* bottleneck.*: it has no indices"):
            call()
    with pytest.raises(CheckpointError, match="a bottleneck that has no indices, so it has no prior"):
        plain.sample()
