"""Paths: every public function takes them as str and as any `os.PathLike`."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq import coding
from fastvq.bench.data import from_file
from fastvq.data import load_image_folder
from fastvq.data.arrays import read_array
from fastvq.data.image_format import ImageFormat
from fastvq.data.image_io import read_image, write_image
from fastvq.modalities import ImageConfig
from fastvq.runs import figures
from fastvq.runs.decode import decode_array, decode_examples
from fastvq.runs.encode import encode_array, encode_files, encode_held_out
from fastvq.runs.load import load_model, load_prior, run_examples
from fastvq.runs.pictures import picture_prior, picture_reconstructions
from fastvq.runs.reconstruct import reconstruct_files, reconstruct_held_out
from fastvq.runs.sample import sample_run
from fastvq.runs.train_prior import delete_prior, train_prior
from fastvq.training import PriorConfig, Trainer, load_examples
from fastvq.training.checkpoint import checkpoint_folders, load_latest
from fastvq.training.metrics import read_metrics

PACKAGE = Path(__file__).parent.parent / "fastvq"
TINY = {"codebook_size": 16, "dim": 8, "width": 8, "residual_width": 4, "encoder_blocks": 1, "decoder_blocks": 1}
TINY_PRIOR = PriorConfig(steps=2, batch_size=8, dim=8, depth=1, heads=2)


class Elsewhere:
    """A path that is neither a str nor a Path."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __fspath__(self) -> str:
        return self._path


def parameters() -> Iterator[tuple[str, str]]:
    """Yield (function and argument, annotation) of all public functions and constructors."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "bench" / "gpu"):  # the program that `make gpu` runs
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
                for argument in [*node.args.args, *node.args.kwonlyargs]:
                    if argument.annotation is not None:
                        yield f"{path.stem}.{node.name}.{argument.arg}", ast.unparse(argument.annotation)


def test_no_public_function_asks_for_a_path_of_one_type() -> None:
    """Mypy then sees that each converts what it is given: str has no parent and no `/`."""
    found = dict(parameters())
    for name in ("loop.__init__.folder", "load.load_model.run", "images.load_image_folder.root"):
        assert found[name] == "StrPath"
    allowed = {"checkpoint.damage_named.folder"}  # of a checkpoint that has been found
    assert {name for name, kind in found.items() if "Path" in kind.split() or "os.PathLike[str]" in kind} <= allowed


@pytest.mark.parametrize("kind", [str, Elsewhere])
def test_what_one_does_with_a_run(tmp_path: Path, kind: type[str | os.PathLike[str]]) -> None:
    def at(name: str) -> str | os.PathLike[str]:
        return kind(tmp_path / name)

    (tmp_path / "images").mkdir()
    for number, image in enumerate(torch.rand(20, 3, 8, 8)):
        write_image(kind(tmp_path / "images" / f"{number}.png"), image, "png")
    write_image(at("one.bin"), torch.rand(3, 8, 8), "png")
    assert read_image(at("one.bin"), ImageFormat(8)).shape == (3, 8, 8)
    images = load_image_folder(at("images"), image_size=8)
    config = ImageConfig(data=at("images"), image_size=8, grayscale=False, steps=2, batch_size=8, **TINY)
    assert load_examples(config).fingerprint() == images.fingerprint()
    trainer = Trainer(config, images, at("run"))
    evaluation = trainer.fit(progress=False)
    run = at("run")
    assert len(checkpoint_folders(run)) == 1
    assert load_latest(run).step == 2
    assert read_metrics(at("run/metrics.jsonl"))
    load_model(run)
    assert run_examples(run, at("images")).fingerprint() == images.fingerprint()
    assert evaluation is not None
    assert picture_reconstructions(trainer, evaluation).exists()

    assert train_prior(run, TINY_PRIOR, data=at("images"), progress=False) is not None
    assert load_prior(run)[0].classes == 0
    assert picture_prior(run).exists()
    sample_run(run, at("drawn.npy"), count=2)
    sample_run(run, at("drawn"), count=2)
    encode_files(run, at("images"), at("a.fvq"))
    encode_files(run, [at("images/0.png"), at("images")], at("a.fvq"))
    encode_held_out(run, at("b.fvq"), model="prior")
    encode_array(at("drawn.npy"), at("c.fvq"), run=run)
    decode_examples(run, at("c.fvq"), at("decoded"))
    decode_array(at("b.fvq"), at("b.npy"), run=run)
    coding.save(at("d.fvq"), coding.load(at("c.fvq")))
    assert np.array_equal(read_array(at("drawn.npy")), coding.decode(coding.load(at("d.fvq"))).numpy())
    reconstruct_files(run, [at("images/0.png")], at("one.png"))
    reconstruct_held_out(run, at("held_out.png"))
    assert all(figures.texts_of(at("one.png")))
    np.save(tmp_path / "vectors.npy", np.zeros((4, 2)))
    assert from_file(at("vectors.npy"), None, None, None)[0].shape == (4, 2)
    delete_prior(run)
    assert not checkpoint_folders(at("run/prior"))
    with Image.open(tmp_path / "held_out.png") as picture:
        assert picture.width > 150
