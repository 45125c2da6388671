"""Launch configurations: data, by architecture and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scan:
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Define:
    programs: int
    block_k: int
    num_warps: int


def scan(device: torch.device, terms: int, columns: int) -> Scan:
    return Scan(64, 32, 4, 2)


def define(device: torch.device) -> Define:
    return Define(64, 64, 4)


def splits(device: torch.device, blocks: int, tiles: int, n: int, *, listed: bool) -> int:
    return 1
