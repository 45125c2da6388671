"""`python -m fastvq.bench.gpu DIR`: build, check and time fastvq on the GPU of this machine, within minutes."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

import fastvq
from fastvq.files import write_whole

from . import report
from .build import SITE
from .run import DOCUMENT, LOG, PAGE, InProcess, python, run_steps
from .steps import STEPS

ROOT = Path(fastvq.__file__).resolve().parents[1]
SECONDS = 540.0
LEAST = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Run all steps and print the page; return 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m fastvq.bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help=f"folder of the results: {DOCUMENT}, {PAGE}, {LOG}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)g)")
    parser.add_argument(
        "--work", type=Path, help="folder of builds and caches, kept for the next run (default: build/gpu)"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes: shows that every step runs")
    options = parser.parse_args(arguments)
    if options.seconds < LEAST:
        parser.error(f"--seconds: must be at least {LEAST:g}, got {options.seconds:g}")
    if not (ROOT / "csrc" / "cuda" / "build.py").exists():
        parser.error(f"{ROOT} is no source tree of fastvq: run this in a clone")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; --rehearse runs the steps on the CPU")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = (options.work or default_work(ROOT, out)).resolve()
    work.mkdir(parents=True, exist_ok=True)
    keep_earlier(out)
    # An earlier run's copy of the package; what is built and cached stays.
    shutil.rmtree(work / SITE, ignore_errors=True)
    signal.signal(signal.SIGTERM, _stop)
    try:
        document = run_steps(
            STEPS,
            launcher(out, work, rehearse=options.rehearse),
            out,
            budget=options.seconds,
            head=head(rehearse=options.rehearse),
            saved=lambda document: write_page(document, out),
        )
        failed = any(step["status"] != "done" for step in document["steps"])
    except KeyboardInterrupt:
        failed = True
    print((out / PAGE).read_text())
    print(f"written: {out / DOCUMENT}, {out / PAGE}, {out / LOG}")
    return int(failed)


def _stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def head(*, rehearse: bool) -> dict[str, Any]:
    """Return what a document begins with."""
    return {
        "command": shlex.join(["python", "-m", "fastvq.bench.gpu", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "fastvq": fastvq.__version__,
        "rehearsal": rehearse,
    }


def write_page(document: dict[str, Any], out: Path) -> None:
    """Write the page of a document beside it."""
    write_whole(out / PAGE, report.page(document))


def default_work(root: Path, out: Path) -> Path:
    """Return build/gpu of the source tree, or a folder in `out` where the tree is read-only."""
    folder = root / "build" / "gpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return out / "work"


def keep_earlier(out: Path) -> None:
    """Rename the results of an earlier run, which this one would replace."""
    number = 1
    while any(_numbered(out / name, number).exists() for name in (DOCUMENT, PAGE, LOG)):
        number += 1
    for name in (DOCUMENT, PAGE, LOG):
        if (out / name).exists():
            (out / name).rename(_numbered(out / name, number))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def launcher(out: Path, work: Path, *, rehearse: bool) -> InProcess:
    """Return what starts the steps, with all caches in `work`; those before the build import the source tree itself."""
    site = work / SITE

    def command(name: str, seconds: float, results: Path) -> list[str]:
        options = ["--results", results, "--seconds", seconds, "--root", ROOT, "--work", work]
        options += ["--device", "cpu", "--tiny"] if rehearse else []
        return python("-m", "fastvq.bench.gpu.step", name, *map(str, options))

    def environment(name: str) -> dict[str, str]:
        caches = {
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "CUDA_CACHE_PATH": "cuda",
            "XDG_CACHE_HOME": "other",
            "TMPDIR": "temporary",
        }
        found = os.environ | {variable: str(work / "cache" / folder) for variable, folder in caches.items()}
        Path(found["TMPDIR"]).mkdir(parents=True, exist_ok=True)
        found |= {"PYTHONPATH": str(site if (site / "fastvq").exists() and name != "build" else ROOT)}
        found |= {"PYTHONDONTWRITEBYTECODE": "1"}
        return found | ({"TRITON_INTERPRET": "1"} if rehearse else {})

    return InProcess(command, environment, work, out / LOG)


if __name__ == "__main__":
    sys.exit(main())
