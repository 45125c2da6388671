"""`fastvq info`: the backends, and why one is unavailable."""

from __future__ import annotations

import argparse
import json

SUMMARY = "show which backends are available, and why others are not"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the backends of this installation."""
    from fastvq.backends import select

    info = select.info()
    print(json.dumps(info, indent=2) if options.json else select.format_info(info))
    return 0
