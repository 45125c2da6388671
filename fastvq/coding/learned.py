"""Coding of symbols under a learned prior, evaluated in exact fixed-point arithmetic (`fixed.py`)."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastvq.errors import CodingError

from . import tables, tree
from .container import Header, PriorHeader, digest, fingerprint
from .fixed import Fixed, exponentials
from .models import ONE, clipped
from .stream import Coder, SymbolDecoder, SymbolEncoder
from .tree import Ints, Mask

if TYPE_CHECKING:
    from fastvq.models import Prior

LANES = 256
"""Number of samples coded side by side, which are independent. The number is part of the format."""


def prior_fingerprint(prior: Prior) -> bytes:
    """Return 8 bytes that identify a prior: BLAKE2b of its settings and its parameters."""
    described = json.dumps([type(prior).__name__, prior.settings], sort_keys=True)
    return hashlib.blake2b(fingerprint(prior) + described.encode(), digest_size=8).digest()


def encode(encoder: SymbolEncoder, header: Header, symbols: Ints, prior: Prior | None, labels: Tensor | None) -> Header:
    """Encode labels and symbols; return the header completed with the prior's part."""
    if prior is None:
        raise CodingError('prior: model="prior" needs one')
    if header.missing:
        raise CodingError("indices: must not hold -1 with a prior; model='adaptive' codes -1 as well")
    _check_fit(prior, header.codebook_size, header.shape)
    if labels is not None:
        try:
            prior.label_rows(labels, len(symbols), torch.device("cpu"))
        except ValueError as error:
            raise CodingError(str(error)) from error
        if not prior.classes:
            raise CodingError("labels: files have none of captions, which this prior takes in their place")
        for label in labels.tolist():
            encoder.number(label, prior.classes - 1)
    _code_symbols(symbols, labels, prior, encoder, known=True)
    about = PriorHeader(labels is not None, prior_fingerprint(prior), _symbols_digest(symbols))
    return header._replace(prior=about)


def check_prior(header: Header, about: PriorHeader, prior: Prior | None) -> None:
    """Check that `prior` is the one that a file was coded with."""
    if prior is None:
        raise CodingError(f"coded with the prior {about.fingerprint.hex()}: decoding needs it")
    given = prior_fingerprint(prior)
    if given != about.fingerprint:
        raise CodingError(f"coded with another prior: {about.fingerprint.hex()}, this one is {given.hex()}")
    _check_fit(prior, header.codebook_size, header.shape)
    if about.labeled and not prior.classes:
        raise CodingError("data with labels, but this prior has no classes")


def decode(decoder: SymbolDecoder, header: Header, about: PriorHeader, prior: Prior) -> Ints:
    """Decode the symbols (samples, places) of a file coded with `prior`."""
    symbols = np.zeros((header.shape[0], prior.places), np.int64)
    labels = None
    if about.labeled:
        labels = torch.tensor([decoder.number(prior.classes - 1) for _ in range(len(symbols))], dtype=torch.int64)
    _code_symbols(symbols, labels, prior, decoder)
    if _symbols_digest(symbols) != about.digest:
        raise CodingError("the decoded indices differ from the encoded ones")
    return symbols


def _symbols_digest(symbols: Ints) -> bytes:
    return digest(symbols.astype("<i8").tobytes())


def _check_fit(prior: Prior, codebook_size: int | tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Check that a prior was built for this codebook size and shape of indices.

    Raises:
        CodingError: it was not.
    """
    if prior.codebook_size != codebook_size or tuple(shape[1:]) != prior.grid:
        raise CodingError(
            f"prior: was built for grids {prior.grid} and {prior.codebook_size} codes; these are {tuple(shape[1:])} and"
            f" {codebook_size}"
        )


@torch.no_grad()
def _code_symbols(
    symbols: Ints,
    labels: Tensor | None,
    prior: Prior,
    coder: Coder,
    *,
    known: bool = False,
) -> None:
    """Code all decisions of all symbols (samples, places): LANES samples at a time, place by place.

    Unless the symbols are `known`, they are filled with those that the coder decodes.
    """
    prior.check_modules()
    fixed, sizes = Fixed(), prior.sizes
    rows = prior.label_rows(labels, len(symbols), torch.device("cpu"))
    for first in range(0, len(symbols) if any(map(tree.depths, sizes)) else 0, LANES):
        block = symbols[first : first + LANES]
        indices = torch.zeros(block.shape, dtype=torch.int64)
        state = prior.begin(fixed, rows[first : first + LANES])
        for place in prior.order:
            probabilities = _right_probabilities(prior.step(fixed, state, indices, place))

            def decide(nodes: Ints, branching: Mask, truth: Ints | None, probabilities: Ints = probabilities) -> Ints:
                return coder.decide(probabilities[np.flatnonzero(branching), nodes], truth)

            size = sizes[place % len(sizes)]
            block[:, place] = tree.walk(len(block), size, decide, block[:, place] if known else None)
            indices[:, place] = torch.from_numpy(block[:, place])


def _right_probabilities(logits: Tensor) -> Ints:
    """Return the probability of the right child at each node, (B, 2^depths), in the units of `models`.

    The logits (B, K) are fixed-point numbers.
    """
    depths = tree.depths(logits.shape[1])
    leaves = 1 << depths
    # Enough bits are dropped for `right * ONE` below to fit 63.
    weights = (exponentials(logits).numpy() >> max(0, tables.EXP_BITS + depths - 46)) + 1
    passing = np.zeros((len(weights), 2 * leaves), np.int64)
    passing[:, leaves : leaves + weights.shape[1]] = weights
    for depth in range(depths - 1, -1, -1):
        below = passing[:, 2 << depth : 4 << depth]
        passing[:, 1 << depth : 2 << depth] = below[:, ::2] + below[:, 1::2]
    right = np.zeros((len(weights), leaves), np.int64)
    right[:, 1:] = passing[:, 3::2]
    return clipped(right * ONE // np.maximum(passing[:, :leaves], 1))
