"""The file format around the coded decisions.

    4 bytes   "FVQ" and 0x1a         1  number of axes, 1 to 8
    1         version, 1             8  fingerprint of the model, or zeros
    1         index of the coder     4  codebook size
    1         1 if there is a -1     4  for each axis, its length
    17        with a prior only: 1 if samples have labels, 8 fingerprint of the prior, 8 BLAKE2b of the indices
    ...       the range coder's 32-bit words
    8         BLAKE2b of all bytes before

Numbers are little-endian and unsigned.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import NamedTuple

import torch
from torch import nn

from fastvq.errors import CodingError

from . import tree
from .models import LEAST_BITS

MODELS = ("static", "adaptive", "prior")
MAGIC, VERSION = b"FVQ\x1a", 1
LARGEST_CODEBOOK = 1 << 24
_HEAD = struct.Struct("<4sBBBB8sI")
_PRIOR = struct.Struct("<B8s8s")
_DIGEST = 8
_AXES = 8


class PriorHeader(NamedTuple):
    """The part of a header that files coded with a prior have."""

    labeled: bool
    fingerprint: bytes  # 8 bytes
    digest: bytes  # 8 bytes of BLAKE2b of the symbols as little-endian int64


class Header(NamedTuple):
    """The description that a file begins with."""

    model: str
    missing: bool  # whether -1 may occur
    codebook_size: int
    shape: tuple[int, ...]
    fingerprint: bytes  # 8 bytes, zeros for none
    prior: PriorHeader | None = None

    @property
    def number(self) -> int:
        """Number of indices."""
        return math.prod(self.shape)

    @property
    def alphabet(self) -> int:
        """Number of symbols: the indices in [0, K), preceded by -1 where it may occur."""
        return self.codebook_size + self.missing


def pack(header: Header, words: bytes) -> bytes:
    """Return the bytes of a file with this header and these coded words."""
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        MODELS.index(header.model),
        header.missing,
        len(header.shape),
        header.fingerprint,
        header.codebook_size,
    )
    body = head + struct.pack(f"<{len(header.shape)}I", *header.shape)
    if header.prior is not None:
        body += _PRIOR.pack(*header.prior)
    body += words
    return body + digest(body)


def digest(body: bytes) -> bytes:
    """Return 8 bytes of BLAKE2b."""
    return hashlib.blake2b(body, digest_size=_DIGEST).digest()


def read_header(data: bytes) -> Header:
    """Return the header of encoded data without decoding them.

    Raises:
        CodingError: the data are damaged, or of another kind or version.
    """
    return unpack(data)[0]


def unpack(data: bytes) -> tuple[Header, bytes]:
    """Return (header, words) of data after validating both."""
    if data[: len(MAGIC)] != MAGIC:
        raise CodingError("not a file of fastvq indices: it doesn't begin with FVQ")
    if len(data) < _HEAD.size + _DIGEST:
        raise CodingError(f"truncated: {len(data)} bytes are less than a header")
    _, version, model, missing, axes, fingerprint, codebook_size = _HEAD.unpack_from(data)
    if version != VERSION:
        raise CodingError(f"written in version {version} of the format; this fastvq reads version {VERSION}")
    body, expected = data[:-_DIGEST], data[-_DIGEST:]
    if digest(body) != expected:
        raise CodingError("damaged or truncated: the digest at the end doesn't match the bytes before it")
    learned = model < len(MODELS) and MODELS[model] == "prior"
    start = _HEAD.size + 4 * axes + learned * _PRIOR.size
    if model >= len(MODELS) or missing + learned > 1 or not 1 <= axes <= _AXES or start > len(body):
        raise CodingError(f"invalid header: model {model}, flag {missing}, {axes} axes")
    shape = struct.unpack_from(f"<{axes}I", body, _HEAD.size)
    prior = None
    if learned:
        labeled, prior_fingerprint, symbols_digest = _PRIOR.unpack_from(body, start - _PRIOR.size)
        prior = PriorHeader(bool(labeled), prior_fingerprint, symbols_digest)
    header = Header(MODELS[model], bool(missing), codebook_size, shape, fingerprint, prior)
    if not 1 <= codebook_size <= LARGEST_CODEBOOK:
        raise CodingError(f"a codebook of {codebook_size} codes; it may have 1 to {LARGEST_CODEBOOK}")
    if math.prod(max(1, length) for length in shape) >= 1 << 60:
        raise CodingError(f"invalid shape: {shape}")
    words = body[start:]
    if len(words) % 4:
        raise CodingError(f"{len(words)} bytes of coded data are not whole 32-bit words")
    # A decision costs at least LEAST_BITS; the coder may omit up to two trailing words.
    if header.number * tree.depths(header.alphabet) * LEAST_BITS > 8 * (len(words) + 8):
        raise CodingError(f"{header.number} indices are more than {len(words)} bytes of coded data can hold")
    return header, words


def fingerprint(model: nn.Module) -> bytes:
    """Return 8 bytes that identify a model: BLAKE2b of its parameters and buffers, by name, dtype, shape and value.

    Fingerprint the part that turns indices into data: codebooks and decoder, or the whole model.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
