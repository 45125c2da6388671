"""`fastvq reconstruct`: images beside their reconstructions by a run's model."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_data, add_skip_unreadable, check_sources, refuse_without_effect

SUMMARY = "draw images or other data beside their reconstructions by a trained model"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("sources", nargs="*", metavar="IN", help="files and folders of files; default: --held-out")
    parser.add_argument("--held-out", action="store_true", help="the run's held-out examples")
    parser.add_argument(
        "--out", required=True, metavar="OUT", help="picture to write: .png, .pdf, .svg, .jpg, .tif or .webp"
    )
    add_data(parser)
    add_skip_unreadable(parser)


def run(options: argparse.Namespace) -> int:
    """Draw files beside their reconstructions, and print their quality."""
    from fastvq.runs.reconstruct import reconstruct_files, reconstruct_held_out

    check_sources(options.sources, held_out=options.held_out, data=options.data)
    if options.sources:
        skip = options.skip_unreadable
        lines = reconstruct_files(options.run_folder, options.sources, options.out, skip_unreadable=skip)
    else:
        refuse_without_effect(options, ("skip_unreadable",), "with --held-out")
        lines = reconstruct_held_out(options.run_folder, options.out, data=options.data)
    print("\n".join([*lines, f"picture: {options.out}"]))
    return 0
