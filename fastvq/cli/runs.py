"""`fastvq runs`: a table of the runs in a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SUMMARY = "list the runs in a folder with their figures"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("folder", type=Path, metavar="DIR", nargs="?", default=Path("runs"), help="default: runs")
    parser.add_argument("--json", action="store_true", help="as JSON, with all digits")


def run(options: argparse.Namespace) -> int:
    """Print the runs."""
    from fastvq.runs.run_list import list_runs, table

    records = list_runs(options.folder)
    print(json.dumps(records, indent=2) if options.json else "\n".join(table(records)))
    return 0
