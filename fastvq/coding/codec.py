"""Whole arrays of codes to bytes and back."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastvq.errors import CodingError
from fastvq.files import whole

from . import learned, tree
from .container import LARGEST_CODEBOOK, MODELS, Header, pack, unpack
from .huffman import huffman_bits
from .models import Adaptive, Model, Static
from .stream import Coder, Decoder, Encoder
from .tree import Ints, Open

if TYPE_CHECKING:
    from fastvq.models import Prior

MAX_INDICES = 1 << 26
"""Codes that `decode` takes by itself at most."""
LARGEST_BATCH = 64
"""Samples that are coded side by side at most. They learn from each other only afterwards."""
FEW = 12
"""Samples side by side up to which lists are faster than arrays."""


def encode(
    codes: Tensor,
    codebook_size: int,
    *,
    model: str = "adaptive",
    fingerprint: bytes = bytes(8),
    prior: Prior | None = None,
    labels: Tensor | None = None,
) -> bytes:
    """Codes as bytes from which `decode` gets them back, on every machine.

    Args:
        codes: integers in [0, codebook_size), or -1 for vectors without a code. Samples lie along the first axis, the
            grid of each along the others: (B, H, W), (B, T), (B, T, Q) for residual codes. One axis alone is one
            sequence.
        codebook_size: K.
        model: "static", one frequency for each code, which are part of the data; or "adaptive", which learns from the
            codes to the left and above while it codes, and is the smaller nearly always; or "prior", a learned one.
        fingerprint: 8 bytes of `fastvq.coding.fingerprint(model)`, that `decode` can check.
        prior: for "prior", one that has learned what such codes look like. Decoding takes the same one, and as long as
            sampling from it.
        labels: for "prior", (B,), the classes of the samples, which become part of the data.

    Returns:
        The bytes; the same for the same codes, whatever machine, dtype or device they come from.

    Raises:
        CodingError: codes out of range, of another dtype or without axes; an unknown model; codes, -1 among them, or
        labels that the prior doesn't know.

    Numerics: probabilities are computed in integers (`fastvq.coding.models`), the prior's in exact fixed point
    (`fastvq.coding.fixed`).

    Source: Martin, Range encoding, 1979; the coder is that of the library constriction (Bamler, 2022).
    """
    data, _ = _encode(codes, codebook_size, model, fingerprint, prior, labels)
    return data


def decode(
    data: bytes, *, fingerprint: bytes | None = None, prior: Prior | None = None, max_indices: int = MAX_INDICES
) -> Tensor:
    """The codes that `encode` was given, int64.

    Args:
        data: what `encode` returned.
        fingerprint: if given, the one that the data must have been encoded with.
        prior: for data encoded with one, the same; for others it isn't used.
        max_indices: refuse to decode more; their memory is 8 bytes each.

    Raises:
        CodingError: data that are damaged, truncated or of another kind, codes of another model or prior, or too many.
        No other error, and never wrong codes. Time and memory are bounded by the length of the data and max_indices.
    """
    header, words = unpack(data)
    if fingerprint is not None and fingerprint != header.fingerprint:
        raise CodingError(
            f"codes of another model: they were encoded with {header.fingerprint.hex()}, this one is"
            f" {fingerprint.hex()}"
        )
    if header.number > max_indices:
        raise CodingError(f"{header.number} codes, more than max_indices={max_indices}")
    if header.prior is not None:
        learned.check_file(header, header.prior, prior)
    decoder = Decoder(words)
    try:
        if header.prior is not None and prior is not None:
            return torch.from_numpy(learned.decode(decoder, header, header.prior, prior).reshape(header.shape))
        model = _read_table(decoder, header) if header.model == "static" else Adaptive(header.alphabet)
        symbols = np.full(_lanes(header.shape), -1, np.int64)
        _walk(symbols, header, model, decoder)
    except (AssertionError, ValueError) as error:
        raise CodingError(f"data that this coder can't have written: {error}") from error
    return torch.from_numpy(symbols.reshape(header.shape) - header.missing)


def measure(
    codes: Tensor, codebook_size: int, *, prior: Prior | None = None, labels: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """For each model, "bits_per_index" by its own probabilities, tables and labels included, and "bytes" of the whole
    file; "uniform", what log2 K bits a code would be; and "huffman", whole bits for each code by its frequency."""
    count = max(1, codes.numel())
    uniform = math.log2(codebook_size) if codebook_size > 1 else 0.0
    results = {"uniform": {"bits_per_index": uniform, "bytes": float(math.ceil(uniform * codes.numel() / 8))}}
    huffman = huffman_bits(codes.detach().cpu().long().numpy().ravel())
    results["huffman"] = {"bits_per_index": huffman / count, "bytes": float(math.ceil(huffman / 8))}
    for model in MODELS if prior is not None else MODELS[:2]:
        data, bits = _encode(codes, codebook_size, model, bytes(8), prior, labels)
        results[model] = {"bits_per_index": bits / count, "bytes": float(len(data))}
    return results


def save(path: Path | str, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with whole(Path(path)) as partial:
        partial.write_bytes(data)


def load(path: Path | str) -> bytes:
    """The bytes of a file, if it is one of codes. Another isn't read beyond its beginning.

    Raises:
        CodingError: it isn't. OSError: it can't be read.
    """
    from .container import MAGIC

    with Path(path).open("rb") as stream:
        start = stream.read(len(MAGIC))
        if start != MAGIC:
            raise CodingError(f"{path}: not a file of fastvq codes")
        return start + stream.read()


def _encode(
    codes: Tensor, codebook_size: int, model: str, fingerprint: bytes, prior: Prior | None, labels: Tensor | None
) -> tuple[bytes, float]:
    header, symbols = _checked(codes, codebook_size, model, fingerprint)
    encoder = Encoder()
    if model == "prior":
        header = learned.encode(encoder, header, symbols, prior, labels)
        return pack(header, encoder.words()), encoder.bits
    if model == "static":
        predictor: Model = _write_table(encoder, header, symbols)
    else:
        predictor = Adaptive(header.alphabet)
    _walk(symbols, header, predictor, encoder, known=True)
    return pack(header, encoder.words()), encoder.bits


def _checked(codes: Tensor, codebook_size: int, model: str, fingerprint: bytes) -> tuple[Header, Ints]:
    if model not in MODELS:
        raise CodingError(f"model: must be one of {', '.join(MODELS)}, got {model!r}")
    if len(fingerprint) != 8:
        raise CodingError(f"fingerprint: must be 8 bytes, got {len(fingerprint)}")
    try:
        codebook_size = operator.index(codebook_size)
    except TypeError:
        raise CodingError(f"codebook_size: must be an integer, got {codebook_size!r}") from None
    if not 1 <= codebook_size <= LARGEST_CODEBOOK:
        raise CodingError(f"codebook_size: must lie in [1, {LARGEST_CODEBOOK}], got {codebook_size}")
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise CodingError(f"codes: must be integers, got {codes.dtype}")
    if not 1 <= codes.dim() <= 8:
        raise CodingError(f"codes: must have 1 to 8 axes, got shape {tuple(codes.shape)}")
    if max(codes.shape) >= 1 << 32:
        raise CodingError(f"codes: an axis may be up to 2^32 - 1 long, got shape {tuple(codes.shape)}")
    values = codes.detach().cpu().numpy()
    if values.size and not (values.min() >= -1 and values.max() < codebook_size):
        raise CodingError(f"codes: must lie in [-1, {codebook_size}), got {values.min()} to {values.max()}")
    values = values.astype(np.int64)
    missing = bool(values.size and values.min() < 0)
    header = Header(model, missing, codebook_size, tuple(codes.shape), fingerprint)
    return header, values.reshape(_lanes(header.shape)) + missing


def _lanes(shape: tuple[int, ...]) -> tuple[int, int]:
    """(samples, codes of each)."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def _neighbours(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """For each place of a sample's grid, the places to the left and above, -1 where there is none. Above is one step
    back along the last axis but one, or, at its beginning, the nearest one before it; in a sequence, two to the left.
    """
    grid = shape[-1:] if len(shape) == 1 else shape[1:]
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    for place in range(math.prod(grid)):
        at = [place // stride % size for stride, size in zip(strides, grid, strict=True)]
        left = place - 1 if at[-1] else -1
        if len(grid) == 1:
            yield left, place - 2 if place > 1 else -1
            continue
        steps = [stride for stride, index in zip(strides[:-1], at[:-1], strict=True) if index]
        yield left, place - steps[-1] if steps else -1


def _batches(samples: int) -> Iterator[slice]:
    """1, 1, 2, 4 ... LARGEST_BATCH samples: the first ones have the least to learn from."""
    first, size = 0, 1
    while first < samples:
        yield slice(first, min(first + size, samples))
        first += size
        size = min(first, LARGEST_BATCH)


def _walk(symbols: Ints, header: Header, model: Model, coder: Coder, *, known: bool = False) -> None:
    """All decisions of all symbols (samples, places) in the order of the format. Unless they are known, `symbols` is
    filled with what the coder says."""
    alphabet = header.alphabet
    if symbols.size == 0 or tree.depths(alphabet) == 0:
        symbols[:] = 0
        return
    for batch in _batches(len(symbols)):
        block = symbols[batch]
        if len(block) <= FEW:
            few = block.T.tolist()
            _walk_few(few, header, model, coder, known=known)
            block[:] = np.array(few).T
            continue
        outside = np.full(len(block), alphabet, np.int64)
        for place, (left, above) in enumerate(_neighbours(header.shape)):
            contexts = [block[:, at] if at >= 0 else outside for at in (left, above)]

            def some(nodes: Ints, open_: Open, truth: Ints | None, contexts: list[Ints] = contexts) -> Ints:
                by_left, by_above = contexts[0][open_], contexts[1][open_]
                decided = coder.decide(model.predict(nodes, by_left, by_above), truth)
                model.learn(nodes, by_left, by_above, decided)
                return decided

            block[:, place] = tree.walk(len(block), alphabet, some, block[:, place] if known else None)


def _walk_few(symbols: list[list[int]], header: Header, model: Model, coder: Coder, *, known: bool) -> None:
    """The same in lists, place by place, of a few samples: arrays of so few would be slower."""
    count = len(symbols[0])
    outside = [header.alphabet] * count
    for place, (left_at, above_at) in enumerate(_neighbours(header.shape)):
        left = symbols[left_at] if left_at >= 0 else outside
        above = symbols[above_at] if above_at >= 0 else outside

        def some(
            nodes: list[int],
            open_: list[int],
            truth: list[int] | None,
            left: list[int] = left,
            above: list[int] = above,
        ) -> list[int]:
            contexts = [(node, left[at], above[at]) for node, at in zip(nodes, open_, strict=True)]
            rights = [
                coder.decide_one(model.predict_one(*context), None if truth is None else truth[i])
                for i, context in enumerate(contexts)
            ]
            model.learn_few(contexts, rights)
            return rights

        symbols[place] = tree.walk_few(count, header.alphabet, some, symbols[place] if known else None)


def _write_table(encoder: Encoder, header: Header, symbols: Ints) -> Static:
    """The counts that a static model has its probabilities from, each as a number up to what passes its node."""
    passing, right = tree.node_counts(symbols.ravel(), header.alphabet)

    def write(value: int, limit: int) -> int:
        encoder.number(value, limit)
        return value

    tree.for_passed(passing, right, header.alphabet, write)
    return Static(passing, right)


def _read_table(decoder: Decoder, header: Header) -> Static:
    passing, right = np.zeros((2, 1 << tree.depths(header.alphabet)), np.int64)
    passing[1:2] = header.number
    tree.for_passed(passing, right, header.alphabet, lambda _, limit: decoder.number(limit))
    return Static(passing, right)
