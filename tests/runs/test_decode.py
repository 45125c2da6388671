"""`fastvq decode` of files that are damaged, foreign, hostile or too large, by the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq import coding
from fastvq.cli.main import main
from fastvq.runs.load import load_model

from ..tiny_runs import tiny_run

SIZE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of a few steps on a folder of images, and the folder."""
    return tiny_run(tmp_path_factory.mktemp("decode"), count=30, grayscale=False)


def test_a_damaged_or_foreign_file_leaves_nothing_behind(run, tmp_path, capsys):
    folder, images = run
    coded, out = tmp_path / "images.fvq", tmp_path / "out"
    assert main(["encode", str(images), str(coded), f"--run={folder}"]) == 0
    data = coded.read_bytes()
    coded.write_bytes(data[:-3])
    assert main(["decode", str(coded), str(out), f"--run={folder}"]) == 2
    assert "damaged or truncated" in capsys.readouterr().err
    coded.write_bytes(coding.encode(coding.decode(data), 24, fingerprint=b"somebody"))
    assert main(["decode", str(coded), str(out), f"--run={folder}"]) == 2
    assert "indices of another model" in capsys.readouterr().err
    assert main(["decode", str(coded), str(tmp_path / "out.npy"), f"--run={folder}"]) == 2
    assert "indices of another model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images.fvq"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["decode", "absent.fvq", "out", "--run={run}"], "absent.fvq"),
        (["decode", "{images}/00.png", "out", "--run={run}"], "not a file of fastvq indices"),
        (["decode", "{images}/00.png", "out"], "--run: needed to decode examples"),
        (["decode", "absent.fvq", "{images}", "--run={run}"], "exists: choose another folder"),
    ],
)
def test_invalid_requests_are_named(run, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    folder, images = run
    assert main([part.format(run=folder, images=images) for part in command]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


HOSTILE = {
    "a codebook of another size": (1024, (1, 4, 4), 0),
    "one axis": (24, (16,), 0),
    "no samples' axis": (24, (4, 4), 0),
    "no places": (24, (2, 0, 4), 0),
    "levels": (24, (2, 4, 4, 2), 0),
    "another grid": (24, (1, 2, 8), 0),
    "indices that are missing": (24, (2, 4, 4), -1),
    "one code, without end": (1, (1, 4000, 4000), 0),
    "one code, images without end": (1, (4_000_000, 4, 4), 0),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_indices_that_are_no_images_are_refused_before_they_are_decoded(kind, run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    model, config = load_model(folder)
    assert (config.codebook_size, config.image_size) == (24, SIZE)
    size, shape, value = HOSTILE[kind]
    indices = torch.full((1,), value).expand(shape)
    coded = tmp_path / "hostile.fvq"
    coded.write_bytes(coding.encode(indices, size, model="static", fingerprint=coding.fingerprint(model)))
    monkeypatch.setattr(coding, "decode", lambda *_, **__: pytest.fail("it was decoded"))
    assert main(["decode", str(coded), str(tmp_path / "out"), f"--run={folder}"]) == 2
    assert "an image of " in (said := capsys.readouterr().err)
    assert "is 4 x 4 indices in [0, 24)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.fvq"]


def test_a_limit_of_indices_holds_for_images_too(run, tmp_path, capsys):
    coded = tmp_path / "images.fvq"
    assert main(["encode", "--held-out", str(coded), "--run", str(run[0])]) == 0
    assert main(["decode", str(coded), str(tmp_path / "out"), "--run", str(run[0]), "--max-indices", "3"]) == 2
    assert "more than --max-indices=3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_indices_than_allowed(tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.zeros((3, 5), np.uint8))
    coded, out = str(tmp_path / "c.fvq"), str(tmp_path / "out.npy")
    assert main(["encode", str(tmp_path / "in.npy"), coded]) == 0
    assert main(["decode", coded, out, "--max-indices=14"]) == 2
    assert "15 indices, more than --max-indices=14" in capsys.readouterr().err
    assert main(["decode", coded, out, "--max-decisions=0", "--max-indices=15"]) == 0, "one code needs no decision"
    (tmp_path / "out.npy").unlink()
    assert main(["decode", coded, out, "--max-indices=15", "--max-indices-per-byte=1"]) == 0
    np.save(tmp_path / "in.npy", np.arange(16, dtype=np.uint8).reshape(4, 4))
    assert main(["encode", str(tmp_path / "in.npy"), coded]) == 0
    assert main(["decode", coded, out, "--max-decisions=63"]) == 2
    assert "64 decisions, more than --max-decisions=63" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["png", "PNG", "jpg", "webp", "bmp", "tiff", "ppm"])
def test_one_image_to_a_file_of_its_ending(run, tmp_path, ending):
    folder, images = run
    coded, out = tmp_path / "one.fvq", tmp_path / f"one.{ending}"
    assert main(["encode", str(images / "03.png"), str(coded), f"--run={folder}"]) == 0
    for _ in range(2):
        assert main(["decode", str(coded), str(out), f"--run={folder}"]) == 0
    with torch.no_grad():
        expected = load_model(folder)[0].decode(coding.decode(coding.load(coded))).clamp(0, 1)[0]
    with Image.open(out) as image:
        assert image.format == {"jpg": "JPEG", "tiff": "TIFF"}.get(ending, ending.upper())
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if ending != "jpg":
        assert torch.equal(pixels, (expected * 255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("one.png", "out: one.png would hold one image, but two.fvq holds 2: give a new folder"),
        ("rec.txt", "out must end in .bmp, .jpeg, .jpg, .png, .ppm, .tif, .tiff, .webp or be a new folder for images"),
        ("rec.fvq", "got rec.fvq; the indices alone go to an .npy file"),
    ],
)
def test_outputs_that_cannot_be(run, tmp_path, monkeypatch, capsys, out, message):
    monkeypatch.chdir(tmp_path)
    np.save("two.npy", np.zeros((2, 4, 4), np.int64))
    assert main(["encode", "two.npy", "two.fvq", f"--run={run[0]}"]) == 0
    assert main(["decode", "two.fvq", out, f"--run={run[0]}"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.fvq", "two.npy"]


@pytest.mark.parametrize("out", ["out", "out/", "out.v2/"])
def test_a_slash_makes_a_folder_of_any_name(run, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    np.save("two.npy", np.zeros((2, 4, 4), np.int64))
    assert main(["encode", "two.npy", "two.fvq", f"--run={run[0]}"]) == 0
    assert main(["decode", "two.fvq", out, f"--run={run[0]}"]) == 0
    assert sorted(path.name for path in (tmp_path / out).iterdir()) == ["000000.png", "000001.png"]
