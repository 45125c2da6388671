"""Text to image on a run: training, sampling and ranking by command, and requests that cannot be met."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

import fastvq
from fastvq.cli.main import main
from fastvq.errors import CheckpointError, ConfigError
from fastvq.models import TextPrior
from fastvq.runs.contrast import load_contrastive, similarity, train_contrastive
from fastvq.runs.load import held_out_labels, load_prior, run_examples
from fastvq.runs.train_prior import delete_prior, train_prior
from fastvq.training import ContrastiveTrainer
from fastvq.training.config import ContrastiveConfig, PriorConfig

from ..tiny_runs import tiny_run

CONFIG = PriorConfig(text=True, steps=2, batch_size=8, dim=16, depth=1, heads=2)
CONTRASTIVE = ContrastiveConfig(
    steps=4, batch_size=8, dim=8, width=4, text_width=8, evaluate_every=4, checkpoint_every=2, log_every=2
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run of captioned images with a prior of text and a contrastive model."""
    run, images = tiny_run(tmp_path_factory.mktemp("text"), count=30, grayscale=False, test_fraction=0.25)
    colors, shapes = ("red", "green", "blue"), ("heart", "square", "circle", "star", "cat")
    with (images / "captions.jsonl").open("w") as file:
        for number, path in enumerate(sorted(images.glob("*.png"))):
            text = "" if number == 5 else f"{colors[number % 3]} {shapes[number % 5]}"
            print(json.dumps({"file_name": path.name, "text": text}), file=file)
    train_prior(run, CONFIG, progress=False)
    train_contrastive(run, CONTRASTIVE, progress=False)
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a run of images without captions."""
    return tiny_run(tmp_path_factory.mktemp("plain"), count=20, grayscale=False)[0]


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_the_run_has_a_prior_of_text_that_loads(trained):
    prior, _ = load_prior(trained)
    assert isinstance(prior, TextPrior)
    assert prior.classes == 0
    tokenizer = prior.tokenizer
    assert tokenizer is not None
    assert prior.settings["vocabulary"] == tokenizer.vocabulary
    assert prior.settings["text_length"] == tokenizer.length == tokenizer.rows(["red square"]).shape[-1]


def test_samples_of_a_text_by_command_and_in_python(trained, tmp_path):
    arguments = ["sample", str(trained), "--text", "red heart", "--seed=3", "--guidance=2", "--top-k=5"]
    assert main([*arguments, f"--out={tmp_path / 'indices.npy'}"]) == 0
    indices = torch.from_numpy(np.load(tmp_path / "indices.npy"))
    prior, vqvae = load_prior(trained)
    assert isinstance(prior, TextPrior)
    text = prior.tokenizer.encode("red heart").expand(100, -1)
    settings = {"guidance": 2.0, "top_k": 5, "generator": torch.Generator().manual_seed(3)}
    assert torch.equal(indices, prior.sample(100, text, **settings))
    own = fastvq.load(trained).sample(100, text="red heart", seed=3, guidance=2.0, top_k=5)
    assert torch.equal(own, vqvae.restore(indices))
    assert main([*arguments, "--count=4", f"--out={tmp_path / 'grid.png'}"]) == 0
    assert main([*arguments, "--count=4", f"--out={tmp_path / 'folder'}"]) == 0
    assert len(list((tmp_path / "folder").glob("*.png"))) == 4


def test_ranking_keeps_the_most_similar(trained, tmp_path):
    model = fastvq.load(trained)
    assert model.contrastive is not None
    drawn = model.sample(20, text="blue star", seed=1)
    kept = model.sample(3, text="blue star", rerank=20, seed=1)
    similar = similarity(model.contrastive, drawn, "blue star")
    assert torch.equal(kept, drawn[similar.argsort(descending=True)[:3]])
    out = tmp_path / "best.npy"
    assert (
        main(["sample", str(trained), "--text=blue star", "--rerank=20", "--count=3", "--seed=1", f"--out={out}"]) == 0
    )
    best = np.load(out)
    assert best.shape == (3, 4, 4)
    everything = tmp_path / "all.npy"
    assert main(["sample", str(trained), "--text=blue star", "--count=20", "--seed=1", f"--out={everything}"]) == 0
    restored = model.decode(torch.from_numpy(np.load(everything)))
    order = similarity(model.contrastive, restored, "blue star").argsort(descending=True)[:3]
    assert np.array_equal(best, np.load(everything)[order.numpy()])


def test_the_page_shows_captions(trained, capsys):
    assert main(["sample", str(trained)]) == 0
    assert "samples.png" in capsys.readouterr().out


def test_samples_for_pictures_and_judgements_follow_held_out_captions(trained):
    prior, examples = load_prior(trained)[0], run_examples(trained)
    assert isinstance(prior, TextPrior)
    rows = list(range(len(examples.test)))
    labels = held_out_labels(prior, examples, rows)
    expected = [prior.tokenizer.encode(text) for text in examples.test_captions if text]
    assert torch.equal(labels, torch.stack(expected))


def test_bits_of_an_evaluation_are_given_the_captions(trained):
    prior, examples, model = load_prior(trained)[0], run_examples(trained), fastvq.load(trained)
    labels = held_out_labels(prior, examples, range(len(examples.test)))
    indices = model.encode(examples.test)
    expected, without = (float(prior.bits(indices, given).sum()) / indices.numel() for given in (labels, None))
    main(["evaluate", str(trained)])
    measures = json.loads((trained / "evaluation.json").read_text())["measures"]
    assert measures["prior_bits_per_index"]["value"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - without) > 1e-4


def test_options_of_captions_need_text(plain, capsys):
    for option in ("--text-vocabulary=300", "--text-length=9", "--text-weight=0.2"):
        assert "has no effect without --text" in refused(capsys, "prior", plain, option)


def test_requests_that_a_prior_of_text_refuses(trained, tmp_path, capsys):
    out = f"--out={tmp_path / 'x.png'}"
    for options, message in (
        (["--text=red heart", "--label=1"], "text and label exclude each other"),
        (["--label=1"], "trained with captions: give a text instead, got 1"),
        (["--text= "], "must say what to draw"),
        (["--text=" + "red heart " * 9], "must have at most"),
        (["--rerank=9"], "orders samples by their similarity to a text, got 9 without"),
        (["--text=red heart", "--rerank=9"], "at least the number of samples that are kept, 16, got 9"),
        (["--guidance=2", "--count=3"], "needs labels or a text, got 2.0 without"),
        (["--text=red heart", "--complete"], "takes neither count nor label nor text"),
    ):
        assert message in refused(capsys, "sample", trained, out, *options)
    assert "the page of the run has its own samples" in refused(capsys, "sample", trained, "--text=red heart")
    assert main(["sample", str(trained), out, "--text=red zebra", "--count=1"]) == 0
    assert "no caption that was learned from has 1 word of 'red zebra': zebra" in capsys.readouterr().err


def test_runs_without_captions_or_without_a_prior_of_text(plain, tmp_path, capsys):
    for command in ("prior", "contrast"):
        options = ["--text"] if command == "prior" else []
        assert "have no captions to learn from" in refused(capsys, command, plain, *options)
    train_prior(plain, dataclasses.replace(CONFIG, text=False), progress=False)
    out = f"--out={tmp_path / 'x.png'}"
    assert "this prior was trained without captions, got 'red heart': fastvq prior" in refused(
        capsys, "sample", plain, out, "--text=red heart"
    )
    model = fastvq.load(plain)
    with pytest.raises(ConfigError, match="trained without captions"):
        model.sample(text="red heart")
    assert model.contrastive is None
    assert "has no contrastive model yet: fastvq contrast" in model.no_contrastive


def test_samples_cannot_be_ranked_without_a_contrastive_model(trained, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("contrastive"))
    out = f"--out={tmp_path / 'x.png'}"
    said = refused(capsys, "sample", copy, out, "--text=red heart", "--count=1", "--rerank=2")
    assert "has no contrastive model yet: fastvq contrast" in said
    with pytest.raises(CheckpointError, match="has no contrastive model yet"):
        fastvq.load(copy).sample(text="red heart", rerank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "--kind=lstm"], "needs a transformer of the pattern flat, got lstm"),
        (["--text", "--compare=1"], "kinds of priors are compared without captions"),
        (["--text", "--text-length=2"], "must be at least 3, got 2"),
        (["--text", "--text-vocabulary=100"], "must be at least 259, got 100"),
        (["--text", "--text-weight=1"], "must be at least 0 and below 1, got 1.0"),
    ],
)
def test_invalid_settings(plain, capsys, options, message):
    assert message in refused(capsys, "prior", plain, *options)


def test_interrupted_and_resumed_equals_uninterrupted(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    whole = load_prior(run)[0].state_dict(), load_contrastive(run, load_prior(run)[1]).state_dict()
    delete_prior(run)
    train_prior(run, dataclasses.replace(CONFIG, steps=1), progress=False)
    with pytest.raises(ConfigError, match="keeps its settings, but these changed: text from True to False"):
        train_prior(run, dataclasses.replace(CONFIG, text=False, steps=2), resume=True, progress=False)
    original = ContrastiveTrainer.train_step

    def step_and_interrupt(trainer):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        original(trainer)

    with pytest.raises(CheckpointError, match=r"has a contrastive model already .*resume it \(--resume\), or replace"):
        train_contrastive(run, CONTRASTIVE, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "train_step", step_and_interrupt)
        assert train_contrastive(run, CONTRASTIVE, overwrite=True, progress=False) is None
    torch.manual_seed(99)
    again = train_contrastive(run, resume=True, progress=False)
    assert again is not None
    assert all(torch.equal(value, whole[1][name]) for name, value in again.model.state_dict().items())
    assert again.candidates == 0 or 0 <= again.retrieval <= 1
    train_prior(run, CONFIG, overwrite=True, progress=False)
    assert all(torch.equal(value, whole[0][name]) for name, value in load_prior(run)[0].state_dict().items())


def test_a_gumbel_dvae_and_its_files(tmp_path):
    """Files are coded without captions."""
    run, images = tiny_run(tmp_path, count=20, grayscale=False, bottleneck="gumbel")
    (images / "captions.jsonl").write_text(
        "".join(json.dumps({"file_name": path.name, "text": "a star"}) + "\n" for path in images.glob("*.png"))
    )
    train_prior(run, dataclasses.replace(CONFIG, steps=1), progress=False)
    assert fastvq.load(run).sample(2, text="a star", guidance=2.0).shape == (2, 3, 16, 16)
    coded, again = tmp_path / "images.fvq", tmp_path / "again.npy"
    assert main(["encode", str(images), str(coded), f"--run={run}", "--model=prior"]) == 0
    assert main(["decode", str(coded), str(again), f"--run={run}"]) == 0
    assert np.load(again).shape == (20, 4, 4)


def test_samples_of_captions_are_judged_by_the_contrastive_model(trained, capsys):
    assert main(["evaluate", str(trained), "--samples", "7", "--top-k", "3"]) == 0
    assert "share whose caption is the nearest" in capsys.readouterr().out
    record = json.loads((trained / "samples.json").read_text())
    (trained / "samples.json").unlink()
    assert set(record["measures"]["caption_retrieval"]) == {"samples", "decoded"}
