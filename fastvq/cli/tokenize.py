"""`fastvq tokenize`: a whole data set as arrays of indices."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_skip_unreadable, refuse_without_effect

SUMMARY = "write the indices of a whole data set as sharded arrays"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Writes the indices of all files of a data set as .npy arrays with a manifest, to train other models on them."
        " The same command continues what was interrupted. Under torchrun each process writes its share."
    )
    parser.add_argument("data", metavar="DATA", help="a folder of files, tar shards, or a data set's name")
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", dest="run_folder", help="the run whose model encodes"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--shard-files", type=int, default=1000, metavar="N", help="files in an array (default: 1000); a tar is one"
    )
    parser.add_argument("--workers", type=int, help="processes that read files (default: 0)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    add_skip_unreadable(parser)


def run(options: argparse.Namespace) -> int:
    """Write the arrays."""
    from fastvq.data import DATA_SETS
    from fastvq.runs.tokenize import tokenize

    if options.data in DATA_SETS:
        refuse_without_effect(options, ("skip_unreadable", "workers"), f"on the data set {options.data}")
    given = {name: getattr(options, name) for name in ("shard_files", "skip_unreadable", "device")}
    given["workers"] = options.workers or 0
    print("\n".join(tokenize(options.run_folder, options.data, options.out, **given)))
    return 0
