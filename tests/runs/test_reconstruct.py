"""`fastvq reconstruct`: what it takes, and the pictures that it writes."""

from __future__ import annotations

import pytest

from fastvq.cli.main import main
from fastvq.runs import plots

from ..tiny_runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of a few steps on a folder of images, and the folder."""
    return tiny_run(tmp_path_factory.mktemp("reconstruct"), count=30, grayscale=False)


@pytest.fixture
def drawn(monkeypatch):
    """Return the list to which the names and the title of each drawn picture are added."""
    shown = []
    monkeypatch.setattr(
        plots, "save_reconstructions", lambda path, *images, title, **_: shown.append((images[2], title))
    )
    return shown


SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".jpg": b"\xff\xd8", ".webp": b"RIFF"}


@pytest.mark.parametrize("ending", SIGNATURES)
def test_the_ending_decides_the_format(run, tmp_path, ending):
    out = tmp_path / f"rec{ending}"
    assert main(["reconstruct", str(run[0]), str(run[1] / "00.png"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(SIGNATURES[ending])


@pytest.mark.parametrize("out", ["rec.xyz", "rec.npy", "rec", "rec/"])
def test_another_ending_is_refused_before_anything_else(tmp_path, capsys, out):
    assert main(["reconstruct", str(tmp_path / "no run"), "--out", str(tmp_path / out)]) == 2
    assert "--out must end in .png, .pdf, " in capsys.readouterr().err


def test_files_folders_and_held_out_images(run, drawn, capsys):
    folder, images = run
    arguments = ["reconstruct", str(folder), "--out=rec.png"]
    assert main([*arguments, str(images / "07.png")]) == 0
    assert main([*arguments, str(images / "07.png"), str(images)]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if " dB" in line]) == 1 + 30
    assert main([*arguments, "--held-out"]) == 0
    assert main(arguments) == 0
    assert [len(names) for names, _ in drawn] == [1, 30, len(drawn[2][0]), len(drawn[2][0])]
    assert drawn[2] == drawn[3]
    assert [title.partition(",")[0] for _, title in drawn[:2]] == ["1 image", "30 images"]
    assert main([*arguments, "--held-out", "a.png"]) == 2
    assert "--held-out: takes no other files, got a.png" in capsys.readouterr().err


def test_of_many_images_some_are_drawn_and_all_are_measured(run, drawn, capsys, monkeypatch):
    monkeypatch.setattr("fastvq.runs.reconstruct._SHOWN", 4)
    assert main(["reconstruct", str(run[0]), str(run[1]), "--out=rec.png"]) == 0
    assert capsys.readouterr().out.count(" dB") == 30
    ((names, title),) = drawn
    assert names == ["03.png", "11.png", "18.png", "26.png"]
    assert title.startswith("4 of 30 images")


def test_unreadable_files_are_listed_or_skipped(run, tmp_path, drawn, capsys):
    (tmp_path / "a.png").write_bytes((run[1] / "01.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"text")
    arguments = ["reconstruct", str(run[0]), str(tmp_path), "--out=rec.png"]
    assert main(arguments) == 2
    assert "b.png is not a readable image: unknown format (--skip-unreadable leaves" in capsys.readouterr().err
    assert main([*arguments, "--skip-unreadable"]) == 0
    assert drawn[0][0] == ["a.png"]
    assert main(["reconstruct", str(run[0]), "absent", "gone", "--out=rec.png"]) == 2
    assert "absent, gone do not exist" in capsys.readouterr().err
