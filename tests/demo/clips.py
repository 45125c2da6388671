"""A few of the shipped clips, for the tests of what trains on them."""

from __future__ import annotations

import dataclasses

import pytest

from fastvq.data import DATA_SETS, Examples


def few_clips(monkeypatch: pytest.MonkeyPatch) -> Examples:
    """Let the shipped clips be twelve to learn from and three held out, and return them."""
    known = DATA_SETS["emoji-clips"]
    clips = known.load()
    few = dataclasses.replace(
        clips,
        train=clips.train[:12],
        test=clips.test[:3],
        test_names=clips.test_names[:3],
        train_captions=(clips.train_captions or ())[:12],
        test_captions=(clips.test_captions or ())[:3],
    )
    monkeypatch.setitem(DATA_SETS, "emoji-clips", dataclasses.replace(known, load=lambda: few))
    return few
