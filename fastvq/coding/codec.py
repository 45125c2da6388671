"""Encoding and decoding of whole arrays of indices."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvq.errors import CodingError
from fastvq.files import StrPath, write_whole

from . import learned, tree
from .container import LARGEST_CODEBOOK, MODELS, MOST_CODEBOOKS, Header, pack, unpack
from .huffman import huffman_bits
from .models import Adaptive, Model, Static
from .stream import Coder, SymbolDecoder, SymbolEncoder
from .tree import Ints, Mask

if TYPE_CHECKING:
    from fastvq.models import Prior

MAX_INDICES = 1 << 22
"""Default limit on the number of indices that `decode` accepts."""
MAX_DECISIONS = 1 << 25
"""Default limit on the number of binary decisions that `decode` accepts; an index takes up to log2 K of them."""
MAX_INDICES_PER_BYTE = 1 << 12
"""Default limit on the number of indices for each byte, beyond `FREE_INDICES`. `encode` keeps to it."""
FREE_INDICES = 1 << 16
"""Number of indices that the smallest file may hold."""


class Limits(NamedTuple):
    """The limits of `decode`, for what passes them on."""

    max_indices: int = MAX_INDICES
    max_decisions: int = MAX_DECISIONS
    max_indices_per_byte: int = MAX_INDICES_PER_BYTE


LARGEST_BATCH = 64
"""Largest number of samples coded side by side. The adaptive model learns from a batch only after coding it."""
FEW_SAMPLES = 12
"""Largest number of samples for which lists are faster than arrays."""


def encode(
    indices: Tensor,
    codebook_size: int | Sequence[int],
    *,
    model: str = "adaptive",
    fingerprint: bytes = bytes(8),
    prior: Prior | None = None,
    labels: Tensor | None = None,
) -> bytes:
    """Encode indices as bytes that `decode` restores on every machine.

    Args:
        indices: integers in [0, codebook_size), or -1 for excluded vectors. The first axis runs over samples, the
            others over the grid of each: (B, H, W), (B, T), (B, T, Q) for a residual quantizer. A single axis is one
            sequence.
        codebook_size: K; or K of each element of the last axis, whose indices are then predicted by models of their
            own: the stages of a residual quantizer, heads or groups.
        model: "static", a frequency for each index, stored in the data; "adaptive", learned from the indices to the
            left and above during coding, which is nearly always smaller; "prior", a learned prior.
        fingerprint: 8 bytes of `fastvq.coding.fingerprint(model)`, which `decode` can check.
        prior: for model="prior", a prior trained on such indices. Decoding needs the same one and takes as long as
            sampling from it.
        labels: for model="prior", the classes (B,) of the samples; they are stored in the data.

    Returns:
        The bytes. They depend on the indices alone, not on the machine, dtype or device.

    Raises:
        CodingError: indices out of range, of another dtype or without axes; an unknown model; with a prior, indices
        (including -1) or labels outside its range.

    Numerics: probabilities are integers (`fastvq.coding.models`); a prior is evaluated in exact fixed-point arithmetic
    (`fastvq.coding.fixed`).

    Source: Martin, Range encoding, 1979; the coder is that of the library constriction (Bamler, 2022).
    """
    data, _ = _encode(indices, codebook_size, model, fingerprint, prior, labels)
    return data


def decode(
    data: bytes,
    *,
    fingerprint: bytes | None = None,
    prior: Prior | None = None,
    max_indices: int = MAX_INDICES,
    max_decisions: int = MAX_DECISIONS,
    max_indices_per_byte: int = MAX_INDICES_PER_BYTE,
) -> Tensor:
    """Return the indices, int64, that `encode` was given.

    Args:
        data: the bytes that `encode` returned.
        fingerprint: if given, the fingerprint that the data must have been encoded with.
        prior: the prior that the data were encoded with; unused for data of other models.
        max_indices: refuse to decode more; an index takes 8 bytes of memory.
        max_decisions: refuse to decode more binary decisions, of which an index takes log2 K, rounded up.
        max_indices_per_byte: refuse data of more than 2^16 indices with more of them for each byte.

    Raises:
        CodingError: damaged or truncated data, data of another kind, model or prior, or more than one of the limits. No
        other error occurs, and no wrong indices are returned. The limits bound time and memory.
    """
    header, words = unpack(data)
    if fingerprint is not None and fingerprint != header.fingerprint:
        raise CodingError(
            f"indices of another model: they were encoded with {header.fingerprint.hex()}, this one is"
            f" {fingerprint.hex()}"
        )
    decisions = header.decisions
    if header.number > max_indices:
        raise CodingError(f"{header.number} indices, more than max_indices={max_indices}")
    if decisions > max_decisions:
        raise CodingError(f"{decisions} decisions, more than max_decisions={max_decisions}")
    if header.number - FREE_INDICES > max_indices_per_byte * len(data):
        raise CodingError(
            f"{header.number} indices in {len(data)} bytes, more than max_indices_per_byte={max_indices_per_byte}"
        )
    if header.prior is not None:
        learned.check_prior(header, header.prior, prior)
    decoder = SymbolDecoder(words)
    try:
        if header.prior is not None and prior is not None:
            return torch.from_numpy(learned.decode(decoder, header, header.prior, prior).reshape(header.shape))
        model = _read_table(decoder, header) if header.model == "static" else _adaptive(header)
        symbols = np.full(_lanes(header.shape), -1, np.int64)
        _code_symbols(symbols, header, model, decoder)
    except (AssertionError, ValueError) as error:
        raise CodingError(f"invalid data, not written by this coder: {error}") from error
    return torch.from_numpy(symbols.reshape(header.shape) - header.missing)


def measure(
    indices: Tensor, codebook_size: int | Sequence[int], *, prior: Prior | None = None, labels: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Measure the size of encoded indices under each model.

    Returns:
        For each model "bits_per_index", by its own probabilities and including tables and labels, and "bytes" of the
        whole file; "uniform" has log2 K bits per index, "huffman" the best whole number of bits for each index by its
        frequency.
    """
    count = max(1, indices.numel())
    sizes = [*codebook_size] if isinstance(codebook_size, Sequence) else [codebook_size]
    uniform = sum(math.log2(size) for size in sizes if size > 1) / len(sizes)
    results = {"uniform": {"bits_per_index": uniform, "bytes": float(math.ceil(uniform * indices.numel() / 8))}}
    values = indices.detach().cpu().long().numpy()
    huffman = sum(huffman_bits(part.ravel()) for part in (np.moveaxis(values, -1, 0) if len(sizes) > 1 else [values]))
    results["huffman"] = {"bits_per_index": huffman / count, "bytes": float(math.ceil(huffman / 8))}
    for model in MODELS if prior is not None else MODELS[:2]:
        data, bits = _encode(indices, codebook_size, model, bytes(8), prior, labels)
        results[model] = {"bits_per_index": bits / count, "bytes": float(len(data))}
    return results


def save(path: StrPath, data: bytes) -> None:
    """Write a file atomically: it appears complete or not at all."""
    write_whole(path, data)


def load(path: StrPath) -> bytes:
    """Read a file of encoded indices. Other files are not read beyond their first bytes.

    Raises:
        CodingError: the file holds something else. OSError: it can't be read.
    """
    from .container import MAGIC

    with Path(path).open("rb") as stream:
        start = stream.read(len(MAGIC))
        if start != MAGIC:
            raise CodingError(f"{path}: not a file of fastvq indices")
        return start + stream.read()


def _encode(
    indices: Tensor,
    codebook_size: int | Sequence[int],
    model: str,
    fingerprint: bytes,
    prior: Prior | None,
    labels: Tensor | None,
) -> tuple[bytes, float]:
    header, symbols = _validated(indices, codebook_size, model, fingerprint)
    encoder = SymbolEncoder()
    if model == "prior":
        header = learned.encode(encoder, header, symbols, prior, labels)
        return _packed(header, encoder.words()), encoder.bits
    if model == "static":
        predictor: Model = _write_table(encoder, header, symbols)
    else:
        predictor = _adaptive(header)
    _code_symbols(symbols, header, predictor, encoder, known=True)
    return _packed(header, encoder.words()), encoder.bits


def _packed(header: Header, words: bytes) -> bytes:
    """Return the bytes of a file, with words of zeros behind the coded ones if there are few bytes for its indices.

    Constant indices of a small codebook take next to nothing. The decoder does not read the words, and by default
    accepts every file of up to `MAX_INDICES`.
    """
    data = pack(header, words)
    least = -(-(header.number - FREE_INDICES) // MAX_INDICES_PER_BYTE)
    missing = max(0, -(-(least - len(data)) // 4))
    return pack(header, words + bytes(4 * missing)) if missing else data


def _adaptive(header: Header) -> Adaptive:
    alphabets = header.alphabets
    return Adaptive(max(alphabets), sum(1 << tree.depths(alphabet) for alphabet in alphabets))


def _validated(
    indices: Tensor, codebook_size: int | Sequence[int], model: str, fingerprint: bytes
) -> tuple[Header, Ints]:
    if model not in MODELS:
        raise CodingError(f"model: must be one of {', '.join(MODELS)}, got {model!r}")
    if len(fingerprint) != 8:
        raise CodingError(f"fingerprint: must be 8 bytes, got {len(fingerprint)}")
    sizes = _checked_sizes(indices, codebook_size)
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise CodingError(f"indices: must be integers, got {indices.dtype}")
    if not 1 <= indices.dim() <= 8:
        raise CodingError(f"indices: must have 1 to 8 axes, got shape {tuple(indices.shape)}")
    if max(indices.shape) >= 1 << 32:
        raise CodingError(f"indices: an axis may be up to 2^32 - 1 long, got shape {tuple(indices.shape)}")
    values = indices.detach().cpu().numpy()
    staged = not isinstance(sizes, int)
    for stage, size in enumerate((sizes,) if isinstance(sizes, int) else sizes):
        part = values[..., stage] if staged else values
        if part.size and not (part.min() >= -1 and part.max() < size):
            place = f" at {stage} of the last axis" if staged else ""
            raise CodingError(f"indices: must lie in [-1, {size}){place}, got {part.min()} to {part.max()}")
    values = values.astype(np.int64)
    missing = bool(values.size and values.min() < 0)
    header = Header(model, missing, sizes, tuple(indices.shape), fingerprint)
    return header, values.reshape(_lanes(header.shape)) + missing


def _checked_sizes(indices: Tensor, codebook_size: int | Sequence[int]) -> int | tuple[int, ...]:
    """Return the size of the codebook, or those of all, as integers.

    Raises:
        CodingError: a size is no integer or out of range, or the last axis of the indices has another length.
    """
    several = isinstance(codebook_size, Sequence) and not isinstance(codebook_size, str)
    given: Any = codebook_size if several else (codebook_size,)
    try:
        sizes = tuple(operator.index(size) for size in given)
    except TypeError:
        raise CodingError(f"codebook_size: must be an integer, or several, got {codebook_size!r}") from None
    if not sizes or min(sizes) < 1 or sum(sizes) > LARGEST_CODEBOOK:
        together = ", all together as well" if several else ""
        raise CodingError(f"codebook_size: must lie in [1, {LARGEST_CODEBOOK}]{together}, got {codebook_size}")
    if not several:
        return sizes[0]
    if indices.dim() < 2 or indices.shape[-1] != len(sizes) or len(sizes) > MOST_CODEBOOKS:
        raise CodingError(
            f"codebook_size: must be one for each of the last axis of indices {tuple(indices.shape)}, at most"
            f" {MOST_CODEBOOKS}, got {len(sizes)}"
        )
    return sizes


def _lanes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (samples, indices of each sample)."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


class _Place(NamedTuple):
    """A place of a sample's grid.

    Attributes:
        left, above: the places whose symbols are its context, -1 for none.
        alphabet: number of symbols.
        first_node: number added to its nodes, so that those of each codebook differ.
    """

    left: int
    above: int
    alphabet: int
    first_node: int


def _places(header: Header) -> Iterator[_Place]:
    """Yield the places of a sample in the order of the format.

    "Above" is one step back along the second-to-last axis or, at its beginning, along the nearest axis before it; in a
    sequence, the place two to the left. With several codebooks along the last axis, that is so for the first of them;
    to the left of the others is the codebook before, above them the same codebook at the cell before.
    """
    alphabets = header.alphabets
    stages = len(alphabets)
    first_nodes = [0]
    for alphabet in alphabets:
        first_nodes.append(first_nodes[-1] + (1 << tree.depths(alphabet)))
    if isinstance(header.codebook_size, int):
        for left, above in _neighbors(header.shape):
            yield _Place(left, above, alphabets[0], 0)
        return
    for cell, (left, above) in enumerate(_neighbors(header.shape[:-1]) if len(header.shape) > 2 else [(-1, -1)]):
        for stage, alphabet in enumerate(alphabets):
            if stage == 0:
                contexts = [stages * at if at >= 0 else -1 for at in (left, above)]
            else:
                before = left if left >= 0 else above
                contexts = [stages * cell + stage - 1, stages * before + stage if before >= 0 else -1]
            yield _Place(contexts[0], contexts[1], alphabet, first_nodes[stage])


def _neighbors(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the places to the left and above of each place of a sample's grid, -1 where there is none."""
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
    """Yield batches of 1, 1, 2, 4 ... LARGEST_BATCH samples: the model learns between batches, most from the first."""
    first, size = 0, 1
    while first < samples:
        yield slice(first, min(first + size, samples))
        first += size
        size = min(first, LARGEST_BATCH)


def _code_symbols(symbols: Ints, header: Header, model: Model, coder: Coder, *, known: bool = False) -> None:
    """Code all decisions of all symbols (samples, places) in the order of the format.

    Unless the symbols are `known`, they are filled with those that the coder decodes.
    """
    if symbols.size == 0 or not any(map(tree.depths, header.alphabets)):
        symbols[:] = 0
        return
    for batch in _batches(len(symbols)):
        block = symbols[batch]
        if len(block) <= FEW_SAMPLES:
            few = block.T.tolist()
            _code_symbols_in_lists(few, header, model, coder, known=known)
            block[:] = np.array(few).T
            continue
        outside = np.full(len(block), max(header.alphabets), np.int64)
        for place, (left, above, alphabet, first_node) in enumerate(_places(header)):
            contexts = [block[:, at] if at >= 0 else outside for at in (left, above)]

            def decide(
                nodes: Ints,
                branching: Mask,
                truth: Ints | None,
                contexts: list[Ints] = contexts,
                first_node: int = first_node,
            ) -> Ints:
                nodes, by_left, by_above = nodes + first_node, contexts[0][branching], contexts[1][branching]
                bits = coder.decide(model.predict(nodes, by_left, by_above), truth)
                model.learn(nodes, by_left, by_above, bits)
                return bits

            block[:, place] = tree.walk(len(block), alphabet, decide, block[:, place] if known else None)


def _code_symbols_in_lists(
    symbols: list[list[int]], header: Header, model: Model, coder: Coder, *, known: bool
) -> None:
    """Code the symbols (places, samples) of a few samples like `_code_symbols`, in lists instead of slower arrays."""
    count = len(symbols[0])
    outside = [max(header.alphabets)] * count
    for place, (left_at, above_at, alphabet, first_node) in enumerate(_places(header)):
        left = symbols[left_at] if left_at >= 0 else outside
        above = symbols[above_at] if above_at >= 0 else outside

        def decide(
            nodes: list[int],
            branching: list[int],
            truth: list[int] | None,
            left: list[int] = left,
            above: list[int] = above,
            first_node: int = first_node,
        ) -> list[int]:
            contexts = [(node + first_node, left[at], above[at]) for node, at in zip(nodes, branching, strict=True)]
            rights = [
                coder.decide_one(model.predict_one(*context), None if truth is None else truth[i])
                for i, context in enumerate(contexts)
            ]
            model.learn_few(contexts, rights)
            return rights

        symbols[place] = tree.walk_few(count, alphabet, decide, symbols[place] if known else None)


def _write_table(encoder: SymbolEncoder, header: Header, symbols: Ints) -> Static:
    """Encode the counts that a static model's probabilities follow from, each as a number up to its node's total."""

    def write(value: int, limit: int) -> int:
        encoder.number(value, limit)
        return value

    tables = []
    for stage, alphabet in enumerate(header.alphabets):
        passing, right = tree.node_counts(symbols[:, stage :: len(header.alphabets)].ravel(), alphabet)
        tree.visit_nodes(passing, right, alphabet, write)
        tables.append((passing, right))
    return _static(tables)


def _static(tables: list[tuple[Ints, Ints]]) -> Static:
    """Return the model of the tables of all codebooks; that of one, which may be large, is not copied."""
    return Static(*(tables[0] if len(tables) == 1 else map(np.concatenate, zip(*tables, strict=True))))


def _read_table(decoder: SymbolDecoder, header: Header) -> Static:
    tables = []
    for alphabet in header.alphabets:
        passing, right = np.zeros((2, 1 << tree.depths(alphabet)), np.int64)
        passing[1:2] = header.number // len(header.alphabets)
        tree.visit_nodes(passing, right, alphabet, lambda _, limit: decoder.number(limit))
        tables.append((passing, right))
    return _static(tables)
