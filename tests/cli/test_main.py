"""Common behavior of all commands: errors in one line, refusals, missing packages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvq.cli.main import _with_options, main

from .tiny import PATIENCE_S, TINY


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["train", "--out", ""], ["train", "--out="], ["demo", "--out", ""], ["evaluate", "r", "--out="]),
        *(
            ["bench", "--out", ""],
            ["sample", "r", "--out", ""],
            ["encode", "a.png", "", "--run=r"],
            ["decode", "", "x"],
        ),
    ],
    ids=" ".join,
)
def test_empty_arguments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """An empty path is the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert "must not be empty" in error
    assert ("--out" in error) == any("--out" in argument for argument in arguments)
    assert not list(tmp_path.iterdir())


def test_names_of_options_may_have_underscores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values keep theirs, such as the name of a file."""
    missing = tmp_path / "a_b"
    assert main(["sample", str(missing), "--top_k=4", "--out", str(tmp_path / "x_y.png")]) == 2
    assert f"{missing} holds no checkpoint" in capsys.readouterr().err


def test_nobody_reads_the_output_any_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(options: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fastvq.cli.encode.run", broken)
    assert main(["encode", "a.npy", "a.fvq"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")]
)
def test_used_up_memory_is_an_error_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr("fastvq.cli.encode.run", fail)
    assert main(["encode", "a.npy", "a.fvq"]) == 2
    assert re.fullmatch(r"fastvq: out of memory: .*\n", capsys.readouterr().err)


def test_endings_are_read_in_any_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, coded, back = tmp_path / "I.NPY", tmp_path / "i.FVQ", tmp_path / "BACK.NPY"
    with source.open("wb") as file:
        np.save(file, np.arange(6).reshape(2, 3))
    assert main(["encode", str(source), str(coded)]) == 0
    assert main(["decode", str(coded), str(back)]) == 0
    with back.open("rb") as file:
        assert np.array_equal(np.load(file), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "a.png", "a.fvq", "--run=r", "--data=d"], "--data: only says where held-out examples are"),
        (["reconstruct", "r", "a.png", "--out=x.png", "--data=d"], "--data: only says where held-out examples are"),
        (["encode", "./held-out", "a.fvq", "--run=r"], "the run's held-out examples are --held-out"),
        (["reconstruct", "r", "held-out/", "--out=x.png"], "the run's held-out examples are --held-out"),
        (["prior", "r", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["demo", "--out=r", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_what_has_no_effect_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", "2"), ("RANK", "1")])
@pytest.mark.parametrize("command", ["train", "prior", "encode", "decode", "sample", "reconstruct", "demo", "bench"])
def test_one_of_several_ranks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, variable: str,
    value: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    arguments = {"train": ["--out=run"], "encode": ["a", "b"], "decode": ["a", "b"], "prior": ["run"],
                 "sample": ["run", "--out=x.png"], "reconstruct": ["run", "--out=x.png"]}  # fmt: skip
    assert main([command, *arguments.get(command, [])]) == 2
    assert f"{variable}={value} says that this is one of several" in capsys.readouterr().err
    monkeypatch.setenv(variable, "1" if variable == "WORLD_SIZE" else "0")
    assert main(["decode", str(tmp_path / "absent"), str(tmp_path / "out.npy")]) == 2
    assert "one of several" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out=RUN", "--data=nowhere"], "nowhere doesn't exist"),
        (["train", "--out=RUN", "--codebook-size=0"], "--codebook-size must be at least 1, got 0"),
        (["train", "--out=RUN", "--steps=-5"], "--steps must be at least 1, got -5"),
        (["train", "--out=RUN", "--resume"], "holds no checkpoint"),
        (["train", "--out=RUN", "--device=warp"], "--device: 'warp'"),
        (["reconstruct", "RUN", "--out=x.png"], "holds no checkpoint"),
        (["demo", "--out=RUN", "--steps=0"], "--steps must be at least 1"),
        (["prior", "RUN", "--label-dropout=1"], "--label-dropout must be at least 0 and below 1, got 1.0"),
        (["prior", "RUN"], "holds no checkpoint"),
        (["sample", "RUN", "--out=x.png"], "holds no checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = tmp_path / "run"
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvq: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "fastvq: the following arguments are required: COMMAND (see fastvq --help)"),
        (["train"], "fastvq train: the following arguments are required: --out (see fastvq train --help)"),
        (["decode", "a"], "fastvq decode: the following arguments are required: OUT (see fastvq decode --help)"),
        (["info", "--wrong"], "fastvq: unrecognized arguments: --wrong (see fastvq --help)"),
        (
            ["train", "--out=x", "--steps=y"],
            "fastvq train: argument --steps: invalid int value: 'y' (see fastvq train --help)",
        ),
    ],
)
def test_mistyped_commands_are_one_line_that_names_the_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("batch_size must be at most 2", "--batch-size must be at most 2"),
        ("steps: must be at least 1, as batch_size", "--steps: must be at least 1, as --batch-size"),
        ("a run of 3 steps", "a run of 3 steps"),
        (
            "batch_size/steps.png is no image, batch_size.png neither",
            "batch_size/steps.png is no image, batch_size.png neither",
        ),
    ],
)
def test_errors_name_options_as_they_are_typed(message: str, shown: str) -> None:
    assert _with_options(message, {"steps": "--steps", "batch_size": "--batch-size"}) == shown


def test_a_missing_extra_is_named(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    run = tmp_path / "run"
    assert main(["train", f"--out={run}", f"--data={images}", "--image-size=16", *TINY, "--steps=1"]) == 2
    assert 'safetensors is missing: pip install "fastvq-torch[train]"' in capsys.readouterr().err


def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    extras = ("safetensors", "tqdm", "matplotlib", "PIL", "tensorboard")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({extras!r}))
import fastvq, fastvq.models, fastvq.data, fastvq.training, fastvq.runs.plots, fastvq.cli.main
fastvq.data.load_fashion_mnist()
raise SystemExit(fastvq.cli.main.main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
