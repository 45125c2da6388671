"""Common behavior of modalities: each is found, trains, resumes, and serves the commands of a run by the same code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvq
from fastvq.cli import main as cli
from fastvq.data import DATA_SETS
from fastvq.errors import ConfigError
from fastvq.modalities import NAMES, TrainConfig, config_of, modality_of, recognized

from .folders import FOLDERS


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_json_and_name_their_modality(name: str) -> None:
    config = config_of(name)(**next((d.settings | {"data": n} for n, d in DATA_SETS.items() if d.modality == name), {}))
    written = json.loads(json.dumps(config.to_json()))
    assert written["modality"] == name
    assert TrainConfig.from_json(written) == config
    assert len(config.feature_grid) == len(config.example_format.shape) - 1


def test_settings_of_earlier_versions_are_of_images() -> None:
    written = config_of("image")().to_json()
    del written["modality"]
    assert TrainConfig.from_json(written) == config_of("image")()


def test_an_unknown_modality_is_refused() -> None:
    for call in (config_of, modality_of, lambda name: TrainConfig.from_json({"modality": name})):
        with pytest.raises(ConfigError, match=r"modality must be one of image.*, got 'smell'"):
            call("smell")
    with pytest.raises(TypeError, match="take that of a modality"):
        TrainConfig()


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_recognized_by_its_files(name: str, tmp_path: Path) -> None:
    FOLDERS[name].write(tmp_path / "data")
    assert recognized(tmp_path / "data") == name
    (tmp_path / "data" / "notes.txt").write_text("not data")
    assert recognized(tmp_path / "data") == name
    assert recognized(tmp_path / "absent") == NAMES[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_is_least_for_the_original(name: str) -> None:
    config, modality = config_of(name)(data="folder", **FOLDERS[name].settings), modality_of(name)
    low, high = modality.value_range
    x = low + (high - low) * torch.rand(3, *config.example_format.shape)
    noisy = (x + 0.1 * torch.randn_like(x)).clamp(low, high)
    objective = modality.objective(config)
    loss, error = objective.loss(noisy, x)
    errors = objective.errors(noisy, x)
    assert errors.shape == (3,)
    assert errors.dtype == torch.float64
    assert error.item() == pytest.approx(errors.mean().item(), rel=1e-3)
    assert loss > objective.loss(x, x)[0]
    assert errors.min() > objective.errors(x, x).max()
    assert modality.measures[objective.measure].text(objective.value(error.item()))


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_written_and_read(name: str, tmp_path: Path) -> None:
    config, modality = config_of(name)(data="folder", **FOLDERS[name].settings), modality_of(name)
    FOLDERS[name].write(tmp_path)
    stored = modality.reader.read(next(iter(sorted(tmp_path.rglob("*.*")))), config.example_format, None)
    assert stored.shape[1:] == config.example_format.shape
    assert str(stored.dtype) == f"torch.{modality.reader.dtype}"
    path = tmp_path / f"written.{modality.usual_ending}"
    modality.write(path, fastvq.data.examples.to_float(stored[0]), config, modality.usual_ending)
    again = modality.reader.read(path, config.example_format, None)
    assert (again[0].float() - stored[0].float()).abs().max() <= 1


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Return a modality, a run of three steps with a prior of two, and the folder of its data."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    FOLDERS[name].write(root / "data")
    options = [f"--{key.replace('_', '-')}={value}" for key, value in FOLDERS[name].settings.items()]
    sizes = ["--codebook-size=8", "--dim=4", "--steps=3", "--batch-size=4", "--warmup-steps=1"]
    assert cli.main(["train", f"--out={root / 'run'}", f"--data={root / 'data'}", *options, *sizes, "--quiet"]) == 0
    assert (
        cli.main(
            ["prior", str(root / "run"), "--steps=2", "--dim=8", "--heads=2", "--depth=1", "--batch-size=4", "--quiet"]
        )
        == 0
    )
    return name, root / "run", root / "data"


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    status = cli.main([*map(str, arguments)])
    out = capsys.readouterr()
    assert status == 0, out.err
    return out.out


def test_a_run_is_resumed(
    run: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder, _ = run
    for drawing in ("pictures.picture_run", "pictures.picture_reconstructions", "run_page.write_run_page"):
        monkeypatch.setattr(f"fastvq.runs.{drawing}", lambda *arguments, **options: None)
    folder = shutil.copytree(folder, tmp_path / "run")
    more = ["train", "--out", folder, "--resume", "--steps", 4]
    assert cli.main([*map(str, more)]) == 2  # the prior would be lost
    assert "resuming at step 3 of 3, to 4" in printed(capsys, *more, "--overwrite")
    one = modality_of(name).noun[0]
    assert f"held-out {one}" in printed(capsys, "train", "--out", folder, "--resume")


def test_the_page_has_the_words_of_the_modality(run: tuple[str, Path, Path]) -> None:
    name, folder, _ = run
    page = (folder / "index.html").read_text()
    assert f"Held-out {modality_of(name).noun[1]} are decoded with" in page
    for picture in ("reconstructions", "indices", "usage", "curves", "samples", "neighbors"):
        assert (folder / f"{picture}.png").exists(), picture
    if name != "image":
        assert "image" not in page.lower().replace("<img", "").replace("image-rendering", "")


def test_files_are_encoded_and_decoded(
    run: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder, data = run
    modality = modality_of(name)
    for model in ("adaptive", "prior"):
        coded = tmp_path / f"{model}.fvq"
        assert modality.noun[1] in printed(capsys, "encode", data, coded, "--run", folder, "--model", model)
        printed(capsys, "decode", coded, tmp_path / model, "--run", folder)
    files = sorted(path.name for path in (tmp_path / "prior").iterdir())
    assert files
    assert all(file.endswith(f".{modality.usual_ending}") for file in files)
    for file in files:
        assert (tmp_path / "prior" / file).read_bytes() == (tmp_path / "adaptive" / file).read_bytes()


def test_reconstruction_evaluation_and_samples(
    run: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder, data = run
    modality = modality_of(name)
    one, many = modality.noun
    assert f"held-out {one}" in printed(capsys, "reconstruct", folder, "--out", tmp_path / "held-out.png")
    printed(capsys, "reconstruct", folder, data, "--out", tmp_path / "own.png")
    assert many in printed(capsys, "evaluate", folder)
    record = json.loads((folder / "evaluation.json").read_text())
    measure = modality.objective(fastvq.load(folder).config).measure
    assert record["measures"][measure]["low"] <= record["measures"][measure]["value"]
    printed(capsys, "sample", folder, "--count", 2, "--out", tmp_path / "samples")
    assert len(list((tmp_path / "samples").rglob(f"*.{modality.usual_ending}"))) == 2
    printed(capsys, "sample", folder, "--count", 2, "--out", tmp_path / "grid.png")
    assert folder.name in printed(capsys, "runs", folder.parent)


def test_the_loaded_model_takes_and_returns_signals(run: tuple[str, Path, Path]) -> None:
    name, folder, _ = run
    model = fastvq.load(folder)
    modality, shape = modality_of(name), model.config.example_format.shape
    stored = torch.zeros(2, *shape, dtype=getattr(torch, modality.reader.dtype))
    indices = model.encode(stored)
    assert indices.shape[1 : 1 + len(model.config.feature_grid)] == model.config.feature_grid
    restored = model.decode(indices)
    assert restored.shape == (2, *shape)
    assert torch.equal(restored, model.reconstruct(stored))
    low, high = modality.value_range
    assert low <= restored.min() <= restored.max() <= high
    assert model.sample(2, seed=0).shape == (2, *shape)
    with pytest.raises(ValueError, match=f"^{modality.noun[1]}: must be {modality.reader.dtype}, or floats in"):
        model.encode(stored[:, :, :-1])
    with pytest.raises(ValueError, match="got values from"):
        model.encode(torch.full((1, *shape), 3.0))
