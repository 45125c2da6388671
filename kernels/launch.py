"""Launch configurations: data, by architecture and shape, a choice among them, and a measured choice on request.

These have not been timed on a GPU yet. They compile without spilling, fit the shared memory of every target and have
the fewest instructions for each distance (`python -m fastvq.kernels.aot`). FASTVQ_AUTOTUNE=1 in the environment times
the candidates for a shape the first time it occurs, which takes seconds, and keeps the fastest in a file; without it
nothing is ever timed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvq.backends import environment
from fastvq.files import write_whole


@dataclasses.dataclass(frozen=True)
class Scan:
    """Configuration of the scan: rows and codes of a tile, and columns taken at once.

    `paired` keeps two neighboring codes as one, which saves half an instruction a distance and costs two distances a
    row.
    """

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int
    paired: bool


@dataclasses.dataclass(frozen=True)
class Define:
    """Launch of the definition: the most programs, each with a row at a time, and codes and columns taken at once."""

    programs: int
    block_k: int
    block_d: int
    num_warps: int


# (terms, packed columns up to): the configuration, for each architecture. Rows of more columns than block_d are taken
# in parts, which the scan reads again for each tile of codes.
SCANS: dict[str, dict[tuple[int, int], Scan]] = {
    "sm_80": {
        (1, 16): Scan(128, 128, 16, 4, 3, True),
        (1, 32): Scan(128, 128, 32, 8, 3, True),
        (1, 64): Scan(128, 128, 64, 8, 3, True),
        (1, 128): Scan(128, 128, 128, 8, 2, True),
        (1, 256): Scan(128, 128, 256, 8, 2, True),
        (1, 1 << 30): Scan(128, 128, 64, 8, 3, True),
        (3, 16): Scan(64, 64, 16, 4, 2, False),
        (3, 32): Scan(64, 64, 32, 4, 2, False),
        (3, 64): Scan(64, 64, 64, 4, 2, False),
        (3, 1 << 30): Scan(64, 64, 32, 4, 2, False),
    },
}
SCANS["sm_90"] = SCANS["sm_80"]
SCANS["sm_100"] = SCANS["sm_80"] | {
    (1, 64): Scan(128, 128, 64, 4, 3, True),
    (1, 128): Scan(128, 128, 128, 4, 2, True),
    (3, 1 << 30): Scan(64, 64, 64, 8, 2, False),
}
# 99 KiB of shared memory: GeForce and the like, of Ampere, Ada and Blackwell.
SCANS["sm_86"] = SCANS["sm_80"] | {
    (1, 16): Scan(128, 128, 16, 4, 2, True),
    (1, 256): Scan(128, 128, 64, 8, 3, True),
}
# 64 KiB of shared memory.
SCANS["gfx942"] = SCANS["sm_80"] | {
    (1, 16): Scan(128, 128, 16, 8, 3, True),
    (1, 256): Scan(128, 128, 64, 8, 3, True),
}
SCANS["gfx1100"] = {key: dataclasses.replace(scan, block_n=64) for key, scan in SCANS["gfx942"].items()}
# Small tiles, so that small tests have several.
SCANS["interpreter"] = {key: dataclasses.replace(scan, block_n=64, block_k=32) for key, scan in SCANS["sm_80"].items()}

DEFINE = Define(programs=1024, block_k=64, block_d=32, num_warps=4)

LONGEST_SPLIT = 32
"""The largest number of programs that share the codes of a search with few rows."""


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the key of `SCANS` for a device."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "gfx942" if name.startswith("gfx9") else "gfx1100"
    capability = torch.cuda.get_device_capability(device)
    # Beside those of data centers all have the matrix instructions of Ampere, and less shared memory.
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "sm_86")


def scan(device: torch.device, columns: int, terms: int) -> Scan:
    """Return the configuration for codes of `columns` packed columns, in one or three products."""
    table = SCANS[architecture(device)]
    return next(config for (n, most), config in table.items() if n == terms and columns <= most)


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def splits(device: torch.device, blocks: int, tiles: int) -> int:
    """Among how many programs the codes are shared out, where `blocks` of rows alone don't fill the device twice."""
    wanted = -(-2 * _processors(device) // max(1, blocks))
    return max(1, min(wanted, tiles, LONGEST_SPLIT))


def root_of(dim: int) -> int:
    """Return the smallest r with 2^r >= sqrt(D)."""
    return ((dim - 1).bit_length() + 1) // 2


def autotuning(device: torch.device) -> bool:
    """Return whether to time candidates: on request, on a GPU, and not while a CUDA graph is captured."""
    asked = environment.setting("FASTVQ_AUTOTUNE") == "1"
    return asked and device.type != "cpu" and not torch.cuda.is_current_stream_capturing()


def cache_file() -> Path:
    """Return the path of the file that keeps measured configurations."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastvq" / "launch.json"


def tuned(key: str, default: Scan, seconds: Callable[[Scan], float]) -> Scan:
    """Return the fastest of the candidates around `default` for `key`.

    It comes from the file, or is timed by `seconds` and written there. A candidate that does not compile or does not
    fit counts as infinitely slow. What the file holds for `key` is used only if it is one of the candidates.
    """
    path = cache_file()
    known = _read(path)
    if key in known:
        for candidate in candidates(default):
            if _same(known[key], candidate):
                return candidate
        _warn(f"{path}: the entry {key!r} is none of the configurations that may stand there; it is timed again")
    times: dict[Scan, float] = {}
    for candidate in candidates(default):
        try:
            times[candidate] = seconds(candidate)
        except Exception as error:
            if candidate == default:
                raise
            _warn(f"{candidate} can't run here: {error}")
    fastest = min(times, key=lambda candidate: times[candidate])
    known[key] = dataclasses.asdict(fastest)
    try:
        _write(path, known)
    except OSError as error:
        _warn(f"{path} cannot be written, so that the next process times again: {error}")
    return fastest


def _same(entry: Any, candidate: Scan) -> bool:
    """Return whether an entry of the file is this configuration, with the same types: JSON has true == 1 == 1.0."""
    fields = dataclasses.asdict(candidate)
    return isinstance(entry, dict) and entry == fields and all(type(entry[k]) is type(v) for k, v in fields.items())


def candidates(default: Scan) -> list[Scan]:
    """Return the configurations that autotuning tries, the default first.

    Block sizes stay divisors of 256, to which codes are padded.
    """
    changes = ({}, {"paired": not default.paired}, {"num_stages": 2}, {"num_stages": 4}, {"block_k": 64},
               {"block_n": 64, "num_warps": 4}, {"block_n": 256}, {"block_k": 256})  # fmt: skip
    return list(dict.fromkeys(dataclasses.replace(default, **change) for change in changes))


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn(f"{path} cannot be read, and is written anew: {str(error) or type(error).__name__}")
        return {}
    if not isinstance(known, dict):
        _warn(f"{path} holds no launch configurations, and is written anew")
        return {}
    return known


def _write(path: Path, known: dict[str, Any]) -> None:
    write_whole(path, json.dumps(known, indent=1, sort_keys=True) + "\n")


def _warn(message: str) -> None:
    warnings.warn(f"fastvq: {message}", stacklevel=3)
