"""Entry point of the command line: the parser, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn, TextIO

import fastvq
from fastvq.errors import ConfigError, FastvqError
from fastvq.extras import without_progress

from . import (
    FAILED,
    INTERRUPTED,
    UNREAD,
    bench,
    contrast,
    data,
    decode,
    demo,
    encode,
    evaluate,
    export,
    info,
    prior,
    reconstruct,
    runs,
    sample,
    tokenize,
    train,
)

COMMANDS: dict[str, ModuleType] = {
    "info": info,
    "data": data,
    "train": train,
    "reconstruct": reconstruct,
    "prior": prior,
    "contrast": contrast,
    "sample": sample,
    "evaluate": evaluate,
    "runs": runs,
    "export": export,
    "encode": encode,
    "decode": decode,
    "tokenize": tokenize,
    "demo": demo,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after an invalid request, 130 after Ctrl-C, 141 unread."""
    arguments = _hyphenated(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    _refuse_empty(arguments)
    try:
        several = options.run is not info.run and _ranks(options.run)
        with _warnings_in_one_line(), without_progress(options.quiet):
            # The parser needs neither the ops nor torch.
            _load_ops()
            status = _run_as_rank(options) if several else options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as `head`, has ended; nothing more can be said to it, also not at the interpreter's end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (FastvqError, OSError, FloatingPointError) as error:
        print(f"fastvq: {_with_options(_text(error), options.named)}", file=sys.stderr)
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print("fastvq: out of memory: try smaller settings, such as a smaller batch or model", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nfastvq: interrupted", file=sys.stderr)
        return INTERRUPTED


def _hyphenated(arguments: Sequence[str]) -> list[str]:
    """Return arguments with hyphens in the names of options, which may be typed with underscores as in Python."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), argument) for argument in arguments[:end]]
    return [*options, *arguments[end:]]


def _refuse_empty(arguments: Sequence[str]) -> None:
    """End the process with an error if an argument is empty, as a shell variable without a value leaves it.

    An empty path would be the working directory.
    """
    before = ""
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if not argument or (argument.startswith("--") and sign and not value):
            name = name or (before if before.startswith("--") else "")
            _parser().error(f"argument {name}: must not be empty" if name else "arguments must not be empty")
        before = argument


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory is used up; torch's CPU allocator raises a mere RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )


_TOGETHER = (train.run, prior.run, evaluate.run, encode.run, tokenize.run)
"""Commands that several processes can run together."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "SLURM_STEP_NUM_TASKS": "srun"}
"""Variables in which other launchers give the number of processes."""


def _ranks(run: Callable[[argparse.Namespace], int]) -> bool:
    """Return whether this is one of several processes that torchrun has started.

    Raises:
        ConfigError: the command runs in one process, or another launcher has started several.
    """
    sizes = {name: int(value) for name, value in os.environ.items() if value.isdecimal()}
    if max(sizes.get("WORLD_SIZE", 1), sizes.get("RANK", 0) + 1) > 1:
        variable = "WORLD_SIZE" if sizes.get("WORLD_SIZE", 1) > 1 else "RANK"
        if run not in _TOGETHER:
            raise ConfigError(
                f"one process runs this command, but {variable}={sizes[variable]} says that this is one of several:"
                f" start it without torchrun, or unset {variable}"
            )
        missing = [name for name in _TORCHRUN if name not in os.environ]
        if missing:
            raise ConfigError(
                f"{variable}={sizes[variable]} says that this is one of several processes, but {', '.join(missing)} is"
                " missing: start them by torchrun"
            )
        return True
    for variable, launcher in _LAUNCHERS.items():
        if sizes.get(variable, 1) > 1:
            raise ConfigError(
                f"{launcher} has started {sizes[variable]} processes ({variable}), each of which would do the whole"
                " work: start them by torchrun"
            )
    return False


def _run_as_rank(options: argparse.Namespace) -> int:
    """Run a command as one of several processes; rank 0 alone prints."""
    from fastvq.training import ranks

    with ranks.process_group():
        if ranks.leads():
            return int(options.run(options))
        with contextlib.redirect_stdout(io.StringIO()):
            return int(options.run(options))


def _load_ops() -> None:
    """Import the ops, which reads the environment variables.

    Raises:
        ConfigError: a variable has a value that it may not have.
    """
    try:
        importlib.import_module("fastvq.ops")
    except ValueError as error:
        raise ConfigError(str(error)) from None


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _CommandParser(_Parser):
    """Parser of one command, which gets its options when it is first used: they may need imports.

    Options may stand before, between and after the files.
    """

    def __init__(self, *, command: ModuleType, **settings: Any) -> None:
        super().__init__(**settings)
        self._command: ModuleType | None = command
        self._take_more = getattr(command, "take_more_options", None)
        self._within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._command is not None:
            self._command.add_options(self)
            self.add_argument(
                "--quiet", action="store_true", help="show no progress; results, warnings and errors remain"
            )
            self.set_defaults(run=self._command.run, named=self._named())
            self._command = None
        if self._within:
            return super().parse_known_args(args, namespace)
        self._within = True
        try:
            options, more = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False
        return options, self._take_more(options, more) if self._take_more and more else more

    def _named(self) -> dict[str, str]:
        """Return {name of an argument of a function: its option} of all options."""
        named = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        return {name: option for name, option in named.items() if name != "help"}


def _with_options(message: str, named: dict[str, str]) -> str:
    """Return an error's message with options in place of the names of arguments.

    A name of one word may be an ordinary word: it stands for the option only where the message begins with it, or with
    another one "and" it.
    """
    for name, option in named.items():
        if "_" in name:
            message = re.sub(rf"(?<![\w./-]){name}(?![\w./-])", option, message)
        else:
            message = re.sub(rf"^((?:--[\w-]+ and )?){name}(?=:? )", rf"\g<1>{option}", message)
    return message


def _text(error: Exception) -> str:
    """Return an error's message; that of the operating system as "PATH: reason"."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print fastvq's own warnings like its errors, without the line of code that they come from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename.startswith(fastvq.__path__[0]):
            print(f"fastvq: warning: {message}", file=sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastvq", description="Exact vector quantization for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {fastvq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, command in COMMANDS.items():
        commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[:1].upper()}{command.SUMMARY[1:]}.",
            command=command,
        )
    return parser
