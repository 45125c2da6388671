"""Checks of the native library on each instruction set and tier, in forks of one process.

    python -m tests.instruction_sets MODULE:FUNCTION ISA:TIER ...

The library reads FASTVQ_ISA and FASTVQ_TIER when it is loaded. The process imports torch and calls the function, which
prepares data and returns a check; each fork then loads the library for one setting and runs the check.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIERS = {
    "portable": ["", "direct", "float32", "int8", "projected"],
    "avx2": ["", "direct", "float32", "int16", "int8", "projected"],
    "avx512": ["", "direct", "float32", "int8", "projected"],
    "avx512_vnni": ["", "direct", "float32", "int16", "int8", "projected"],
}
WORDS = {
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f"},
    "avx512_vnni": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
}
"""Words in /proc/cpuinfo that an instruction set requires."""


def missing(isa: str) -> str:
    """Return why an instruction set cannot be checked here, or an empty string."""
    from fastvq.backends import native

    record = native.build_record()
    if not record["built"] or isa not in record["instruction_sets"]:
        return f"{isa}: not in this build of the native library"
    return "" if WORDS[isa] <= set(Path("/proc/cpuinfo").read_text().split()) else f"{isa}: this processor lacks it"


class Outcomes:
    """Results of a check on each setting that can be checked here."""

    def __init__(self, check: str, settings: list[tuple[str, str]]) -> None:
        served = [f"{isa}:{tier}" for isa, tier in settings if not missing(isa)]
        command = [sys.executable, "-m", "tests.instruction_sets", check, *served]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, timeout=600, check=True)
        self.found = json.loads(done.stdout)

    def assert_right(self, isa: str, tier: str = "") -> None:
        """Fail unless the check ran on this setting and found nothing; skip where it cannot run."""
        if reason := missing(isa):
            pytest.skip(reason)
        assert self.found[f"{isa}:{tier}"] == {"isa": isa, "wrong": []}


def outcome(check: Callable[[], list[str]], isa: str, tier: str) -> dict[str, object]:
    """Return what a check finds in a fork with these settings."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ |= {"FASTVQ_ISA": isa, "FASTVQ_TIER": tier}
        try:
            from fastvq.backends import native

            found = {"isa": native.instruction_set(), "wrong": check()}
        except BaseException:
            found = {"isa": isa, "wrong": [traceback.format_exc()]}
        with open(writer, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if status == 0 else {"isa": isa, "wrong": [f"ended with status {status}"]}


def main(check: str, *settings: str) -> None:
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    module, _, function = check.partition(":")
    prepared = getattr(importlib.import_module(module), function)()
    print(json.dumps({setting: outcome(prepared, *setting.split(":")) for setting in settings}))


if __name__ == "__main__":
    main(*sys.argv[1:])
