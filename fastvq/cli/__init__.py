"""Command line of fastvq: one module for each command.

Each has `SUMMARY`, a line for `fastvq --help`; `add_options`, which is called only when the command is used; and `run`,
which returns the exit status. What a command needs is imported in these functions, so that `fastvq info` imports no
model and `fastvq --help` no command's dependencies.
"""

from __future__ import annotations

FAILED = 2
"""Exit status after an invalid request."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""
UNREAD = 141
"""Exit status when nobody reads the output any more, as shells report it."""
