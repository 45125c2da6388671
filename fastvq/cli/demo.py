"""`fastvq demo`: everything on the shipped images, with a page of results."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from . import INTERRUPTED

SUMMARY = "train on the shipped images and show the results on a page"
_STEPS = ("steps", "ceiling_steps", "prior_steps", "classifier_steps")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the demo in DIR; a finished one is kept in DIR/earlier until this one is finished",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of the VQ-VAE")
    parser.add_argument("--ceiling-steps", type=int, metavar="N", help="of the network without a bottleneck")
    parser.add_argument("--prior-steps", type=int, metavar="N", help="of the prior")
    parser.add_argument("--classifier-steps", type=int, metavar="N", help="of the classifier that judges samples")


def run(options: argparse.Namespace) -> int:
    """Run the demo."""
    from fastvq.demo.run import DEMO, DEMO_PRIOR, run_demo

    config, prior_config = DEMO, DEMO_PRIOR
    given = {name: getattr(options, name) for name in _STEPS if getattr(options, name) is not None}
    others = dict(given)
    if "steps" in given:
        config = dataclasses.replace(config, steps=others.pop("steps"))
    if "prior_steps" in given:
        prior_config = dataclasses.replace(prior_config, steps=others.pop("prior_steps"))
    metrics = run_demo(
        options.out,
        config=config,
        prior_config=prior_config,
        resume=options.resume,
        overwrite=options.overwrite,
        **others,
    )
    if metrics is None:
        again = "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())
        print(f"stopped, saved; continue with: fastvq demo --out {shlex.quote(str(options.out))} --resume{again}")
        return INTERRUPTED
    return 0
