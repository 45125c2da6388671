"""The prior's training: codes written once, exact resume, states that are whole, pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.cli.main import main
from fastvq.errors import CheckpointError, ConfigError
from fastvq.models import VQVAE
from fastvq.models.priors import PRIORS
from fastvq.runs.compare_priors import compare_priors
from fastvq.runs.indices import Codes, tokenize
from fastvq.runs.load import load_model
from fastvq.training import TrainConfig, Trainer, load_images
from fastvq.training.batches import batch_rows
from fastvq.training.checkpoint import load_latest
from fastvq.training.prior import PriorConfig, PriorTrainer, bits_per_index, forget_prior, load_prior, train_prior

from ..cases import generator
from ..tiny_runs import tiny_run

TINY = PriorConfig(
    steps=6, batch_size=8, dim=16, depth=1, heads=2, warmup_steps=2, log_every=2, evaluate_every=3, checkpoint_every=3
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps on a folder of images."""
    return tiny_run(tmp_path_factory.mktemp("prior"), count=40, grayscale=True)[0]


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def weights(run):
    return load_prior(run)[0].state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_codes_are_written_once_and_belong_to_the_model(run, monkeypatch):
    model, config = load_model(run)
    images = load_images(config)
    codes = tokenize(run, model, images, flip=True)
    assert torch.equal(codes.test.long(), model.encode(images.test / 255))
    both = torch.cat([images.train, images.train.flip(-1)]) / 255
    assert torch.equal(codes.train.long(), model.encode(both))
    assert sorted(path.name for path in (run / "prior").iterdir()) == [
        "codes-test.npy",
        "codes-train.npy",
        "codes.json",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE, "encode", lambda *_: pytest.fail("the codes are there already"))
        again = tokenize(run, model, images, flip=True)
    assert torch.equal(again.train, codes.train)
    plain = tokenize(run, model, images, flip=False)
    assert len(plain.train) == len(images.train)
    with torch.no_grad():
        model.bottleneck.codebook[:] = model.bottleneck.codebook.flip(0)
    other = tokenize(run, model, images, flip=False)
    assert torch.equal(other.train, 23 - plain.train)


@pytest.mark.parametrize("spoil", ["description", "truncated", "gone", "another shape"])
def test_damaged_codes_are_written_again(run, spoil):
    model, config = load_model(run)
    images = load_images(config)
    expected = tokenize(run, model, images, flip=False).train.clone()
    train, described = run / "prior" / "codes-train.npy", run / "prior" / "codes.json"
    if spoil == "description":
        described.write_text(described.read_text()[:-5])
    elif spoil == "truncated":
        train.write_bytes(train.read_bytes()[:-4])
    elif spoil == "gone":
        train.unlink()
    else:
        np.save(train, np.zeros((3, 4, 4), np.int32))
    assert torch.equal(tokenize(run, model, images, flip=False).train, expected)
    assert np.array_equal(np.load(train), expected.numpy())


def test_labels_follow_the_mirrored_images(run):
    model, config = load_model(run)
    images = load_images(config)
    labelled = dataclasses.replace(
        images, train_labels=torch.arange(len(images.train)) % 3, test_labels=torch.arange(len(images.test)) % 3
    )
    codes = tokenize(run, model, labelled, flip=True)
    assert codes.classes == 3
    assert torch.equal(codes.train_labels, labelled.train_labels.repeat(2))


@pytest.mark.parametrize("kind", PRIORS)
def test_interrupted_and_resumed_equals_uninterrupted(run, monkeypatch, kind):
    config = dataclasses.replace(TINY, kind=kind)
    assert train_prior(run, config, progress=False) is not None
    whole = weights(run)
    forget_prior(run)
    assert not list((run / "prior").glob("codes*"))
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
    assert not equal(weights(run), whole)
    prior, codes = train_prior(run, resume=True, progress=False)
    assert equal(prior.state_dict(), whole)
    assert equal(weights(run), whole)
    assert 0 < bits_per_index(prior, codes.test, codes.test_labels) < 10


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
    config = TrainConfig(**json.loads((other / "checkpoint.json").read_text())["config"])
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    Trainer(dataclasses.replace(config, seed=1), load_images(config), run).fit(progress=False)
    with pytest.raises(CheckpointError, match="the prior of another model"):
        load_prior(run)
    assert train_prior(run, TINY, progress=False) is not None
    load_prior(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "heads: must divide dim=16, got 3"),
        ({"batch_size": 1000}, "batch_size 1000 is more than the"),
        ({"device": "warp"}, "device 'warp' can't be used here: "),
    ],
)
def test_settings_that_cannot_be(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        train_prior(run, dataclasses.replace(TINY, **settings), progress=False)


def test_learning_rate_rises_and_falls():
    rates = [TINY.learning_rate_at(step) for step in range(7)]
    assert rates[0] == TINY.learning_rate / 2
    assert rates[1] == rates[2] == TINY.learning_rate
    assert rates[2] > rates[3] > rates[4] > rates[5] > rates[6]
    assert abs(rates[6]) < 1e-12


def labelled_trainer(folder, config=TINY):
    """A trainer on random codes of three classes."""
    train, test = (torch.randint(0, 24, (count, 4, 4), generator=generator(count)).int() for count in (20, 5))
    codes = Codes(train, test, torch.randint(0, 3, (20,), generator=generator()), torch.arange(5) % 3)
    return PriorTrainer(config, codes, 24, folder, identity="none")


def test_each_step_has_its_learning_rate(tmp_path):
    trainer = labelled_trainer(tmp_path)
    for step in range(4):
        trainer.train_step()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [TINY.learning_rate_at(step)]


def test_a_step_learns_from_codes_and_their_labels(tmp_path, monkeypatch):
    trainer = labelled_trainer(tmp_path)
    loss, seen = trainer.model.loss, []
    monkeypatch.setattr(trainer.model, "loss", lambda *given: (seen.append(given), loss(*given))[1])
    for step in range(3):
        trainer.train_step()
        rows = batch_rows(step, count=20, batch_size=TINY.batch_size, seed=TINY.seed)
        codes, labels = seen[step]
        assert torch.equal(codes, trainer.codes.train[rows].long())
        assert torch.equal(labels, trainer.codes.train_labels[rows])


def test_recent_bits_are_the_mean_loss_in_bits(tmp_path, monkeypatch):
    trainer = labelled_trainer(tmp_path)
    loss, losses = trainer.model.loss, []
    monkeypatch.setattr(trainer.model, "loss", lambda *given: (losses.append(loss(*given)), losses[-1])[1])
    for _ in range(3):
        trainer.train_step()
    measures, text = trainer.recent()
    bits = sum(value.item() for value in losses) / 3 / math.log(2)
    assert measures == {"bits_per_index": pytest.approx(bits, rel=1e-6)}
    assert text == f"{bits:.2f} bits a code"


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path, monkeypatch):
    trainer = labelled_trainer(tmp_path)
    loss = trainer.model.loss
    for scale in (1e3, 1e-4):
        monkeypatch.setattr(trainer.model, "loss", lambda *given, scale=scale: scale * loss(*given))
        trainer.train_step()
        norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
        assert norm == pytest.approx(1, rel=1e-3) if scale > 1 else 0 < norm < 0.1


def test_the_optimizer_has_its_settings(tmp_path):
    optimizer = labelled_trainer(tmp_path, dataclasses.replace(TINY, weight_decay=0.3)).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        assert (settings["betas"], settings["weight_decay"]) == ((0.9, 0.98), 0.3)


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
    """A record of settings as options of the command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in config.to_json().items() if value is not None]


def test_commands(run, tmp_path, capsys):
    assert main(["sample", str(run), f"--out={tmp_path}/s.png"]) == 2
    assert "has no prior yet" in capsys.readouterr().err
    assert main(["prior", str(run), *options(dataclasses.replace(TINY, steps=3))]) == 0
    said = capsys.readouterr().out
    assert "bits a code" in said
    assert f"picture: {run / 'prior' / 'curves.png'}" in said
    with Image.open(run / "prior" / "curves.png") as image:
        assert min(image.size) > 300
    learned = load_latest(run / "prior", PriorConfig)
    assert learned.config == dataclasses.replace(TINY, steps=3)
    assert main(["prior", str(run), "--resume", "--steps=4", "--kind=lstm", "--dim=16", "--dropout=0.2"]) == 2
    changed = "kind transformer, not lstm, dropout 0.1, not 0.2, steps 3, not 4"
    assert f"a resumed prior keeps its settings: {changed}\n" in capsys.readouterr().err
    assert main(["prior", str(run), "--resume", *options(dataclasses.replace(TINY, steps=3))]) == 0
    for name, more in (("s", []), ("c", ["--complete", "--temperature=0.8", "--top-k=5", "--seed=3"])):
        assert main(["sample", str(run), f"--out={tmp_path}/{name}.png", *more]) == 0
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300
    assert main(["sample", str(run), f"--out={tmp_path}/x.png", "--top-p=0"]) == 2
    assert "top_p: must lie in (0, 1], got 0.0" in capsys.readouterr().err
    assert main(["sample", str(run), f"--out={tmp_path}/x.png", "--guidance=2"]) == 2
    assert "guidance: of 2.0 needs labels" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device=warp"], "device 'warp' can't be used here: "),
        (["--heads=3", "--dim=16"], "heads: must divide dim=16, got 3"),
        (["--batch-size=1000"], "batch_size 1000 is more than the"),
        (["--dropout=1"], "dropout must be at least 0 and below 1, got 1.0"),
        (
            ["--compare=1", "--steps=3", "--resume"],
            "--compare trains every kind anew for its time: leave out steps, re",
        ),
        (["--compare=nan"], "seconds must be positive and finite, got nan"),
        (
            ["--compare=1", "--device=meta"],
            "device must be 'cpu' where kinds are compared by processor time, got 'meta'",
        ),
    ],
)
def test_a_prior_stays_where_its_successor_cannot_be(run, given, message, capsys):
    train_prior(run, TINY, progress=False)
    kept, records = weights(run), (run / "prior" / "metrics.jsonl").read_bytes()
    assert main(["prior", str(run), *given]) == 2
    assert message in capsys.readouterr().err
    assert equal(weights(run), kept)
    assert (run / "prior" / "metrics.jsonl").read_bytes() == records


def test_states_of_other_versions(run):
    train_prior(run, TINY, progress=False)
    kept = weights(run)
    path = sorted((run / "prior" / "checkpoints").glob("*/checkpoint.json"))[-1]
    description = json.loads(path.read_text())
    del description["config"]["device"]
    path.write_text(json.dumps(description))
    assert equal(weights(run), kept)
    path.write_text(json.dumps(description | {"config": description["config"] | {"mood": 1}}))
    with pytest.raises(CheckpointError, match=r"step-\d+: settings of another version of fastvq: mood") as said:
        load_prior(run)
    assert "delete" not in str(said.value)


def test_a_prior_comes_back_to_the_cpu(run, monkeypatch):
    monkeypatch.setattr(PriorTrainer, "fit", lambda trainer, **_: bool(trainer.model.to("meta")))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        train_prior(run, TINY, progress=False)


def test_priors_are_compared_after_equal_time(run):
    train_prior(run, TINY, progress=False)
    kept = weights(run)
    table = "\n".join(compare_priors(run, 0.5, config=dataclasses.replace(TINY, dim=None), progress=False))
    records = json.loads((run / "priors.json").read_text())
    assert [record["kind"] for record in records] == list(PRIORS)
    for record in records:
        assert 0 < record["bits_per_index"] < 10
        assert f"| {record['kind']} | {record['bits_per_index']:.3f} |" in table
        assert record["steps"] > 1
        assert record["processor_seconds"] < 20
    assert equal(weights(run), kept)


def test_files_coded_with_the_prior(run, tmp_path, capsys):
    train_prior(run, TINY, progress=False)
    coded, again = tmp_path / "held_out.fvq", tmp_path / "again.npy"
    assert main(["encode", "held-out", str(coded), f"--run={run}", "--model=prior"]) == 0
    assert main(["decode", str(coded), str(again), f"--run={run}"]) == 0
    codes = train_prior(run, resume=True, progress=False)[1].test
    assert np.array_equal(np.load(again), codes.numpy())
    assert main(["encode", str(again), str(tmp_path / "array.fvq"), f"--run={run}", "--model=prior"]) == 0
    assert main(["decode", str(coded), str(tmp_path / "out"), f"--run={run}"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(codes)
    capsys.readouterr()
    assert main(["decode", str(coded), str(tmp_path / "no.npy")]) == 2
    assert "--run: which run's prior" in capsys.readouterr().err
    train_prior(run, dataclasses.replace(TINY, seed=5), progress=False)
    assert main(["decode", str(coded), str(tmp_path / "no.npy"), f"--run={run}"]) == 2
    assert "coded with another prior" in capsys.readouterr().err
    assert not (tmp_path / "no.npy").exists()
