"""The page of the demo."""

from __future__ import annotations

from fastvq.demo.page import _table


def test_a_table_escapes_what_it_shows():
    assert "<td>a &lt; b</td>" in _table(["x"], [["a < b"]])
