"""Runs whose images become several indices at each position, or scales: files, samples, evaluations, pictures."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import fastvq
from fastvq import coding
from fastvq.cli.main import main
from fastvq.data.examples import to_float
from fastvq.runs import compare_priors
from fastvq.runs.load import load_model, load_prior, run_examples
from fastvq.runs.pictures import picture_run
from fastvq.runs.train_prior import train_prior
from fastvq.training import PriorConfig, Trainer, load_examples

from ..tiny_runs import tiny_run

PRIOR = PriorConfig(steps=3, batch_size=8, dim=8, depth=1, heads=2, warmup_steps=1)
RUNS = {
    "rvq": {"bottleneck": "rvq", "bottleneck_options": {"codebook_sizes": [24, 8, 4]}, "codebook_size": 512},
    "hierarchical": {"bottleneck": "hierarchical"},
    "vqvae2": {"grids": 3, "bottleneck_options": {"heads": 2}},
}
SHAPES = {"rvq": (4, 4, 3), "hierarchical": (1 + 4 + 16,), "vqvae2": (2 * (1 + 4 + 16),)}
KINDS = {"rvq": "transformer", "hierarchical": "next-scale", "vqvae2": "hierarchical"}
COUNTS = {"rvq": (16, 16, 16), "hierarchical": (1, 4, 16), "vqvae2": (1, 1, 4, 4, 16, 16)}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """Return (name of the bottleneck, run of a few steps with a prior)."""
    folder, _ = tiny_run(tmp_path_factory.mktemp(request.param), count=30, grayscale=False, **RUNS[request.param])
    train_prior(folder, dataclasses.replace(PRIOR, kind=KINDS[request.param]), progress=False)
    return request.param, folder


@pytest.mark.parametrize("model", coding.MODELS)
def test_files_hold_all_indices(run, model, tmp_path):
    name, folder = run
    coded, array = tmp_path / "a.fvq", tmp_path / "a.npy"
    assert main(["encode", "--held-out", str(coded), f"--run={folder}", f"--model={model}"]) == 0
    assert main(["decode", str(coded), str(array), f"--run={folder}"]) == 0
    vqvae, _ = load_model(folder)
    pixels = run_examples(folder).test
    indices = vqvae.encode(to_float(pixels))
    assert indices.shape == (len(pixels), *SHAPES[name])
    assert np.array_equal(np.load(array), indices.numpy())
    assert main(["decode", str(coded), str(tmp_path / "out"), f"--run={folder}"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(pixels)
    size = vqvae.codebook_size
    assert coding.read_header(coded.read_bytes()).codebook_size == size == ((24, 8, 4) if name == "rvq" else 24)


def test_samples_are_indices_of_their_stage(run, tmp_path):
    name, folder = run
    assert main(["sample", str(folder), f"--out={tmp_path / 's.npy'}", "--count=9"]) == 0
    indices = torch.from_numpy(np.load(tmp_path / "s.npy"))
    assert indices.shape == (9, *SHAPES[name])
    vqvae, _ = load_model(folder)
    stages = vqvae.adapter.stages(indices)
    assert all(int(stage.max()) < size for stage, size in zip(stages, vqvae.adapter.stage_sizes(), strict=True))
    coded = tmp_path / "s.fvq"
    assert main(["encode", str(tmp_path / "s.npy"), str(coded), f"--run={folder}", "--model=prior"]) == 0
    assert torch.equal(coding.decode(coded.read_bytes(), prior=load_prior(folder)[0]), indices)
    assert main(["sample", str(folder), f"--out={tmp_path / 's.png'}"]) == 0


def test_an_evaluation_has_each_codebook(run, tmp_path, capsys):
    name, folder = run
    assert main(["evaluate", str(folder), f"--out={tmp_path / 'e.json'}"]) == 0
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "e.json").read_text())["measures"]
    counts = COUNTS[name]
    sizes = (24, 8, 4) if name == "rvq" else (24,) * len(counts)
    bits = sum(count * np.log2(size) for count, size in zip(counts, sizes, strict=True)) / sum(counts)
    assert measured["bits_per_index"]["value"] == pytest.approx(bits)
    for measure in ("usage", "perplexity"):
        assert len(measured[measure]["codebooks"]) == len(counts)
        assert sum(measured[measure]["codebooks"]) / len(counts) == pytest.approx(measured[measure]["value"])
    assert printed.count("of codebook 3 ") == 2


def test_a_loaded_run_decodes_what_it_encodes(run):
    name, folder = run
    model = fastvq.load(folder)
    images = to_float(run_examples(folder).test)
    assert torch.equal(model.decode(model.encode(images)), model.reconstruct(images))
    assert model.sample(2).shape == (2, *images.shape[1:])
    expected = r"\(B, h, w, 3\), got \(1, 4, 4\)" if name == "rvq" else rf"\(B, {sum(COUNTS[name])}\), got \(1, 4, 4\)"
    with pytest.raises(ValueError, match=f"indices: must be {expected}"):
        model.decode(torch.zeros(1, 4, 4, dtype=torch.int64))


def test_pictures_show_each_codebook(run, tmp_path, monkeypatch):
    _, folder = run
    model, config = load_model(folder)
    trainer = Trainer(config, load_examples(config), tmp_path / "again")
    trainer.model.load_state_dict(model.state_dict())
    (tmp_path / "again").mkdir(exist_ok=True)
    (tmp_path / "again" / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    drawn = {}
    for name in ("save_usage", "save_indices", "save_curves"):
        monkeypatch.setattr(f"fastvq.runs.plots.{name}", lambda *given, name=name, **_: drawn.update({name: given}))
    evaluation, _ = trainer.evaluate()
    picture_run(trainer, evaluation)
    sizes = [*model.adapter.stage_sizes()]
    assert [len(counts) for counts in drawn["save_usage"][1]] == sizes
    _, originals, grids, _, vectors = drawn["save_indices"]
    assert [len(codes) for codes in vectors] == sizes
    assert all(len(grid) == len(originals) for grid in grids)
    assert [grid.shape[1:] for grid in grids] == [stage.shape[1:] for stage in model.adapter.stages(grids_of(model))]


def test_kinds_of_priors_that_fit_the_indices_are_compared(run, monkeypatch):
    name, folder = run
    tried = []

    def trained(seconds, config, *others, **options):
        tried.append(config.kind)
        return {"kind": config.kind, "bits_per_index": 1.0, "parameters": 1, "steps": 1, "processor_seconds": 1.0}

    monkeypatch.setattr(compare_priors, "_train_for", trained)
    compare_priors.compare_priors(folder, 1.0)
    alike = ["transformer", "pixelcnn", "lstm", "hierarchical", "next-scale"]
    assert tried == (["transformer", "lstm", "depth"] if name == "rvq" else alike)
    (folder / "priors.json").unlink()


def grids_of(model):
    return torch.zeros(1, *model.adapter.index_shape((4, 4)), dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prior", "RUN", "--overwrite", "--kind=pixelcnn"],
            "kind: a pixelcnn takes one index at each position",
        ),
        (
            ["prior", "RUN", "--overwrite", "--kind=lstm", "--pattern=delay"],
            "--pattern must be flat for a prior",
        ),
        (
            ["prior", "RUN", "--overwrite", "--kind=depth", "--pattern=delay"],
            "--pattern must be flat for a prior",
        ),
        (
            ["prior", "RUN", "--overwrite", "--stage-depth=2"],
            "--stage-depth must be left out for a prior of kind trans",
        ),
        (["prior", "RUN", "--pattern=late"], "--pattern must be one of flat, delay, got 'late'"),
        (["encode", "a.npy", "a.fvq", "--run=RUN", "--codebook-size=9"], "below 24, 8, 4 of 3 codebooks, got 9"),
    ],
)
def test_what_a_run_of_stages_cannot_do_is_named(run, arguments, message, tmp_path, capsys, monkeypatch):
    name, folder = run
    if name != "rvq":
        pytest.skip("for several indices at each position")
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 4, 3), np.int64))
    assert main([argument.replace("RUN", str(folder)) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_pages_of_scales_have_no_completions(run, capsys):
    """Without a warning, since nothing failed."""
    name, folder = run
    assert main(["sample", str(folder)]) == 0
    assert "warning" not in capsys.readouterr().err
    assert (folder / "completions.png").exists() == (name == "rvq")


def test_scales_have_no_upper_half(run, tmp_path, capsys):
    name, folder = run
    status = main(["sample", str(folder), f"--out={tmp_path / 'c.png'}", "--complete"])
    if name != "rvq":
        assert status == 2
        assert "--complete: the indices of this run are scales of whole images" in capsys.readouterr().err
    else:
        assert status == 0


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        (["--pattern=delay"], "--pattern: 'delay' is for several indices at each position"),
        (["--kind=depth", "--stage-dim=4", "--stage-depth=1"], "kind: a depth prior takes several indices at each"),
    ],
    ids=["delay", "depth"],
)
def test_delay_and_depth_belong_to_stages(run, given, refusal, tmp_path, capsys):
    name, folder = run
    arguments = [*given, "--steps=1", "--batch-size=8", "--dim=8", "--heads=2", "--depth=1"]
    status = main(["prior", str(folder), "--overwrite", *arguments])
    if name != "rvq":
        assert status == 2
        assert refusal in capsys.readouterr().err
        return
    assert status == 0
    prior, _ = load_prior(folder)
    assert {"pattern": "delay", "stage_dim": 4}.items() & prior.settings.items()
    array, coded = tmp_path / "s.npy", tmp_path / "s.fvq"
    assert main(["sample", str(folder), f"--out={array}", "--count=3"]) == 0
    assert main(["sample", str(folder), f"--out={tmp_path / 'c.png'}", "--complete", "--top-k=5"]) == 0
    assert main(["encode", str(array), str(coded), f"--run={folder}", "--model=prior"]) == 0
    assert np.array_equal(coding.decode(coded.read_bytes(), prior=prior).numpy(), np.load(array))
