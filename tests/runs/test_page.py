"""Pages of sections, and the page of a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastvq.cli.main import main
from fastvq.errors import CheckpointError
from fastvq.runs import figures, plots
from fastvq.runs.evaluate import evaluate_run
from fastvq.runs.page import Picture, Section, TextTable, write_page
from fastvq.runs.run_page import write_run_page
from fastvq.runs.sample import sample_run
from fastvq.runs.train_prior import train_prior
from fastvq.training.config import PriorConfig

from ..tiny_runs import tiny_run


def test_texts_are_escaped_and_backticks_are_code(tmp_path: Path) -> None:
    table = TextTable(["a < b"], [["`x` & y"]], folded="<more>")
    page = write_page(tmp_path, "A & B", "1 < 2", [Section("<One>", ["use `a < b`", table])]).read_text()
    assert "<title>A &amp; B</title>" in page
    assert "<h1>A &amp; B</h1>\n<p>1 &lt; 2</p>\n<h2>&lt;One&gt;</h2>\n<p>use <code>a &lt; b</code></p>" in page
    assert "<details><summary>&lt;more&gt;</summary><table><tr><th>a &lt; b</th></tr>" in page
    assert "<td><code>x</code> &amp; y</td>" in page


def test_a_name_that_is_not_utf8_is_shown(tmp_path: Path) -> None:
    assert "<h1>a?b</h1>" in write_page(tmp_path, "a\udcffb", "", []).read_text()


def test_titles_and_captions_are_text_below_the_pictures(tmp_path: Path) -> None:
    """On a phone the text of a picture that is scaled down could not be read."""
    plots.save_usage(tmp_path / "a b.png", [torch.tensor([3, 1])], perplexity=1.5, title="T < U", captioned=False)
    pictures = [Picture("a b.png", 'bars "of" codes'), Picture("absent.png", "nothing")]
    page = write_page(tmp_path, "", "", [Section("", pictures)]).read_text()
    assert re.search(
        r'<figure><img src="a%20b\.png" alt="bars &quot;of&quot; codes"><figcaption><b>T &lt; U</b>One bar per',
        page,
    )
    assert "absent" not in page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a prior, an evaluation and the pictures of the page."""
    run, _ = tiny_run(tmp_path_factory.mktemp("page"), count=30, grayscale=True)
    train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1), progress=False)
    evaluate_run(run)
    sample_run(run, top_p=0.9)
    return run


def test_the_page_of_a_run_shows_what_is_there(finished: Path, tmp_path: Path) -> None:
    page = (finished / "index.html").read_text()
    assert re.search(
        r"A VQ-VAE, trained on images: 3 steps in 0:0\d\. Held-out images are decoded with \d+\.\d\d dB\.", page
    )
    for name in ("samples", "completions", "neighbors"):
        assert f'<img src="{name}.png"' in page
    assert "Sampled with top_p 0.9." in page
    assert "<td>PSNR of the mean squared error (dB)</td>" in page
    assert "<td>MS-SSIM</td><td>images of 16 x 16 are smaller" in page
    assert "<td><code>batch_size</code></td><td>8</td>" in page
    assert "A prior of kind transformer has learned the distribution of the indices in 1 step." in page
    assert "Use of the codebook" not in page  # there is no picture of it
    copy = shutil.copytree(finished, tmp_path / "a b")
    shutil.rmtree(copy / "prior")
    (copy / "evaluation.json").write_text("{")
    page = write_run_page(copy).read_text()
    assert "The prior" not in page
    assert "Evaluation" not in page
    assert f"fastvq evaluate &#x27;{copy}&#x27;" in page
    evaluation = json.loads((finished / "evaluation.json").read_text())
    (copy / "evaluation.json").write_text(json.dumps(evaluation | {"step": 2}))
    assert "after step 2, before the training went on" in write_run_page(copy).read_text()


def test_another_page_is_not_replaced(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "index.html").write_text("mine")
    assert write_run_page(copy) == copy / "index.html"
    assert (copy / "index.html").read_text() == "mine"
    with pytest.raises(CheckpointError, match="does not exist"):
        write_run_page(tmp_path / "absent")


def test_training_writes_the_page(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "index.html").unlink()
    assert main(["train", "--out", str(copy), "--resume", "--steps", "4", "--overwrite"]) == 0
    assert f"pictures and settings: {copy / 'index.html'}\n" in capsys.readouterr().out
    page = (copy / "index.html").read_text()
    for name in ("reconstructions", "indices", "usage", "curves"):
        assert f'<img src="{name}.png"' in page
        assert figures.texts_of(copy / f"{name}.png")[0]


def test_a_sample_for_the_page_takes_no_count(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--count=3", "--label=0", "--complete"):
        assert main(["sample", str(finished), option]) == 2
        name = option.partition("=")[0]
        assert f"{name}: the page of the run has its own samples: give an output" in capsys.readouterr().err
