"""`fastvq encode` and `decode`: images and arrays through files, by the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq import coding
from fastvq.cli.main import main
from fastvq.runs.load import load_model
from fastvq.training.build import load_images

from ..tiny_runs import tiny_run

SIZE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on a folder of images, and the folder."""
    return tiny_run(tmp_path_factory.mktemp("compress"), count=30, grayscale=False)


def test_a_folder_to_a_file_and_back(run, tmp_path, capsys):
    folder, images = run
    coded, out = tmp_path / "images.fvq", tmp_path / "out"
    assert main(["encode", str(images), str(coded), f"--run={folder}"]) == 0
    printed = capsys.readouterr().out
    assert f"30 images of {3 * SIZE * SIZE} bytes, 16 codes each" in printed
    assert f"{coded.stat().st_size} bytes" in printed
    assert main(["decode", str(coded), str(out), f"--run={folder}"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{n:06d}.png" for n in range(30)]
    model, _ = load_model(folder)
    codes = coding.decode(coded.read_bytes())
    with torch.no_grad():
        expected = (model.decode(codes).clamp(0, 1) * 255).round().to(torch.uint8)
    with Image.open(out / "000007.png") as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), expected[7])
    assert main(["decode", str(coded), str(tmp_path / "codes.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "codes.npy"), codes.numpy())


def test_held_out_images_and_one_image(run, tmp_path, capsys):
    folder, images = run
    held_out = load_images(load_model(folder)[1]).test
    assert main(["encode", "held-out", str(tmp_path / "a.fvq"), f"--run={folder}", "--model=static"]) == 0
    assert coding.read_header((tmp_path / "a.fvq").read_bytes()).shape == (len(held_out), 4, 4)
    assert main(["encode", str(images / "03.png"), str(tmp_path / "b.fvq"), f"--run={folder}"]) == 0
    assert coding.read_header((tmp_path / "b.fvq").read_bytes()).shape == (1, 4, 4)
    assert "1 images" in capsys.readouterr().out


def test_arrays(tmp_path, capsys):
    codes = np.random.default_rng(0).integers(0, 100, (5, 30, 4)).astype(np.int32)
    np.save(tmp_path / "in.npy", codes)
    assert main(["encode", str(tmp_path / "in.npy"), str(tmp_path / "c.fvq"), "--codebook-size=128"]) == 0
    assert coding.read_header((tmp_path / "c.fvq").read_bytes()).codebook_size == 128
    assert "(7.00 without a model of them)" in capsys.readouterr().out
    assert main(["decode", str(tmp_path / "c.fvq"), str(tmp_path / "out.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), codes)


def test_an_array_of_a_runs_codes_decodes_to_images(run, tmp_path):
    folder, _ = run
    np.save(tmp_path / "in.npy", np.arange(32).reshape(2, 4, 4) % 5)
    coded = tmp_path / "c.fvq"
    assert main(["encode", str(tmp_path / "in.npy"), str(coded), f"--run={folder}"]) == 0
    assert coding.read_header(coded.read_bytes()).codebook_size == 24
    assert main(["decode", str(coded), str(tmp_path / "out"), f"--run={folder}"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png"]


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
    assert "codes of another model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images.fvq"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["encode", "absent", "out.fvq", "--run={run}"], "absent doesn't exist"),
        (["encode", "{images}", "out.fvq"], "--run: which run's model encodes the images?"),
        (["encode", "{images}", "out.fvq", "--run=absent"], "absent"),
        (
            ["encode", "{images}", "out.fvq", "--run={run}", "--model=zip"],
            "model: must be one of static, adaptive, prior",
        ),
        (["encode", "absent.npy", "out.fvq"], "absent.npy can't be read as .npy"),
        (["decode", "absent.fvq", "out", "--run={run}"], "absent.fvq"),
        (["decode", "{images}/00.png", "out", "--run={run}"], "not a file of fastvq codes"),
        (["decode", "{images}/00.png", "out"], "--run: which run's model decodes the images?"),
        (["decode", "absent.fvq", "{images}", "--run={run}"], "exists: choose another folder"),
    ],
)
def test_what_cannot_be_is_named(run, tmp_path, monkeypatch, capsys, command, message):
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
    "codes that are missing": (24, (2, 4, 4), -1),
    "one code, without end": (1, (1, 4000, 4000), 0),
    "one code, images without end": (1, (4_000_000, 4, 4), 0),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_codes_that_are_no_images_are_refused_before_they_are_decoded(kind, run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    model, config = load_model(folder)
    assert (config.codebook_size, config.image_size) == (24, SIZE)
    size, shape, value = HOSTILE[kind]
    codes = torch.full((1,), value).expand(shape)
    coded = tmp_path / "hostile.fvq"
    coded.write_bytes(coding.encode(codes, size, model="static", fingerprint=coding.fingerprint(model)))
    monkeypatch.setattr(coding, "decode", lambda *_, **__: pytest.fail("it was decoded"))
    assert main(["decode", str(coded), str(tmp_path / "out"), f"--run={folder}"]) == 2
    assert "an image of " in (said := capsys.readouterr().err)
    assert "is 4 x 4 codes in [0, 24)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.fvq"]


def test_a_limit_of_codes_holds_for_images_too(run, tmp_path, capsys):
    coded = tmp_path / "images.fvq"
    assert main(["encode", "held-out", str(coded), "--run", str(run[0])]) == 0
    assert main(["decode", str(coded), str(tmp_path / "out"), "--run", str(run[0]), "--max-indices", "3"]) == 2
    assert "codes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_codebook_that_is_not_the_runs(run, tmp_path, capsys):
    np.save(tmp_path / "codes.npy", np.zeros((2, 4, 4), np.int64))
    given = [str(tmp_path / "codes.npy"), str(tmp_path / "codes.fvq"), "--run", str(run[0]), "--codebook-size", "77"]
    assert main(["encode", *given]) == 2
    assert "--codebook-size" in capsys.readouterr().err


def test_codes_that_would_not_come_back_are_not_written(run, tmp_path, monkeypatch, capsys):
    folder, images = run
    coded = tmp_path / "images.fvq"
    coded.write_bytes(b"as it was")
    monkeypatch.setattr(coding, "decode", lambda *_, **__: torch.zeros(1))
    assert main(["encode", str(images), str(coded), f"--run={folder}"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert coded.read_bytes() == b"as it was"


def test_a_folder_with_the_name_of_the_held_out_images(run, tmp_path, monkeypatch, capsys):
    folder, images = run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held-out").symlink_to(images, target_is_directory=True)
    assert main(["encode", "./held-out", "a.fvq", f"--run={folder}"]) == 2
    assert "give its full path" in capsys.readouterr().err
    (images / "folder.png").mkdir()
    try:
        assert main(["encode", str(tmp_path / "held-out"), "a.fvq", f"--run={folder}"]) == 0
    finally:
        (images / "folder.png").rmdir()


def test_more_codes_than_allowed(tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.zeros((3, 5), np.uint8))
    coded, out = str(tmp_path / "c.fvq"), str(tmp_path / "out.npy")
    assert main(["encode", str(tmp_path / "in.npy"), coded]) == 0
    assert main(["decode", coded, out, "--max-indices=14"]) == 2
    assert "15 codes, more than max_indices=14" in capsys.readouterr().err
    assert main(["decode", coded, out, "--max-indices=15"]) == 0


def test_files_that_are_no_arrays(tmp_path, capsys):
    source, coded = tmp_path / "in.npy", str(tmp_path / "c.fvq")
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999,), }"
    for data in (b"", (tmp_path / "several.npz").read_bytes(), header.ljust(127) + b"\n"):
        source.write_bytes(data)
        assert main(["encode", str(source), coded]) == 2
        assert "in.npy can't be read as .npy" in capsys.readouterr().err
    np.save(source, np.array([2**64 - 1, 3], np.uint64))
    assert main(["encode", str(source), coded]) == 2
    assert "codes must lie in [-1, 2^24), got 18446744073709551615" in capsys.readouterr().err
    np.save(source, np.full((2, 3), -1))
    assert main(["encode", str(source), coded]) == 0
    assert main(["encode", str(source), str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_arrays_that_are_no_codes(tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.zeros(3))
    assert main(["encode", str(tmp_path / "in.npy"), str(tmp_path / "c.fvq")]) == 2
    assert "must hold integers, got float64" in capsys.readouterr().err
    np.save(tmp_path / "in.npy", np.array([5]))
    assert main(["encode", str(tmp_path / "in.npy"), str(tmp_path / "c.fvq"), "--codebook-size=5"]) == 2
    assert "codes: must lie in [-1, 5), got 5 to 5" in capsys.readouterr().err
