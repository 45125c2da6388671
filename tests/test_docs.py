"""The documents and the files of the project agree with the code and with each other."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fastvq
import fastvq.cli.main as cli
from fastvq.runs.tokenize import tokenize
from fastvq.runs.train_prior import train_prior
from fastvq.training.config import PriorConfig

from .tiny_runs import tiny_run

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


MIGRATION = ROOT / "docs" / "migration.md"


def python_blocks(document):
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.S)


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d != MIGRATION and python_blocks(d)], ids=lambda path: path.name
)
def test_code_runs(capsys, tmp_path, monkeypatch, document):
    """Pages that load runs/mine find a run of this name, with a prior, and its images as indices."""
    if any('"runs/mine"' in block for block in python_blocks(document)):
        run, images = tiny_run(tmp_path, count=30, grayscale=False)
        train_prior(run, PriorConfig(steps=1, batch_size=4, dim=8, depth=1), progress=False)
        (tmp_path / "runs").mkdir()
        tokenize(run, images, tmp_path / "indices")
        run.rename(tmp_path / "runs" / "mine")
        monkeypatch.chdir(tmp_path)
    for block in python_blocks(document):
        exec(compile(block, str(document), "exec"), {})
    assert capsys.readouterr().out


def test_migration_runs():
    """In a process of its own: vector_quantize_pytorch must not have been imported before."""
    [block] = python_blocks(MIGRATION)
    run = subprocess.run([sys.executable, "-c", block], check=True, capture_output=True, text=True)
    assert run.stdout == "fastvq.quantizers.residual_vq\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_linked_and_named_files_exist(document):
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:tests|docs|examples|fastvq|csrc|benchmarks)/[\w/.]+\.\w+)`", text)
    missing = [name for name in links if not (document.parent / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def commands():
    """Return the lines of the documents that begin with `fastvq`, without comments and brackets around options."""
    found = set()
    for document in DOCUMENTS:
        for line in re.findall(r"^    (fastvq \S.*)$", document.read_text(), re.M):
            found.add(re.sub(r"\s+#.*|\s{2,}[a-z].*|[\[\]]", "", line))
    return sorted(found)


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command):
    _, *arguments = shlex.split(command)
    assert cli._parser().parse_args(arguments).run


def test_readme_links_to_every_page():
    linked = re.findall(r"\]\((docs/[^)#]+\.md)\)", (ROOT / "README.md").read_text())
    assert {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")} <= set(linked)


def test_readme_fits_a_window():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_nobody_is_sent_to_the_other_fastvq(document):
    """On PyPI the name without -torch is another project's."""
    assert not re.search(r"pip install \"?fastvq(?!-torch)", document.read_text())


def test_hooks_have_the_versions_of_the_linters():
    pinned = re.findall(r'"((?:ruff|clang-format)==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    hooks = re.findall(r"additional_dependencies: \[(.*)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pinned) == 2
    assert set(hooks) == set(pinned)


def test_citation_has_the_version_of_the_package():
    assert f"\nversion: {fastvq.__version__}\n" in (ROOT / "CITATION.cff").read_text()
