"""`fastvq demo`: everything on shipped data, with a page of results."""

from __future__ import annotations

import argparse
import importlib
import inspect
import shlex
from pathlib import Path

from fastvq.errors import ConfigError

from . import INTERRUPTED

SUMMARY = "train on shipped data and show the results on a page"
_STEPS = {
    "steps": "training steps of the VQ-VAE",
    "prior_steps": "of the prior",
    "ceiling_steps": "of the network without a bottleneck",
    "contrastive_steps": "of the contrastive models that rank and judge samples",
    "classifier_steps": "of the classifier that judges samples",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    from fastvq.demo import DEMOS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, DEMOS))
    parser.epilog = "\n".join(["demos:", *(f"  {name:{width}}  {text}" for name, text in DEMOS.items())])
    parser.add_argument(
        "name",
        nargs="?",
        choices=DEMOS,
        default=next(iter(DEMOS)),
        metavar="NAME",
        help=f"default: {next(iter(DEMOS))}",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/demo, or runs/demo-NAME for another than the first"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the demo in DIR; a finished one is kept in DIR/earlier until this one is finished",
    )
    for name, text in _STEPS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the demo."""
    from fastvq.demo import DEMOS

    run_demo = importlib.import_module(f"fastvq.demo.{options.name}").run_demo
    first = options.name == next(iter(DEMOS))
    out = options.out or Path("runs/demo" if first else f"runs/demo-{options.name}")
    given = {name: getattr(options, name) for name in _STEPS if getattr(options, name) is not None}
    for name in given:
        if name not in inspect.signature(run_demo).parameters:
            raise ConfigError(f"{name}: the demo {options.name} has no such steps, got {given[name]}")
    metrics = run_demo(out, resume=options.resume, overwrite=options.overwrite, **given)
    if metrics is None:
        steps = "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())
        name = "" if first else f" {options.name}"
        again = f"fastvq demo{name} --out {shlex.quote(str(out))} --resume{steps}"
        print(f"stopped, saved; continue with: {again}")
        return INTERRUPTED
    return 0
