"""The page of the demo."""

from __future__ import annotations

import torch

from fastvq.demo.page import _figure, _Picture, _table
from fastvq.runs import plots


def test_a_table_escapes_what_it_shows():
    assert "<td>a &lt; b</td>" in _table(["x"], [["a < b"]])


def test_captions_are_text_below_the_pictures(tmp_path):
    """On a phone the text of a picture that is scaled down could not be read."""
    plots.save_usage(tmp_path / "usage.png", torch.tensor([3, 1]), perplexity=1.5, title="T", captioned=False)
    shown = _figure(tmp_path, _Picture("usage.png", 'bars "of" codes'))
    assert shown.startswith(
        '<figure><img src="usage.png" alt="bars &quot;of&quot; codes"><figcaption>One bar per code.'
    )
    assert _figure(tmp_path, _Picture("absent.png", "nothing")) == ""
