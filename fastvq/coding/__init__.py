"""Indices to bytes and back: `encode` and `decode`, for files that decode to the same indices on every machine.

    indices -- tree.py: binary decisions --> models.py, learned.py: integer probabilities --> stream.py: range coder
            -- container.py: shape, codebook size, fingerprint of the model, digest --> bytes

docs/coding.md states what is guaranteed and why. Requires `pip install "fastvq-torch[coding]"`.
"""

from __future__ import annotations

from fastvq.errors import CodingError

from .codec import MAX_DECISIONS, MAX_INDICES, MAX_INDICES_PER_BYTE, Limits, decode, encode, load, measure, save
from .container import MODELS, Header, fingerprint, read_header
from .learned import prior_fingerprint

__all__ = [
    "MAX_DECISIONS",
    "MAX_INDICES",
    "MAX_INDICES_PER_BYTE",
    "MODELS",
    "CodingError",
    "Header",
    "Limits",
    "decode",
    "encode",
    "fingerprint",
    "load",
    "measure",
    "prior_fingerprint",
    "read_header",
    "save",
]
