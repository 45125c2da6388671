"""The commands of the README and the docs, page by page: run in order, and once again."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvq.cli.main import main

from .tiny_runs import few_clothes

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/training.md", "docs/prior.md", "docs/coding.md"]
TINY = {
    "train": "--codebook-size=512 --dim=8 --width=8 --residual-width=4 --encoder-blocks=1 --decoder-blocks=1"
    " --steps=2 --batch-size=8",
    "prior": "--steps=2 --dim=16 --depth=1 --heads=2 --batch-size=8",
}
SMALLER = {"--steps 1000": "--steps 2", "--prior-steps 500": "--prior-steps 2", "--count 10000": "--count 3"}
LEFT_OUT = ("fastvq bench", "fastvq info", "fastvq prior runs/demo --compare")
"""Commands that measure, or print what depends on the machine."""
REPEATED = r"already holds a run|has a prior already|exists: choose another folder"
"""What a command says that would replace what it has written."""


def commands(page: str) -> list[str]:
    """Return the commands of a page in their order, without comments and optional parts."""
    lines = re.findall(r"^    ((?:fastvq|python examples/\S+) .*)$", (ROOT / page).read_text(), re.M)
    lines = [re.sub(r"\s+#.*|\s*\[[^\]]*\]", "", line) for line in lines]
    for long, short in SMALLER.items():
        lines = [line.replace(long, short) for line in lines]
    return [line for line in lines if not line.startswith(LEFT_OUT)]


def run(line: str) -> int:
    """Run a command in this process, with small settings where it trains."""
    program, *arguments = shlex.split(line)
    if program == "python":
        sys.argv = arguments
        try:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        except SystemExit as end:
            print(end.code, file=sys.stderr)
            return 2
        return 0
    if "--resume" not in arguments:
        arguments += TINY.get(arguments[0], "").split()
    if "--preset" in arguments:
        arguments.append("--norm-groups=1")  # of few channels
    if "--adversarial-weight" in arguments:
        arguments.append("--adversarial-start=1")  # of few steps
    if "--data" in arguments:
        arguments.append("--image-size=16")
    return main(arguments)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Enter a folder with what the pages presume: a folder of images, a photo, an array, and a few clothes as data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    random = np.random.default_rng(0)
    Path("PATH").mkdir()
    for n in range(30):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(f"PATH/{n:02d}.png")
    Image.open("PATH/00.png").save("photo.png")
    np.save("indices.npy", random.integers(0, 1024, (2, 5, 4)))
    few_clothes(monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_order_and_again(place, capsys, page):
    lines = commands(page)
    assert len(lines) >= 4
    first = lines[0].startswith("fastvq train")
    if not first:
        for name in ("mine", "demo"):
            assert run(f"fastvq train --out runs/{name}") == 0
    if "runs/demo" in " ".join(lines):
        assert run("fastvq prior runs/demo") == 0
    for line in lines:
        assert run(line) == 0, (line, capsys.readouterr())
    capsys.readouterr()
    for line in lines:
        status = run(line)
        error = capsys.readouterr().err.rpartition("\r")[2].strip()
        assert status == 0 or re.search(REPEATED, error), (line, error)
        assert "Traceback" not in error
