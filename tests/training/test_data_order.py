"""Data order: every image once an epoch, and a pure function of seed and step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvq.training.data_order import batch_rows, flip_randomly


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 9))
def test_an_epoch_shows_no_image_twice(count: int, batch_size: int, seed: int) -> None:
    if batch_size > count:
        with pytest.raises(ValueError, match="batch_size"):
            batch_rows(0, count=count, batch_size=batch_size, seed=seed)
        return
    steps = count // batch_size
    rows = [batch_rows(step, count=count, batch_size=batch_size, seed=seed) for step in range(2 * steps)]
    for epoch in (rows[:steps], rows[steps:]):
        seen = torch.cat(epoch)
        assert len(seen.unique()) == len(seen) == steps * batch_size
        assert 0 <= seen.min() <= seen.max() < count


def test_order_and_flips_depend_on_seed_and_step_alone() -> None:
    def rows(step: int, seed: int) -> torch.Tensor:
        return batch_rows(step, count=100, batch_size=10, seed=seed)

    first = rows(13, 5)
    torch.manual_seed(99)
    rows(2, 5)
    assert torch.equal(rows(13, 5), first)
    assert not torch.equal(rows(13, 6), first)
    assert not torch.equal(rows(3, 5), first)

    images = torch.rand(400, 1, 4, 4)
    flipped = flip_randomly(images, 3, seed=1)
    assert torch.equal(flip_randomly(images, 3, seed=1), flipped)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 140 < mirrored.sum() < 260
