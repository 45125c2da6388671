"""Text as indices: a byte-pair tokenizer that is trained on captions and saved with the model that reads it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvq.errors import ConfigError, counted, listed
from fastvq.extras import require

PAD, START, END = range(3)
"""Text indices with a meaning of their own; those of words and their parts follow."""
_SPECIAL = ("<pad>", "<start>", "<end>")
_ROOM = 8
"""Indices that a request may have more than the longest caption: unknown words take several each."""
_WORD = re.compile(r"\w+")


class TextTokenizer:
    """Byte-pair encoding of lower-case text.

    A caption is `START`, the indices of its words and their parts, `END`, and `PAD` up to `length`. Every byte has an
    index, so that any text can be encoded: a word that no caption has is spelled by parts that a model has not seen
    together, which `encode` warns of.

    Args:
        state: what `to_json` returned.

    Attributes:
        length: number of indices of a caption.
        vocabulary: number of different indices.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self.length, self._words = int(state["length"]), frozenset(state["words"])
        self._bpe = require("tokenizers", "text").Tokenizer.from_str(json.dumps(state["bpe"]))
        self._bpe.encode_special_tokens = True  # "<end>" in a text is five characters
        self.vocabulary = int(self._bpe.get_vocab_size())

    @classmethod
    def train(cls, captions: Iterable[str], *, vocabulary: int, length: int) -> TextTokenizer:
        """Return a tokenizer of captions, each of which may be several, one a line.

        Args:
            captions: the texts; empty ones are left out.
            vocabulary: largest number of indices, at least that of the bytes and `START`, `END` and `PAD`.
            length: largest number of indices of a caption; it is smaller where captions are shorter.

        Raises:
            MissingExtraError: the library tokenizers is not installed.
        """
        library = require("tokenizers", "text")
        lines = [line for caption in captions for line in _lines(caption)]
        bpe = library.Tokenizer(library.models.BPE())
        bpe.normalizer = library.normalizers.Sequence([library.normalizers.NFKC(), library.normalizers.Lowercase()])
        bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(lines, trainer)
        longest = max((len(found.ids) for found in bpe.encode_batch(lines)), default=0)
        words = sorted({word for line in lines for word in _WORD.findall(line.lower())})
        return cls({"length": min(length, longest + _ROOM + 2), "words": words, "bpe": json.loads(bpe.to_str())})

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as a JSON object."""
        return self._state

    def encode(self, text: str) -> Tensor:
        """Return the indices (length,) of a request; a warning names words that no caption had.

        Raises:
            ConfigError: the text is empty or too long.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"text must say what to draw, got {text!r}")
        ids = self._bpe.encode(" ".join(text.split())).ids
        if len(ids) > self.length - 2:
            raise ConfigError(
                f"text must have at most {self.length - 2} text indices, words and their parts, as this model has room"
                f" for, got {len(ids)}: {text!r}"
            )
        unknown = [word for word in dict.fromkeys(_WORD.findall(text.lower())) if word not in self._words]
        if unknown:
            warnings.warn(
                f"text: no caption that was learned from has {counted(len(unknown), 'word')} of {text!r}:"
                f" {', '.join(unknown)}; what is spelled from parts of other words may be ignored",
                RuntimeWarning,
                stacklevel=2,
            )
        return torch.tensor(self._padded(ids))

    def rows(self, captions: Sequence[str]) -> Tensor:
        """Return the indices (N, V, length) of captions, each of which may be several, one a line.

        V is the largest number of lines; a caption of fewer lines repeats them. Empty captions have no words. Those
        that are too long are cut, with a warning.
        """
        lines = [_lines(caption) or [""] for caption in captions]
        most = max(map(len, lines), default=1)
        flat = [own[number % len(own)] for own in lines for number in range(most)]
        ids = [found.ids for found in self._bpe.encode_batch(flat)]
        long = list(dict.fromkeys(text for text, own in zip(flat, ids, strict=True) if len(own) > self.length - 2))
        if long:
            warnings.warn(
                f"captions: {counted(len(long), 'caption')} of more than {self.length - 2} text indices"
                f" {'is' if len(long) == 1 else 'are'} cut:{listed(long)}",
                RuntimeWarning,
                stacklevel=2,
            )
        found = torch.tensor([self._padded(own[: self.length - 2]) for own in ids], dtype=torch.int64)
        return found.view(len(captions), most, self.length)

    def _padded(self, ids: Sequence[int]) -> list[int]:
        return [START, *ids, END] + [PAD] * (self.length - 2 - len(ids))


def _lines(caption: str) -> list[str]:
    """Return the captions in a text, one a line, without empty ones."""
    return [" ".join(line.split()) for line in caption.splitlines() if line.strip()]


def first_caption(caption: str) -> str:
    """Return the first of the captions in a text."""
    return (_lines(caption) or [""])[0]
