"""`fastvq encode`, and what `fastvq decode` makes of its files: images and arrays, by the command line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq import coding
from fastvq.cli.main import main
from fastvq.runs.load import load_model
from fastvq.runs.train_prior import train_prior
from fastvq.training import PriorConfig
from fastvq.training.build import load_examples

from ..tiny_runs import tiny_run

SIZE = 16
PRIOR = PriorConfig(steps=6, batch_size=8, dim=16, depth=1, heads=2, warmup_steps=2, evaluate_every=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of a few steps on a folder of images, and the folder."""
    return tiny_run(tmp_path_factory.mktemp("encode"), count=30, grayscale=False)


def test_a_folder_to_a_file_and_back(run, tmp_path, capsys):
    folder, images = run
    coded, out = tmp_path / "images.fvq", tmp_path / "out"
    assert main(["encode", str(images), str(coded), f"--run={folder}"]) == 0
    printed = capsys.readouterr().out
    assert f"30 images of {3 * SIZE * SIZE} bytes, 16 indices each" in printed
    assert f"{coded.stat().st_size} bytes" in printed
    assert main(["decode", str(coded), str(out), f"--run={folder}"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{n:06d}.png" for n in range(30)]
    model, _ = load_model(folder)
    indices = coding.decode(coded.read_bytes())
    with torch.no_grad():
        expected = (model.decode(indices).clamp(0, 1) * 255).round().to(torch.uint8)
    with Image.open(out / "000007.png") as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), expected[7])
    assert main(["decode", str(coded), str(tmp_path / "indices.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "indices.npy"), indices.numpy())


def test_held_out_images_and_one_image(run, tmp_path, capsys):
    folder, images = run
    held_out = load_examples(load_model(folder)[1]).test
    assert main(["encode", "--held-out", str(tmp_path / "a.fvq"), f"--run={folder}", "--model=static"]) == 0
    assert coding.read_header((tmp_path / "a.fvq").read_bytes()).shape == (len(held_out), 4, 4)
    assert main(["encode", str(images / "03.png"), str(tmp_path / "b.fvq"), f"--run={folder}"]) == 0
    assert coding.read_header((tmp_path / "b.fvq").read_bytes()).shape == (1, 4, 4)
    assert "1 image of 768 bytes, 16 indices each" in capsys.readouterr().out


def test_arrays(tmp_path, capsys):
    indices = np.random.default_rng(0).integers(0, 100, (5, 30, 4)).astype(np.int32)
    np.save(tmp_path / "in.npy", indices)
    assert main(["encode", str(tmp_path / "in.npy"), str(tmp_path / "c.fvq"), "--codebook-size=128"]) == 0
    assert coding.read_header((tmp_path / "c.fvq").read_bytes()).codebook_size == 128
    assert "(log2 K: 7.00)" in capsys.readouterr().out
    assert main(["decode", str(tmp_path / "c.fvq"), str(tmp_path / "out.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), indices)


def test_an_array_of_a_runs_indices_decodes_to_images(run, tmp_path):
    folder, _ = run
    np.save(tmp_path / "in.npy", np.arange(32).reshape(2, 4, 4) % 5)
    coded = tmp_path / "c.fvq"
    assert main(["encode", str(tmp_path / "in.npy"), str(coded), f"--run={folder}"]) == 0
    assert coding.read_header(coded.read_bytes()).codebook_size == 24
    assert main(["decode", str(coded), str(tmp_path / "out"), f"--run={folder}"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["encode", "absent", "out.fvq", "--run={run}"], "absent does not exist"),
        (["encode", "{images}", "out.fvq"], "--run: needed to encode files"),
        (["encode", "{images}", "out.fvq", "--run=absent"], "absent"),
        (
            ["encode", "{images}", "out.fvq", "--run={run}", "--model=zip"],
            "--model: must be one of static, adaptive, prior",
        ),
        (["encode", "absent.npy", "out.fvq"], "absent.npy doesn't exist"),
    ],
)
def test_invalid_requests_are_named(run, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    folder, images = run
    assert main([part.format(run=folder, images=images) for part in command]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_codebook_that_is_not_the_runs(run, tmp_path, capsys):
    np.save(tmp_path / "indices.npy", np.zeros((2, 4, 4), np.int64))
    given = [
        str(tmp_path / "indices.npy"),
        str(tmp_path / "indices.fvq"),
        "--run",
        str(run[0]),
        "--codebook-size",
        "77",
    ]
    assert main(["encode", *given]) == 2
    assert "--codebook-size" in capsys.readouterr().err


def test_indices_that_do_not_survive_coding_are_not_written(run, tmp_path, monkeypatch, capsys):
    folder, images = run
    coded = tmp_path / "images.fvq"
    coded.write_bytes(b"as it was")
    monkeypatch.setattr(coding, "decode", lambda *_, **__: torch.zeros(1))
    assert main(["encode", str(images), str(coded), f"--run={folder}"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert coded.read_bytes() == b"as it was"


def test_held_out_is_an_option_and_no_name(run, tmp_path, monkeypatch, capsys):
    folder, images = run
    monkeypatch.chdir(tmp_path)
    given = ["a.fvq", f"--run={folder}"]
    assert main(["encode", "held-out", *given]) == 2
    assert "held-out does not exist: the run's held-out examples are --held-out" in capsys.readouterr().err
    (tmp_path / "held-out").symlink_to(images, target_is_directory=True)
    for name in ("held-out", "./held-out"):
        assert main(["encode", name, *given]) == 0
        assert "30 images" in capsys.readouterr().out
    assert main(["encode", "held-out", "--held-out", *given]) == 2
    assert "--held-out: takes no other files, got held-out" in capsys.readouterr().err
    assert main(["encode", *given]) == 2
    assert "IN: give files, folders, an .npy file of indices, or --held-out" in capsys.readouterr().err


def test_several_images_and_folders(run, tmp_path, capsys):
    folder, images = run
    (images / "folder.png").mkdir()
    sources = [str(images / "03.png"), str(images), str(images / "03.png")]
    try:
        assert main(["encode", *sources[:1], f"--run={folder}", *sources[1:], str(tmp_path / "a.fvq")]) == 0
    finally:
        (images / "folder.png").rmdir()
    assert "30 images" in capsys.readouterr().out  # the file that is named twice is there once
    indices = coding.decode(coding.load(tmp_path / "a.fvq"))
    assert main(["encode", str(images / "03.png"), str(tmp_path / "b.fvq"), f"--run={folder}"]) == 0
    assert torch.equal(coding.decode(coding.load(tmp_path / "b.fvq"))[0], indices[0])


@pytest.mark.parametrize("ending", ["png", "npy", "txt", ""])
def test_the_ending_of_a_coded_file(run, tmp_path, capsys, ending):
    assert main(["encode", "--held-out", f"{tmp_path}/x.{ending}".rstrip("."), f"--run={run[0]}"]) == 2
    assert "out must end in .fvq, got " in capsys.readouterr().err


def test_unreadable_files_are_listed_or_skipped(run, tmp_path, capsys):
    folder, images = run
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for n in range(4):
        (mixed / f"{n}.png").write_bytes((images / f"{n:02d}.png").read_bytes())
    (mixed / "5.png").write_bytes(b"")
    (mixed / "6.jpg").write_text("text")
    (mixed / "7.png").write_bytes((images / "01.png").read_bytes()[:90])
    arguments = ["encode", str(mixed), str(tmp_path / "a.fvq"), f"--run={folder}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "3 of 7 files cannot be read as images (--skip-unreadable leaves them out):" in error
    assert [
        name for name in ("5.png", "6.jpg", "7.png") if f"\n  {mixed / name} is not a readable image: " not in error
    ] == []
    assert main([*arguments, "--skip-unreadable"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("4 images")
    assert "fastvq: warning: skipped 3 files of 7:" in output.err
    assert "6.jpg" in output.err
    for n in range(4):
        (mixed / f"{n}.png").unlink()
    assert main([*arguments, "--skip-unreadable"]) == 2
    assert "none of 3 files can be read as an image" in capsys.readouterr().err


def test_files_that_are_no_arrays(tmp_path, capsys):
    source, coded = tmp_path / "in.npy", str(tmp_path / "c.fvq")
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999,), }"
    for data in (b"", (tmp_path / "several.npz").read_bytes(), header.ljust(127) + b"\n"):
        source.write_bytes(data)
        assert main(["encode", str(source), coded]) == 2
        assert "in.npy cannot be read as .npy" in capsys.readouterr().err
    np.save(source, np.array([2**64 - 1, 3], np.uint64))
    assert main(["encode", str(source), coded]) == 2
    assert "indices must lie in [-1, 2^24), got 18446744073709551615" in capsys.readouterr().err
    np.save(source, np.full((2, 3), -1))
    assert main(["encode", str(source), coded]) == 0
    (tmp_path / "folder.fvq").mkdir()
    assert main(["encode", str(source), str(tmp_path / "folder.fvq")]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_arrays_that_are_no_indices(tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.zeros(3))
    assert main(["encode", str(tmp_path / "in.npy"), str(tmp_path / "c.fvq")]) == 2
    assert "must hold integers, got float64" in capsys.readouterr().err
    np.save(tmp_path / "in.npy", np.array([5]))
    assert main(["encode", str(tmp_path / "in.npy"), str(tmp_path / "c.fvq"), "--codebook-size=5"]) == 2
    assert "indices: must lie in [-1, 5), got 5 to 5" in capsys.readouterr().err


def test_files_coded_with_the_prior(tmp_path, capsys):
    run, _ = tiny_run(tmp_path, count=40, grayscale=True)
    train_prior(run, PRIOR, progress=False)
    coded, again = tmp_path / "held_out.fvq", tmp_path / "again.npy"
    assert main(["encode", "--held-out", str(coded), f"--run={run}", "--model=prior"]) == 0
    assert main(["decode", str(coded), str(again), f"--run={run}"]) == 0
    indices = train_prior(run, resume=True, progress=False).data.test
    assert np.array_equal(np.load(again), indices.numpy())
    assert main(["encode", str(again), str(tmp_path / "array.fvq"), f"--run={run}", "--model=prior"]) == 0
    assert main(["decode", str(coded), str(tmp_path / "out"), f"--run={run}"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(indices)
    capsys.readouterr()
    assert main(["decode", str(coded), str(tmp_path / "no.npy")]) == 2
    assert "--run: needed, as the file was coded with a run's prior" in capsys.readouterr().err
    train_prior(run, dataclasses.replace(PRIOR, seed=5), overwrite=True, progress=False)
    assert main(["decode", str(coded), str(tmp_path / "no.npy"), f"--run={run}"]) == 2
    assert "coded with another prior" in capsys.readouterr().err
    assert not (tmp_path / "no.npy").exists()
