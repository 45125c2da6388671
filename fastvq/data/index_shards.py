"""Arrays of indices that `fastvq tokenize` has written, as one data set."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvq.errors import DataError
from fastvq.files import StrPath

MANIFEST = "manifest.json"
_SHARD = re.compile(r"shard-[0-9]{6,}\.npy")


class IndexShards(Dataset[Tensor]):
    """The indices of all examples in a folder that `fastvq tokenize` has written.

    The arrays are mapped: only what is asked for is read.

    Args:
        folder: the folder.
        verify: compare each array with its SHA-256, which reads all of them once; names are always compared.

    Attributes:
        manifest: what the folder holds: the fingerprint of the model, `codebook_sizes`, `grid`, and the shards.
        names: the name of each example: its file, and its number where a file has several.
        class_names: the name of each example's class, or None.
        captions: the text of each example, or None.

    Raises:
        DataError: there is no such folder, it is unfinished, or an array is damaged; the message names it.
    """

    def __init__(self, folder: StrPath, *, verify: bool = True) -> None:
        folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
            complete = self.manifest["complete"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no indices of fastvq tokenize: {error}") from error
        if not complete:
            raise DataError(f"{folder} is unfinished: the same fastvq tokenize continues")
        self.names: list[str] = []
        self.class_names: list[str | None] = []
        self.captions: list[str | None] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        try:
            for shard in self.manifest["shards"]:
                self._take(folder, shard, verify=verify)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is damaged: {error}") from error
        self._ends = list(itertools.accumulate(map(len, self._arrays)))

    def _take(self, folder: Path, shard: dict[str, Any], *, verify: bool) -> None:
        """Add a shard, as the manifest describes it.

        Raises:
            DataError: it is damaged. OSError, ValueError, KeyError, TypeError: it is not there, or something else.
        """
        if not _SHARD.fullmatch(shard["file"]):
            raise ValueError(f"{MANIFEST} names {shard['file']!r}")
        path = folder / shard["file"]
        described = json.loads(path.with_suffix(".json").read_bytes())
        if verify and digest_of_file(path) != shard["sha256"]:
            raise DataError(f"{path} is damaged: it does not match its SHA-256")
        if described["seal"] != shard["seal"] or seal_of(described) != shard["seal"]:
            raise DataError(f"{path.with_suffix('.json')} is damaged: it does not match its SHA-256")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(array) != shard["examples"]:
            raise DataError(f"{path} is damaged: it has {len(array)} examples, not {shard['examples']}")
        self._arrays.append(array)
        self.names += described["names"]
        self.class_names += described["class_names"]
        self.captions += described["captions"]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Tensor:
        """Return the indices (*grid) of an example, int64."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must lie in [{-len(self)}, {len(self)}), got {row}")
        row %= len(self)
        shard = bisect.bisect_right(self._ends, row)
        first = self._ends[shard - 1] if shard else 0
        return torch.from_numpy(self._arrays[shard][row - first].astype(np.int64))


def seal_of(described: dict[str, Any]) -> str:
    """Return the SHA-256 of the description of a shard, its own seal left out."""
    rest = {name: value for name, value in described.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: StrPath) -> str:
    """Return the SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
