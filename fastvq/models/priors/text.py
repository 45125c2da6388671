"""Prior over text and the indices of an image that it describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..text import END, PAD, START, TextTokenizer
from .arithmetic import Arithmetic
from .inputs import zero_head
from .transformer import State, TransformerPrior


class TextPrior(TransformerPrior):
    """Decoder-only transformer over a caption's text indices, then a grid of indices in raster order.

        p(text, indices) = prod_j p(text_j | text_0 ... text_{j-1})  prod_i p(index_i | text, index_0 ... index_{i-1})

    Wherever a prior takes labels, this one takes captions as text indices, which `TextTokenizer` makes: `START`, the
    words, `END`, and `PAD` up to the length. None, or a caption without words, is an image without a caption. `losses`
    weights both parts; `loss`, `bits` and `sample` are those of the image given its caption, so that files are coded
    and samples guided as by any prior.

    Args:
        codebook_size, grid, dim, depth, heads, dropout, vectors: see `TransformerPrior`.
        vocabulary: number of text indices. text_length: number of a caption's, at least 2.
        text_weight: share of the loss that is the text's.
        label_dropout: in training, the share of samples whose caption is left out, which guidance needs.
        summed: give every place also the sum of a learned vector for each text index of the caption. Attention could
            find the words by itself, but takes far longer to learn it.
        classes: 0: a caption takes the place of a class.

    Attributes:
        tokenizer: the tokenizer of captions; None until it is set.

    Shapes: indices (B, *grid) int64 in [0, K), by place for several; captions (B, text_length) int64 in
        [0, vocabulary), or (B, V, text_length), of which training takes one of the V at random and other calls the
        first; or None.

    Raises:
        ValueError: an invalid argument, by name; indices or captions of another shape, dtype or range.

    Source: Ramesh et al., Zero-Shot Text-to-Image Generation (DALL-E), 2021, sections 2.2 and B.
    """

    tokenizer: TextTokenizer | None = None

    def __init__(
        self,
        codebook_size: int | Sequence[int],
        grid: tuple[int, ...],
        *,
        vocabulary: int,
        text_length: int,
        text_weight: float = 0.125,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        summed: bool = False,
        vectors: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(
            codebook_size,
            grid,
            dim=dim,
            depth=depth,
            heads=heads,
            dropout=dropout,
            label_dropout=label_dropout,
            vectors=vectors,
        )
        if classes:
            raise ValueError(f"classes: must be 0, since captions take their place, got {classes}")
        if vocabulary <= END:
            raise ValueError(f"vocabulary: must be at least {END + 1}, got {vocabulary}")
        if text_length < 2:
            raise ValueError(f"text_length: must be at least 2, got {text_length}")
        if not 0 <= text_weight < 1:
            raise ValueError(f"text_weight: must lie in [0, 1), got {text_weight}")
        self.vocabulary, self.prefix, self.text_weight = vocabulary, text_length, text_weight
        self.settings |= {"vocabulary": vocabulary, "text_length": text_length, "text_weight": text_weight}
        self.words, self.word_places = nn.Embedding(vocabulary, dim), nn.Embedding(text_length, dim)
        for embedding in (self.words, self.word_places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.text_head = zero_head(dim, vocabulary)
        self.summed: nn.Embedding | None = None
        if summed:
            # Fingerprints of priors cover their settings: those of earlier ones have no sum.
            self.settings["summed"] = True
            self.summed = nn.Embedding(vocabulary, dim)
            nn.init.normal_(self.summed.weight, std=0.1)

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._logits(indices, labels)[0]

    def losses(
        self, indices: Tensor, labels: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss to minimize and the mean negative log-likelihood of an index, both (), in nats.

            loss = (1 - w) nats of an index + w nats of a text index,  w = text_weight

        Padding, and samples without a caption, do not count as text. `seen`: see `Prior.losses`.
        """
        logits, text_logits, text = self._logits(indices if seen is None else seen, labels)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten())
        follows = text[:, 1:].masked_fill((text[:, 1:] == PAD) | (text[:, 1:2] == END), -1)
        own = F.cross_entropy(text_logits.flatten(0, 1).float(), follows.flatten(), ignore_index=-1, reduction="sum")
        return (1 - self.text_weight) * nats + self.text_weight * own / (follows >= 0).sum().clamp_min(1), nats

    def _logits(self, indices: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, places, K) and (B, text_length - 1, vocabulary), and the captions that they follow from."""
        flat = self.flattened(indices)
        text = self.rows_to_learn(labels, len(flat), flat.device)
        places = self.inputs(flat, self._no_labels(text))
        if self.summed is not None:
            places = places + _sum_of_words(self.summed.weight, text)[:, None]
        x = torch.cat([self.words(text) + self.word_places.weight, places], 1)
        hidden = self.hidden(x)
        return self.predict(hidden[:, self.prefix :]), self.text_head(hidden[:, : self.prefix - 1]), text

    def begin(self, arithmetic: Arithmetic, labels: Tensor) -> State:
        state = super().begin(arithmetic, self._no_labels(labels))
        if self.summed is not None:
            positions, own = state.begun
            state.begun = positions, own + _sum_of_words(arithmetic.constant(self.summed.weight), labels)
        words, places = arithmetic.constant(self.words.weight)[labels], arithmetic.constant(self.word_places.weight)
        for place in range(self.prefix):
            self.advance(arithmetic, words[:, place] + places[place], state, place)
        return state

    def label_rows(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        """Return captions (count, text_length), without words for None."""
        if labels is None:
            blank = torch.full((count, self.prefix), PAD, device=device)
            blank[:, 0], blank[:, 1] = START, END
            return blank
        several = labels.dim() == 3 and labels.shape[1] > 0
        if labels.shape[:: 2 if several else 1] != (count, self.prefix) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels: must be captions as text indices, int64 of shape ({count}, {self.prefix}), got"
                f" {labels.dtype} {tuple(labels.shape)}"
            )
        self.check_labels(labels, self.vocabulary)
        return (labels[:, 0] if several else labels).to(device)

    def rows_to_learn(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        """Return `label_rows`; in training of one caption each at random, and a random share without words."""
        if labels is not None and labels.dim() == 3 and self.training:
            chosen = torch.randint(labels.shape[1], (count,), device=labels.device)
            labels = labels[torch.arange(count, device=labels.device), chosen]
        rows = self.label_rows(labels, count, device)
        if labels is not None and self.training and self.label_dropout:
            dropped = torch.rand(count, device=device) < self.label_dropout
            rows = torch.where(dropped[:, None], self.label_rows(None, count, device), rows)
        return rows

    def _no_labels(self, text: Tensor) -> Tensor:
        """Return the rows (B,) of the table of labels, which has the one of no label."""
        return torch.zeros(len(text), dtype=torch.int64, device=text.device)


def _sum_of_words(vectors: Tensor, text: Tensor) -> Tensor:
    """Return the sum (B, dim) of the vectors (vocabulary, dim) of captions (B, length), without special indices."""
    return vectors[text].masked_fill((text <= END)[..., None], 0).sum(1)
