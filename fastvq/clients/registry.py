"""The adapters of all projects, in the order in which they are tried."""

from __future__ import annotations

from . import averaged, dac, encodec, peer, pyramid, recommender, vqgan
from .adapter import ClientAdapter

ADAPTERS: tuple[ClientAdapter, ...] = tuple(
    adapter for family in (encodec, dac, vqgan, pyramid, averaged, recommender, peer) for adapter in family.ADAPTERS
)
