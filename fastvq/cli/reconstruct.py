"""`fastvq reconstruct`: images beside their reconstructions by a run's model."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "encode and decode images with a trained model"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files; default: held-out images")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")


def run(options: argparse.Namespace) -> int:
    """Draw the images beside their reconstructions, and print their PSNR."""
    from fastvq.runs.reconstruct import reconstruct_files, reconstruct_held_out

    if options.images:
        lines = reconstruct_files(options.run_folder, options.images, options.out)
    else:
        lines = reconstruct_held_out(options.run_folder, options.out)
    print("\n".join([*lines, f"picture: {options.out}"]))
    return 0
