"""`fastvq decode`: a coded file back to images, or to an array of indices."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.errors import CodingError

SUMMARY = "decode a file to images or other examples, or to an array of indices"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("source", type=Path, metavar="IN.fvq", help="the coded file")
    parser.add_argument(
        "out",
        metavar="OUT",
        help="a new folder for images or other examples; .png or the like for a single one; .flac, .mp4 or the like for"
        " all clips one after the other; .npy for indices",
    )
    parser.add_argument("--run", type=Path, metavar="DIR", dest="run_folder", help="the run whose model decodes")
    limits = parser.add_argument_group("limits of what a file from anywhere may cost")
    limits.add_argument("--max-indices", type=int, metavar="N", help="refuse a file of more (default: 4194304)")
    limits.add_argument(
        "--max-decisions", type=int, metavar="N", help="refuse a file of more binary decisions (default: 33554432)"
    )
    limits.add_argument(
        "--max-indices-per-byte", type=int, metavar="N", help="refuse a large file of more (default: 4096)"
    )


def run(options: argparse.Namespace) -> int:
    """Decode a file to images or to an array."""
    from fastvq.coding import Limits
    from fastvq.runs.decode import decode_array, decode_examples

    given = {name: getattr(options, name) for name in Limits._fields if getattr(options, name) is not None}
    limits = Limits(**given)
    if Path(options.out).suffix.lower() == ".npy":
        lines = decode_array(options.source, options.out, run=options.run_folder, limits=limits)
    elif options.run_folder is None:
        raise CodingError("--run: needed to decode examples, by the model of that run; for indices, OUT ends in .npy")
    else:
        lines = decode_examples(options.run_folder, options.source, options.out, limits=limits)
    print("\n".join(lines))
    return 0
