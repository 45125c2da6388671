"""Data order: every image once an epoch, and a pure function of seed and step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvq.data.augmentation import crop_randomly, flip_randomly, shift_randomly
from fastvq.data.order import Batches, batch_rows


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


def test_batches_read_ahead_are_the_same() -> None:
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    alone, ahead = (Batches(images, batch_size=7, seed=3, workers=workers) for workers in (0, 2))
    state = torch.get_rng_state()
    for step in (0, 1, 2, 9, 10, 3):  # a resumed run begins anywhere
        assert torch.equal(ahead(step), alone(step))
        assert torch.equal(alone(step), images[batch_rows(step, count=30, batch_size=7, seed=3)])
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_lie_anywhere_and_depend_on_seed_and_step_alone() -> None:
    rows, columns = torch.meshgrid(torch.arange(10), torch.arange(7), indexing="ij")
    images = (10 * rows + columns).expand(600, 3, 10, 7)
    crops = crop_randomly(images, 5, height=8, width=4, seed=1)
    assert crops.shape == (600, 3, 8, 4)
    torch.manual_seed(99)
    assert torch.equal(crop_randomly(images, 5, height=8, width=4, seed=1), crops)
    assert not torch.equal(crop_randomly(images, 6, height=8, width=4, seed=1), crops)
    tops, lefts = crops[:, 0, 0, 0] // 10, crops[:, 0, 0, 0] % 10
    assert torch.equal(crops[:, 1], images[0, 0, :8, :4] + (10 * tops + lefts)[:, None, None])
    places = torch.bincount(4 * tops + lefts, minlength=12)
    assert places.min() > 25  # 50 are expected in each of 3 x 4 places


def test_shifts_go_in_all_directions_and_fill_what_they_uncover() -> None:
    images = torch.zeros(500, 1, 5, 5)
    images[:, :, 2, 2] = 1
    shifted = shift_randomly(images, 2, most=1, seed=3)
    assert torch.equal(shift_randomly(images, 2, most=1, seed=3), shifted)
    places = shifted.flatten(1).argmax(1)
    assert sorted(places.unique().tolist()) == [5 * row + column for row in (1, 2, 3) for column in (1, 2, 3)]
    bright = torch.ones(500, 1, 5, 5)
    assert shift_randomly(bright, 2, most=1, seed=3).mean() < 0.9
    assert torch.equal(shift_randomly(bright, 2, most=1, seed=3, padding="replicate"), bright)
