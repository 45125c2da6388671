"""Settings in TOML files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastvq.cli.main import main
from fastvq.errors import ConfigError
from fastvq.modalities import ImageConfig
from fastvq.modalities.settings import Settings
from fastvq.training import Trainer
from fastvq.training.config import PriorConfig
from fastvq.training.config_file import NAME, read_settings, to_toml

from .tiny import TINY, tiny_images


@pytest.mark.parametrize(
    ("config", "section"),
    [
        (ImageConfig(), "train"),
        (ImageConfig(data='a "b"\\c\n\x7fé', learning_rate=1e-30, flip=False, seed=2**63 - 1), "train"),
        (ImageConfig(data="photos", image_size=64, grayscale=False, reconstruction_variance=1e300), "train"),
        (ImageConfig(bottleneck="rvq", bottleneck_options={"codebook_sizes": [8, 4], "beam_size": 2}), "train"),
        (ImageConfig(bottleneck="fsq", bottleneck_options={"levels": [8, 5, 5], "preserve_symmetry": True}), "train"),
        (ImageConfig(bottleneck="rvq", bottleneck_options={"num_quantizers": 3, "x y": 'a"b', "z": 1e-9}), "train"),
        (PriorConfig(), "prior"),
        (PriorConfig(kind="lstm", dim=16, dropout=0.0), "prior"),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, config: Settings, section: str) -> None:
    (tmp_path / "a.toml").write_text(to_toml(config))
    found = read_settings(tmp_path / "a.toml", section, type(config))
    assert found.pop("modality", "") == config.modality
    assert type(config)(**found) == config


def test_every_run_has_its_settings(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=2)
    Trainer(config, tiny_images(), tmp_path / "run").fit(progress=False)
    found = read_settings(tmp_path / "run" / NAME, "train", ImageConfig)
    assert found.pop("modality") == "image"
    assert ImageConfig(**found) == config
    Trainer(dataclasses.replace(config, steps=3), tiny_images(), tmp_path / "run", resume=True).fit(progress=False)
    assert read_settings(tmp_path / "run" / NAME, "train", ImageConfig)["steps"] == 3


def test_a_file_may_have_a_table_for_each_command(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    path.write_text("[train]\nbatch-size = 8\n[prior]\nsteps = 5\n")
    assert read_settings(path, "train", ImageConfig) == {"batch_size": 8}
    assert read_settings(path, "prior", PriorConfig) == {"steps": 5}
    path.write_text("[prior]\nsteps = 5\n")
    assert read_settings(path, "train", ImageConfig) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps = ", "is no TOML file: Invalid value"),
        (b"\xff", "is no TOML file"),
        (b"stepz = 3", "has 'stepz', which is no setting of fastvq train: perhaps steps"),
        (b"xyzzy = 3", "has 'xyzzy', which is no setting of fastvq train: fastvq train --help lists them"),
        (
            b"steps = 3\n[prior]\nsteps = 4",
            r"is divided into \[train\], \[prior\], \[contrast\], but has steps outside of them",
        ),
        (b"[sample]\nx = 4", "has 'sample', which is no setting"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^config: .*a.toml {message}"):
        read_settings(tmp_path / "a.toml", "train", ImageConfig)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=f"^config: {path}: "):
            read_settings(path, "train", ImageConfig)


@pytest.mark.parametrize(
    ("content", "message"),
    [("batch_size = 'x'", "--batch-size must be an integer, got 'x'"), ("data = 3", "--data must be a text, got 3")],
)
def test_values_of_another_type_are_named(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text(content)
    assert main(["train", f"--out={tmp_path / 'run'}", f"--config={tmp_path / 'a.toml'}"]) == 2
    assert capsys.readouterr().err == f"fastvq: {message}\n"


def test_options_come_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def stop(config: ImageConfig, **_: Any) -> None:
        found.update(config.to_json())
        raise ConfigError("enough")

    monkeypatch.setattr("fastvq.training.load_examples", stop)
    (tmp_path / "a.toml").write_text("steps = 7\nbatch_size = 8\nflip = false\n")
    arguments = ["train", f"--out={tmp_path / 'run'}", f"--config={tmp_path / 'a.toml'}", "--steps=9", "--flip"]
    assert main(arguments) == 2
    assert (found["steps"], found["batch_size"], found["flip"]) == (9, 8, True)
    assert found["image_size"] == ImageConfig.image_size
