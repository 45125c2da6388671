"""Outputs of a run stay apart from the images that it learned from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvq.cli.main import main
from fastvq.data.registry import check_outside
from fastvq.errors import ConfigError
from fastvq.runs.encode import encode_files

from ..tiny_runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of a few steps on a folder of images, the folder, and a coded image of it."""
    run, images = tiny_run(tmp_path_factory.mktemp("outputs"), count=12, grayscale=False)
    coded = run.parent / "one.fvq"
    encode_files(run, images / "00.png", coded)
    return run, images, coded


@pytest.mark.parametrize(
    "command",
    [
        ["reconstruct", "RUN", "--out=OUT"],
        ["reconstruct", "RUN", "one.png", "--out=OUT"],
        ["sample", "RUN", "--out=OUT"],
        ["decode", "CODED", "OUT", "--run=RUN"],
    ],
)
@pytest.mark.parametrize("name", ["03.png", "new.png", "below/new.png"])
def test_no_picture_replaces_or_becomes_an_image_of_the_data(run, capsys, command, name):
    folder, images, coded = run
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    places = {"RUN": str(folder), "OUT": str(images / name), "CODED": str(coded)}
    arguments = []
    for part in command:
        option, equals, value = part.rpartition("=")
        arguments.append(option + equals + places.get(value, value))
    assert main(arguments) == 2
    assert f"out: {images / name} lies in {images}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before


def test_a_folder_of_samples_and_moved_data_count_as_well(run, tmp_path, capsys):
    folder, images, coded = run
    for arguments in (
        ["decode", str(coded), str(images / "restored"), "--run", str(folder)],
        ["sample", str(folder), "--out", str(images / "samples")],
        ["reconstruct", str(folder), "--data", str(tmp_path), "--out", str(tmp_path / "x.png")],
    ):
        assert main(arguments) == 2
        assert " lies in " in capsys.readouterr().err


def test_other_places_are_free(run, tmp_path):
    _, images, _ = run
    for place in (tmp_path / "x.png", images.parent, images / ".hidden" / "x.png", images.with_name("images-2")):
        check_outside(place, str(images), "out")
    check_outside(Path("x.png"), "fashion-mnist", "out")
    for place in (images, images / "x", images / "x" / ".." / "y.png"):
        with pytest.raises(ConfigError, match=r"^out: .* lies in"):
            check_outside(place, str(images), "out")
