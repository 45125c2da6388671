"""Entry point of the command line: the parser, and errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import fastvq
from fastvq.errors import FastvqError

from . import FAILED, INTERRUPTED, bench, decode, demo, encode, info, prior, reconstruct, sample, train

COMMANDS: dict[str, ModuleType] = {
    "info": info,
    "train": train,
    "reconstruct": reconstruct,
    "prior": prior,
    "sample": sample,
    "encode": encode,
    "decode": decode,
    "demo": demo,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after an invalid request, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (FastvqError, OSError, FloatingPointError) as error:
        print(f"fastvq: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nfastvq: interrupted", file=sys.stderr)
        return INTERRUPTED


class _CommandParser(argparse.ArgumentParser):
    """Parser of one command, which gets its options when it is first used: they may need imports."""

    def __init__(self, *, command: ModuleType, **settings: Any) -> None:
        super().__init__(**settings)
        self._command: ModuleType | None = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._command is not None:
            self._command.add_options(self)
            self.set_defaults(run=self._command.run)
            self._command = None
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvq", description="Exact vector quantization for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {fastvq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.SUMMARY, command=command)
    return parser
