"""A run's prior: exact resume, states that are whole, settings, and the commands."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvq.cli.main import main
from fastvq.errors import CheckpointError, ConfigError
from fastvq.modalities import ImageConfig
from fastvq.models.priors import PRIORS
from fastvq.runs.load import load_model, load_prior
from fastvq.runs.train_prior import delete_prior, train_prior
from fastvq.training import Trainer, load_examples
from fastvq.training.checkpoint import load_latest, seal
from fastvq.training.config import PriorConfig
from fastvq.training.metrics import read_metrics
from fastvq.training.prior import PriorTrainer, bits_per_index

from ..tiny_runs import tiny_run

TINY = PriorConfig(
    steps=6, batch_size=8, dim=16, depth=1, heads=2, warmup_steps=2, log_every=2, evaluate_every=3, checkpoint_every=3
)


@pytest.fixture(autouse=True)
def _no_samples_for_the_page(monkeypatch):
    """Leave out the pictures that `fastvq prior` draws at its end, which tests/runs/test_page.py looks at."""
    monkeypatch.setattr("fastvq.runs.sample.picture_prior_samples", lambda *_, **__: [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run of a few steps on a folder of images."""
    return tiny_run(tmp_path_factory.mktemp("prior"), count=40, grayscale=True)[0]


@pytest.fixture
def run(trained, tmp_path):
    """Return a copy of the run that a test may change."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def weights(run):
    return load_prior(run)[0].state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("kind", PRIORS)
def test_interrupted_and_resumed_equals_uninterrupted(run, monkeypatch, kind, tmp_path):
    if PRIORS[kind].in_scales:
        (tmp_path / "grids").mkdir()
        run, _ = tiny_run(tmp_path / "grids", count=40, grayscale=True, grids=2)
    elif PRIORS[kind].in_stages:
        (tmp_path / "stages").mkdir()
        stages = {"num_quantizers": 2}
        run, _ = tiny_run(tmp_path / "stages", count=40, grayscale=True, bottleneck="rvq", bottleneck_options=stages)
    config = dataclasses.replace(TINY, kind=kind)
    assert train_prior(run, config, progress=False) is not None
    whole = weights(run)
    delete_prior(run)
    assert not list((run / "prior").glob("indices*"))
    assert not list((run / "prior" / "checkpoints").iterdir())
    original = PriorTrainer.train_step

    def step_and_interrupt(trainer):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        original(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(PriorTrainer, "train_step", step_and_interrupt)
        assert train_prior(run, config, progress=False) is None
    torch.manual_seed(99)
    with pytest.warns(RuntimeWarning, match=f"{run / 'prior'} is unfinished, 3 of 6 steps: fastvq prior {run} --res"):
        assert not equal(weights(run), whole)
    again = train_prior(run, resume=True, progress=False)
    assert equal(again.prior.state_dict(), whole)
    assert equal(weights(run), whole)
    assert 0 < again.bits_per_index < 10
    assert again.bits_per_index == bits_per_index(again.prior, again.data.test, again.data.test_labels)


def test_states_that_cannot_be_used(run):
    with pytest.raises(CheckpointError, match="has no prior yet: fastvq prior"):
        load_prior(run)
    train_prior(run, TINY, progress=False)
    state = max((run / "prior").glob("checkpoints/*")) / "state.safetensors"
    whole = state.read_bytes()
    for spoilt in (whole[:100], whole[:-10], b"", b"\xff" * 200):
        state.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_prior(run)
    state.write_bytes(whole)
    load_prior(run)
    other = next((run / "checkpoints").glob("step-*"))
    config = ImageConfig.from_json(json.loads((other / "checkpoint.json").read_text())["config"])
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    Trainer(dataclasses.replace(config, seed=1), load_examples(config), run).fit(progress=False)
    with pytest.raises(CheckpointError, match="the prior of another model"):
        load_prior(run)
    with pytest.raises(CheckpointError, match="the prior of another model: train it again with --overwrite"):
        train_prior(run, resume=True, progress=False)
    assert train_prior(run, TINY, overwrite=True, progress=False) is not None
    load_prior(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "heads: must divide dim=16, got 3"),
        ({"batch_size": 1000}, "batch_size must be at most [0-9]+, the number of samples to learn from, got 1000"),
        ({"device": "warp"}, "device: 'warp' cannot be used here: "),
    ],
)
def test_settings_that_cannot_be(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        train_prior(run, dataclasses.replace(TINY, **settings), progress=False)


def test_a_prior_starts_from_the_codebook(run, monkeypatch):
    trainers = []
    monkeypatch.setattr(PriorTrainer, "fit", lambda trainer, **_: trainers.append(trainer))
    train_prior(run, TINY, progress=False)
    vectors = load_model(run)[0].bottleneck.codebook
    torch.manual_seed(TINY.seed)
    expected = PRIORS[TINY.kind](24, (4, 4), vectors=vectors, **TINY.model_settings())
    assert trainers[0].model.head.weight.abs().max() > 0
    assert equal(trainers[0].model.state_dict(), expected.state_dict())


def options(config):
    """Return the settings of a prior without captions as options of the command line."""
    given = {name: value for name, value in config.to_json().items() if not name.startswith("text")}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]


def test_commands(run, tmp_path, capsys):
    assert main(["sample", str(run), f"--out={tmp_path}/s.png"]) == 2
    assert "has no prior yet" in capsys.readouterr().err
    assert main(["prior", str(run), *options(dataclasses.replace(TINY, steps=3))]) == 0
    said = capsys.readouterr().out
    assert "bits per index" in said
    assert f"page: {run / 'index.html'}" in said
    with Image.open(run / "prior" / "curves.png") as image:
        assert min(image.size) > 100
    learned = load_latest(run / "prior", PriorConfig)
    assert learned.config == dataclasses.replace(TINY, steps=3)
    assert main(["prior", str(run), "--resume", "--steps=4", "--kind=lstm", "--dim=16", "--dropout=0.2"]) == 2
    changed = "kind from 'transformer' to 'lstm', dropout from 0.1 to 0.2"
    assert f"a resumed run keeps its settings, but these changed: {changed}\n" in capsys.readouterr().err
    assert main(["prior", str(run), "--resume", *options(dataclasses.replace(TINY, steps=3))]) == 0
    for name, more in (("s", []), ("c", ["--complete", "--temperature=0.8", "--top-k=5", "--seed=3"])):
        assert main(["sample", str(run), f"--out={tmp_path}/{name}.png", *more]) == 0
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100
    assert main(["sample", str(run), f"--out={tmp_path}/x.png", "--top-p=0"]) == 2
    assert "--top-p: must lie in (0, 1], got 0.0" in capsys.readouterr().err
    assert main(["sample", str(run), f"--out={tmp_path}/x.png", "--guidance=2"]) == 2
    assert "guidance: needs labels or a text, got 2.0" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device=warp"], "device: 'warp' cannot be used here: "),
        (["--heads=3", "--dim=16"], "heads: must divide dim=16, got 3"),
        (["--batch-size=1000"], "--batch-size must be at most "),
        (["--dropout=1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (
            ["--compare=1", "--steps=3", "--resume"],
            "--compare trains each kind from the start for equal time: omit --steps, --resume",
        ),
        (["--compare=nan"], "--compare must be positive and finite, got nan"),
        (
            ["--compare=1", "--device=meta"],
            "--device: 'meta' cannot be used here",
        ),
    ],
)
def test_a_prior_stays_where_its_successor_cannot_be(run, given, message, capsys):
    train_prior(run, TINY, progress=False)
    kept, records = weights(run), (run / "prior" / "metrics.jsonl").read_bytes()
    overwrite = [] if "--compare" in given[0] else ["--overwrite"]
    assert main(["prior", str(run), *given, *overwrite]) == 2
    assert message in capsys.readouterr().err
    assert equal(weights(run), kept)
    assert (run / "prior" / "metrics.jsonl").read_bytes() == records


def test_states_of_other_versions(run):
    train_prior(run, TINY, progress=False)
    kept = weights(run)
    path = sorted((run / "prior" / "checkpoints").glob("*/checkpoint.json"))[-1]
    description = json.loads(path.read_text())
    del description["sha256"], description["config"]["device"]
    path.write_bytes(seal(description))
    assert equal(weights(run), kept)
    path.write_bytes(seal(description | {"config": description["config"] | {"mood": 1}}))
    with pytest.raises(CheckpointError, match=r"step-\d+: settings of another version of fastvq: mood") as said:
        load_prior(run)
    assert "delete" not in str(said.value)
    for built_from in ({}, {"kind": "transformer"}, {"kind": "oracle", "settings": {}}, {"kind": [], "settings": []},
                       {"kind": "lstm", "settings": description["built_from"]["settings"]},
                       {"kind": "transformer", "settings": {"codebook_size": -1}}):  # fmt: skip
        path.write_bytes(seal(description | {"built_from": built_from}))
        with pytest.raises(CheckpointError, match=rf"{path.parent}"):
            load_prior(run)


def state_of(run):
    """Return the content of all files of a run's prior."""
    return {path: path.read_bytes() for path in (run / "prior").rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_prior_is_replaced_only_on_request_and_when_its_successor_is_finished(run, monkeypatch, capsys):
    train_prior(run, TINY, progress=False)
    kept, before = weights(run), state_of(run)
    for command in (["prior", str(run)], ["prior", str(run), "--kind=lstm"]):
        assert main(command) == 2
        assert f"{run} has a prior already" in (said := capsys.readouterr().err)
        assert "--resume" in said
        assert "--overwrite" in said
    assert state_of(run) == before
    original = PriorTrainer.train_step

    def step_and_interrupt(trainer):
        original(trainer)
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    other = dataclasses.replace(TINY, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(PriorTrainer, "train_step", step_and_interrupt)
        assert main(["prior", str(run), "--overwrite", *options(other)]) == 130
    assert equal(weights(run), kept)
    assert (run / "prior" / "metrics.jsonl").read_bytes() == before[run / "prior" / "metrics.jsonl"]
    assert main(["prior", str(run), "--resume"]) == 0
    replaced, records = weights(run), (run / "prior" / "metrics.jsonl").read_bytes()
    assert not equal(replaced, kept)
    assert not (run / "prior" / "successor").exists()
    delete_prior(run)
    train_prior(run, other, progress=False)
    assert equal(weights(run), replaced)
    assert (run / "prior" / "metrics.jsonl").read_bytes() == records


@pytest.mark.parametrize("moves", range(4))
def test_a_move_that_is_cut_short_is_repeated(run, monkeypatch, moves):
    """Whatever has been moved, some finished prior can be used, and the next training completes the move."""
    train_prior(run, TINY, progress=False)
    first = weights(run)
    original = [os.rename, os.replace]
    done = 0

    def limited(function):
        def call(source, target):
            nonlocal done
            if Path(source).parent.name in ("successor", "prior") and ".fastvq" not in Path(source).name:
                if done == moves:
                    raise KeyboardInterrupt
                done += 1
            return function(source, target)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", limited(original[0]))
        patch.setattr(os, "replace", limited(original[1]))
        with pytest.raises(KeyboardInterrupt):
            train_prior(run, dataclasses.replace(TINY, seed=1), overwrite=True, progress=False)
    between = weights(run)
    trained = train_prior(run, resume=True, progress=False)
    assert trained is not None
    second = weights(run)
    assert not equal(first, second)
    assert equal(between, first) or equal(between, second)
    assert not (run / "prior" / "successor").exists()
    assert [record["step"] for record in read_metrics(run / "prior" / "metrics.jsonl")] == [2, 3, 4, 6, 6]


def test_a_prior_goes_on_to_more_steps(run, capsys):
    train_prior(run, TINY, progress=False)
    assert main(["prior", str(run), "--resume", "--steps=6"]) == 0
    assert main(["prior", str(run), "--resume", "--steps=5"]) == 2
    assert "--steps must be more than the 6 that the run has done, got 5" in capsys.readouterr().err
    assert main(["prior", str(run), "--resume", "--steps=9"]) == 0
    latest = load_latest(run / "prior", PriorConfig)
    assert (latest.step, latest.config) == (9, dataclasses.replace(TINY, steps=9))


def test_a_prior_resumes_on_the_data_it_began_with(run, trained, tmp_path, monkeypatch, capsys):
    """Wherever they are now."""
    data = Path(load_model(run)[1].data)
    train_prior(run, TINY, progress=False)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert main(["prior", str(run), "--resume", "--steps=7", f"--data={moved}"]) == 0
    next(moved.glob("*.png")).unlink()
    assert main(["prior", str(run), "--resume", "--steps=8", f"--data={moved}"]) == 2
    said = capsys.readouterr().err
    assert f"the data differ from those that {run} was trained on: {moved} has the fingerprint " in said
    assert f"{data} had {load_examples(load_model(run)[1]).fingerprint()}" in said
    assert main(["prior", str(run), "--resume", f"--data={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_prior_comes_back_to_the_cpu(run, monkeypatch):
    monkeypatch.setattr(PriorTrainer, "fit", lambda trainer, **_: bool(trainer.model.to("meta")))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        train_prior(run, TINY, progress=False)
