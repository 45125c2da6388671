"""Symbols under a learned prior, whose probabilities are computed in exact fixed point (`fixed.py`)."""

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
from .stream import Coder, Decoder, Encoder
from .tree import Ints, Open

if TYPE_CHECKING:
    from fastvq.models import Prior

LANES = 256
"""Samples that are coded side by side. Each depends on itself alone; the number is part of the format."""


def prior_fingerprint(prior: Prior) -> bytes:
    """8 bytes that tell priors apart which predict differently: of the settings and of every parameter."""
    described = json.dumps([type(prior).__name__, prior.settings], sort_keys=True)
    return hashlib.blake2b(fingerprint(prior) + described.encode(), digest_size=8).digest()


def encode(encoder: Encoder, header: Header, symbols: Ints, prior: Prior | None, labels: Tensor | None) -> Header:
    """Code labels and symbols; return the header with what a decoder has to know of the prior."""
    if prior is None:
        raise CodingError('model: "prior" needs prior=, the one to code with')
    if header.missing:
        raise CodingError("codes: a prior knows no vectors without a code; model='adaptive' codes -1 as well")
    _check(prior, header.codebook_size, header.shape)
    if labels is not None:
        try:
            prior.label_rows(labels, len(symbols), torch.device("cpu"))
        except ValueError as error:
            raise CodingError(str(error)) from error
        for label in labels.tolist():
            encoder.number(label, prior.classes - 1)
    _walk(symbols, labels, prior, encoder, known=True)
    about = PriorHeader(labels is not None, prior_fingerprint(prior), _digest_of(symbols))
    return header._replace(prior=about)


def check_file(header: Header, about: PriorHeader, prior: Prior | None) -> None:
    if prior is None:
        raise CodingError(f"coded with the prior {about.identity.hex()}: decoding needs it")
    given = prior_fingerprint(prior)
    if given != about.identity:
        raise CodingError(f"coded with another prior: {about.identity.hex()}, this one is {given.hex()}")
    _check(prior, header.codebook_size, header.shape)
    if about.labelled and not prior.classes:
        raise CodingError("data with labels, which this prior doesn't have")


def decode(decoder: Decoder, header: Header, about: PriorHeader, prior: Prior) -> Ints:
    symbols = np.zeros((header.shape[0], prior.places), np.int64)
    labels = None
    if about.labelled:
        labels = torch.tensor([decoder.number(prior.classes - 1) for _ in range(len(symbols))], dtype=torch.int64)
    _walk(symbols, labels, prior, decoder)
    if _digest_of(symbols) != about.codes:
        raise CodingError("the codes aren't those that were encoded")
    return symbols


def _digest_of(symbols: Ints) -> bytes:
    return digest(symbols.astype("<i8").tobytes())


def _check(prior: Prior, codebook_size: int, shape: tuple[int, ...]) -> None:
    """Whether a prior knows codes of this shape.

    Raises:
        CodingError: it doesn't.
    """
    if prior.codebook_size != codebook_size or tuple(shape[1:]) != prior.grid:
        raise CodingError(
            f"prior: it knows grids {prior.grid} of {prior.codebook_size} codes; these are {tuple(shape[1:])} of"
            f" {codebook_size}"
        )


@torch.no_grad()
def _walk(
    symbols: Ints,
    labels: Tensor | None,
    prior: Prior,
    coder: Coder,
    *,
    known: bool = False,
) -> None:
    """All decisions of all symbols (samples, places): LANES samples after the other, of these place by place. Unless
    they are known, `symbols` is filled with what the coder says."""
    fixed, size = Fixed(), prior.codebook_size
    rows = prior.label_rows(labels, len(symbols), torch.device("cpu"))
    for first in range(0, len(symbols) if tree.depths(size) else 0, LANES):
        block = symbols[first : first + LANES]
        codes = torch.zeros(block.shape, dtype=torch.int64)
        state = prior.begin(fixed, rows[first : first + LANES])
        for place in range(prior.places):
            chances = _chances(prior.step(fixed, state, codes, place))

            def one(nodes: Ints, open_: Open, truth: Ints | None, chances: Ints = chances) -> Ints:
                return coder.decide(chances[np.flatnonzero(open_), nodes], truth)

            block[:, place] = tree.walk(len(block), size, one, block[:, place] if known else None)
            codes[:, place] = torch.from_numpy(block[:, place])


def _chances(logits: Tensor) -> Ints:
    """The probability to go right at each node, (B, 2^depths), in the units of `models`, from fixed-point logits."""
    depths = tree.depths(logits.shape[1])
    leaves = 1 << depths
    # So few bits that `right * ONE` below fits 63.
    weights = (exponentials(logits).numpy() >> max(0, tables.EXP_BITS + depths - 46)) + 1
    passing = np.zeros((len(weights), 2 * leaves), np.int64)
    passing[:, leaves : leaves + weights.shape[1]] = weights
    for depth in range(depths - 1, -1, -1):
        below = passing[:, 2 << depth : 4 << depth]
        passing[:, 1 << depth : 2 << depth] = below[:, ::2] + below[:, 1::2]
    right = np.zeros((len(weights), leaves), np.int64)
    right[:, 1:] = passing[:, 3::2]
    return clipped(right * ONE // np.maximum(passing[:, :leaves], 1))
