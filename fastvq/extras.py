"""Optional dependencies: imports on demand, also of the names of a package, and progress by tqdm."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from fastvq.errors import MissingExtraError

T = TypeVar("T")
_DELAY_S, _LINE_S = 1.0, 30.0
"""Time before a bar appears on a terminal, and time between the lines where there is none."""
_shown = True


def require(module: str, extra: str = "train") -> Any:
    """Import and return a module that `pip install "fastvq-torch[EXTRA]"` installs.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'{module.partition(".")[0]} is missing: pip install "fastvq-torch[{extra}]"', name=error.name
        ) from error


def lazy_attributes(
    package: str, homes: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose names are imported when they are first used.

    Args:
        package: the package's `__name__`.
        homes: for each of its modules, the names that the package exports from it. The modules are attributes as well.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in homes:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *home_of})

    return __getattr__, __dir__


@contextlib.contextmanager
def without_progress(quiet: bool = True) -> Iterator[None]:
    """Show no progress in this process until the block ends, if `quiet`."""
    global _shown
    before, _shown = _shown, _shown and not quiet
    try:
        yield
    finally:
        _shown = before


class Progress:
    """Progress of a long call, on stderr, with the time that is left.

    On a terminal it is a bar, which appears after a second. Elsewhere, in a file or a pipe, where the frames of a bar
    would pile up, it is a line every half minute, and one at the end of what took that long or has something to say.

    Args:
        total: number of units.
        unit: what is counted, in the singular.
        initial: number of units that were done before.
        shown: False for no progress; there is none either within `without_progress`.
    """

    def __init__(self, total: int, unit: str, *, initial: int = 0, shown: bool = True) -> None:
        self._total, self._unit, self._done, self._initial, self._text = total, unit, initial, initial, ""
        shown = shown and _shown
        terminal = shown and sys.stderr is not None and sys.stderr.isatty()
        self._lines = shown and not terminal
        self._began = self._line = time.monotonic()
        self._bar: Any = None
        if terminal:
            self._bar = require("tqdm").tqdm(
                total=total, initial=initial, unit=unit, dynamic_ncols=True, delay=_DELAY_S, file=sys.stderr
            )

    def update(self, count: int = 1) -> None:
        """Count units that are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._line >= _LINE_S and self._done < self._total:
            self._print()

    def say(self, text: str) -> None:
        """Show a text beside the number from now on."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and error is None and (self._text or time.monotonic() - self._began >= _LINE_S):
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        spent, self._line = now - self._began, now
        left = ""
        if self._initial < self._done < self._total:
            left = f", {clock(spent / (self._done - self._initial) * (self._total - self._done))} left"
        text = f": {self._text}" if self._text else ""
        print(f"{self._unit} {self._done} of {self._total} after {clock(spent)}{left}{text}", file=sys.stderr)
        sys.stderr.flush()


def tracked(
    items: Iterable[T], total: int, unit: str, *, count: Callable[[T], int] | None = None, shown: bool = True
) -> Iterator[T]:
    """Yield items and show the progress, see `Progress`; `count` says how many units an item is, one by default."""
    with Progress(total, unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.update(1 if count is None else count(item))


def clock(seconds: float) -> str:
    """Return a time as minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
