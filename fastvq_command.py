"""The console script `fastvq`.

It stands beside the package, so that `fastvq` knows from its presence that this process is a command line: `fastvq
--help` then answers without importing torch, which takes two seconds.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    from fastvq.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
