"""Entry point of `python -m fastvq`, the same as the command `fastvq`."""

from __future__ import annotations

import sys

from fastvq.cli.main import main

sys.exit(main())
