"""The file format around the coded decisions.

    4 bytes   "FVQ" and 0x1a         1  number of axes, 1 to 8
    1         version, 1 or 2        8  fingerprint of the model, or zeros
    1         index of the coder     4  codebook size, the largest one in version 2
    1         1 if there is a -1     4  for each axis, its length
    4         in version 2, for each element of the last axis, a codebook's size
    17        with a prior only: 1 if samples have labels, 8 fingerprint of the prior, 8 BLAKE2b of the indices
    ...       the range coder's 32-bit words
    8         BLAKE2b of all bytes before

Numbers are little-endian and unsigned.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvq.errors import CodingError

from . import tree
from .models import LEAST_BITS

MODELS = ("static", "adaptive", "prior")
MAGIC, VERSION, STAGED = b"FVQ\x1a", 1, 2
LARGEST_CODEBOOK = 1 << 24
"""Largest number of codes of a codebook, or of several together."""
MOST_CODEBOOKS = 1 << 10
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
    codebook_size: int | tuple[int, ...]  # a tuple: one for each element of the last axis
    shape: tuple[int, ...]
    fingerprint: bytes  # 8 bytes, zeros for none
    prior: PriorHeader | None = None

    @property
    def number(self) -> int:
        """Number of indices."""
        return math.prod(self.shape)

    @property
    def alphabets(self) -> tuple[int, ...]:
        """Numbers of symbols of each codebook: the indices in [0, K), preceded by -1 where it may occur.

        Places of a sample have the codebooks in turn.
        """
        sizes = (self.codebook_size,) if isinstance(self.codebook_size, int) else self.codebook_size
        return tuple(size + self.missing for size in sizes)

    @property
    def decisions(self) -> int:
        """Largest number of binary decisions of all indices."""
        alphabets = self.alphabets
        return self.number // len(alphabets) * sum(map(tree.depths, alphabets))


def pack(header: Header, words: bytes) -> bytes:
    """Return the bytes of a file with this header and these coded words."""
    sizes = () if isinstance(header.codebook_size, int) else header.codebook_size
    head = _HEAD.pack(
        MAGIC,
        STAGED if sizes else VERSION,
        MODELS.index(header.model),
        header.missing,
        len(header.shape),
        header.fingerprint,
        max(sizes) if sizes else header.codebook_size,
    )
    body = head + struct.pack(f"<{len(header.shape) + len(sizes)}I", *header.shape, *sizes)
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
    if version not in (VERSION, STAGED):
        raise CodingError(f"written in version {version} of the format; this fastvq reads versions 1 and 2")
    body, expected = data[:-_DIGEST], data[-_DIGEST:]
    if digest(body) != expected:
        raise CodingError("damaged or truncated: the digest at the end doesn't match the bytes before it")
    learned = model < len(MODELS) and MODELS[model] == "prior"
    start = _HEAD.size + 4 * axes + learned * _PRIOR.size
    if model >= len(MODELS) or missing + learned > 1 or not 1 <= axes <= _AXES or start > len(body):
        raise CodingError(f"invalid header: model {model}, flag {missing}, {axes} axes")
    shape = struct.unpack_from(f"<{axes}I", body, _HEAD.size)
    largest, prior = codebook_size, None
    if version == STAGED:
        start += 4 * shape[-1]
        if not (axes > 1 and 1 <= shape[-1] <= MOST_CODEBOOKS and start <= len(body)):
            raise CodingError(f"invalid header: {shape[-1]} codebooks, at most {MOST_CODEBOOKS}, in {len(body)} bytes")
        codebook_size = struct.unpack_from(f"<{shape[-1]}I", body, _HEAD.size + 4 * axes)
        if largest != max(codebook_size) or min(codebook_size) < 1:
            raise CodingError(f"invalid header: codebooks of {codebook_size} codes, the largest of {largest}")
        largest = sum(codebook_size)
    if learned:
        labeled, prior_fingerprint, symbols_digest = _PRIOR.unpack_from(body, start - _PRIOR.size)
        prior = PriorHeader(bool(labeled), prior_fingerprint, symbols_digest)
    header = Header(MODELS[model], bool(missing), codebook_size, shape, fingerprint, prior)
    if not 1 <= largest <= LARGEST_CODEBOOK:
        raise CodingError(f"a codebook of {largest} codes; it may have 1 to {LARGEST_CODEBOOK}")
    if math.prod(max(1, length) for length in shape) >= 1 << 60:
        raise CodingError(f"invalid shape: {shape}")
    words = body[start:]
    if len(words) % 4:
        raise CodingError(f"{len(words)} bytes of coded data are not whole 32-bit words")
    # A decision costs at least LEAST_BITS; the coder may omit up to two trailing words.
    if header.decisions * LEAST_BITS > 8 * (len(words) + 8):
        raise CodingError(f"{header.number} indices are more than {len(words)} bytes of coded data can hold")
    return header, words


def fingerprint(model: nn.Module) -> bytes:
    """Return 8 bytes that identify a model: BLAKE2b of its parameters and buffers, by name, dtype, shape and value.

    Fingerprint the part that turns indices into data: codebooks and decoder, or the whole model.
    """
    return fingerprint_of(model.state_dict())


def fingerprint_of(state: Mapping[str, Tensor]) -> bytes:
    """Return the `fingerprint` of a model with this state dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
