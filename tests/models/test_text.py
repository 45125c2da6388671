"""Text as indices: what a tokenizer does with captions, and with text that no caption had."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastvq.errors import ConfigError
from fastvq.models import TextTokenizer
from fastvq.models.text import END, PAD, START

CAPTIONS = ["Red heart\nred heart, symbols", "blue heart", "", "a cat with a hat and a tail, beside another cat"]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(CAPTIONS, vocabulary=300, length=16)


def test_captions_become_rows_of_equal_length(tokenizer):
    rows = tokenizer.rows(CAPTIONS)
    assert rows.shape == (4, 2, tokenizer.length)
    assert rows.max() < tokenizer.vocabulary <= 300
    assert (rows[..., 0] == START).all()
    assert ((rows == END).sum(-1) == 1).all()
    assert rows[2].tolist() == 2 * [[START, END] + [PAD] * (tokenizer.length - 2)]
    assert torch.equal(rows[1, 0], rows[1, 1])
    assert not torch.equal(rows[0, 0], rows[0, 1])


def test_no_captions_are_no_rows(tokenizer):
    assert tokenizer.rows([]).shape == (0, 1, tokenizer.length)


@pytest.mark.parametrize("text", ["<end> heart", "<pad>", "<start>"])
def test_names_of_special_indices_are_ordinary_text(tokenizer, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = tokenizer.encode(text)
    length = int((row == END).nonzero())
    assert row[0] == START
    assert (row[1:length] > END).all()
    assert (row[length + 1 :] == PAD).all()


def test_case_and_spaces_do_not_matter(tokenizer):
    first = tokenizer.rows(CAPTIONS)[0, 0]
    for text in ("red heart", " RED\n heart  "):
        assert torch.equal(tokenizer.encode(text), first)


def test_it_comes_back_from_json_and_training_repeats(tokenizer):
    again = TextTokenizer(tokenizer.to_json())
    assert torch.equal(again.rows(CAPTIONS), tokenizer.rows(CAPTIONS))
    assert TextTokenizer.train(CAPTIONS, vocabulary=300, length=16).to_json() == tokenizer.to_json()


def test_words_that_no_caption_has_are_spelled_and_named(tokenizer):
    with pytest.warns(RuntimeWarning, match=r"no caption that was learned from has 2 words of 'red zebü ☃x': zebü, x"):
        row = tokenizer.encode("red zebü ☃x")
    assert row.shape == (tokenizer.length,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode("Hat, heart!")


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_empty_text(tokenizer, text):
    with pytest.raises(ConfigError, match="text must say what to draw, got"):
        tokenizer.encode(text)


def test_long_text_is_refused_and_long_captions_are_cut(tokenizer):
    with pytest.raises(ConfigError, match=rf"text must have at most {tokenizer.length - 2} text indices.*got 20"):
        tokenizer.encode(20 * "heart ")
    with pytest.warns(RuntimeWarning, match=r"captions: 1 caption of more than \d+ text indices is cut:\n  heart"):
        row = tokenizer.rows([20 * "heart "])[0, 0]
    assert row[-1] == END
