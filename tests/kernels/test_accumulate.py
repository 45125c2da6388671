"""Counts and sums, to the bit, of rows that lie in one piece, at the borders of pieces and across many."""

from __future__ import annotations

import pytest
import torch

from fastvq.backends import reference
from fastvq.kernels import accumulate as kernels
from fastvq.kernels.accumulate import PIECE, accumulate

from ..cases import DTYPES, generator, large_rows, layouts, one_code, skewed, skipped, uniform

MARGIN = 512


def guard(monkeypatch):
    """Put NaNs into the output of a kernel, and margins around it that nothing may write.

    The margins hold ones, which could be an index, since nothing may read them either.
    """
    buffers = []

    def new_empty(self, *shape, dtype=None, device=None):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = torch.ones(shape.numel() + 2 * MARGIN, dtype=dtype or self.dtype, device=device or self.device)
        buffers.append(buffer)
        inside = buffer[MARGIN:-MARGIN].view(shape)
        return inside.fill_(torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    monkeypatch.undo()
    for buffer in buffers:
        assert bool((buffer[:MARGIN] == 1).all())
        assert bool((buffer[-MARGIN:] == 1).all())


@pytest.fixture
def poison(monkeypatch):
    yield from guard(monkeypatch)


def check(x, indices, size, device):
    actual = accumulate(x.to(device), indices.to(device), size)
    for a, b in zip(actual, reference.accumulate(x, indices, size), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a.cpu(), b)
    return actual


@pytest.mark.parametrize("kind", [uniform, one_code, skipped, skewed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype, kind, device, poison):
    for n, k, d in [(1, 1, 1), (17, 31, 3), (300, 7, 70), (2 * PIECE + 5, 3, 5), (0, 5, 3)]:
        check(large_rows(n, d, dtype), kind(n, k), k, device)


@pytest.mark.parametrize("dim", [1, 8, 129])
def test_many_pieces_in_blocks_of_rows_and_columns(dim, device, poison):
    """More pieces of one code than `_merge` adds at once, and codes before, between and after without a row."""
    n = (kernels.tile(dim)[0] + 2) * PIECE
    indices = torch.where(torch.arange(n) % 50 == 0, 5, 2)
    check(large_rows(n, dim), indices, 7, device)


ENDS = (-1, 0, 1)


@pytest.mark.parametrize("first", [PIECE + e for e in ENDS])
@pytest.mark.parametrize("second", [PIECE + e for e in ENDS] + [2 * PIECE + e for e in ENDS])
def test_codes_that_end_at_a_border(first, second, device, poison):
    """`first` rows of code 0, then `second` of code 2: with none or one skipped before, and a code of one row after."""
    for before in (0, 1):
        counts = torch.tensor([before, first, second, 1])
        check(large_rows(int(counts.sum()), 2), torch.tensor([-1, 0, 2, 3]).repeat_interleave(counts), 5, device)


@pytest.mark.parametrize("count", [PIECE, PIECE + 1, 3 * PIECE])
def test_skipped_rows_over_borders(count, device, poison):
    indices = torch.full((count + PIECE,), -1)
    indices[count:] = 1
    check(large_rows(len(indices), 3), indices, 2, device)


def test_a_code_depends_on_nothing_but_its_rows(device):
    """Test that the position of rows among the sorted ones, and other rows, do not matter.

    Rows that cancel leave only the roundings, which another order would change.
    """
    large = 1e12 * torch.randn(3 * PIECE + 7, 4, generator=generator()).double()
    order = torch.randperm(2 * len(large), generator=generator())
    x, more = torch.cat([large, -large])[order].to(device), large_rows(PIECE + 100, 4).double().to(device)
    alone = accumulate(x, torch.ones(len(x), dtype=torch.int64, device=device), 2)[1][1]
    assert (alone != 0).all()
    assert (alone.abs() < 1).all()
    indices = torch.cat([torch.zeros(len(more)), torch.ones(len(x))]).long().to(device)
    assert torch.equal(accumulate(torch.cat([more, x]), indices, 2)[1][1], alone)


def test_the_same_at_every_run(device):
    x, indices = large_rows(1500, 6).to(device), skewed(1500, 5).to(device)
    first, second = accumulate(x, indices, 5), accumulate(x, indices, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sums_are_rounded_once(device):
    """In float32 the ones would vanish beside 2^25."""
    x = torch.tensor([2.0**25, *[1.0] * (2 * PIECE), -(2.0**25)], device=device)[:, None]
    _, sums = accumulate(x, torch.zeros(len(x), dtype=torch.int64, device=device), 1)
    assert sums.item() == 2 * PIECE


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_touches_its_code_alone(bad, device):
    x, indices = large_rows(PIECE + 40, 4), uniform(PIECE + 40, 4)
    indices[5], indices[6] = -1, 2
    x[5] = bad
    check(x, indices, 4, device)
    x[6, 1] = torch.inf
    check(x, indices, 4, device)


def test_layouts(device):
    x, indices = large_rows(50, 6), uniform(50, 8)
    for _, other in layouts(x):
        check(other, indices, 8, device)
    check(x, torch.stack([indices, indices], 1)[:, 1], 8, device)
    check(x[:1].expand(50, 6), indices, 8, device)


@pytest.mark.parametrize("size", [2**15 - 1, 2**15])
def test_narrow_and_wide_keys(size, device, monkeypatch):
    """Only the counts are compared: the sums of this many codes take too long here."""
    indices = torch.randint(-1, size, (200,), generator=generator())
    indices[:3] = torch.tensor([size - 1, 0, -1])
    dtypes = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda x, order, keys, *arguments, **options: dtypes.append(keys.dtype)

    monkeypatch.setattr(kernels, "_pieces", Recorder())
    counts, _ = accumulate(large_rows(200, 1).to(device), indices.to(device), size)
    assert dtypes == [torch.int16 if size < 2**15 else torch.int32]
    assert torch.equal(counts.long().cpu(), torch.bincount(indices[indices >= 0], minlength=size))


@pytest.mark.parametrize("bad", [-2, 4, 2**40, -(2**40), 2**16])
def test_an_index_out_of_range_is_named(bad):
    with pytest.raises(IndexError, match=rf"indices: must lie in \[-1, 4\), got {bad}"):
        accumulate(large_rows(3, 2), torch.tensor([0, bad, 1]), 4)


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_an_index_out_of_range_writes_nothing_elsewhere(bad, device, monkeypatch, poison):
    """This holds even where no assertion of the device stops the kernel, as in the interpreter."""
    if device.type != "cpu":
        pytest.skip("the device asserts")
    monkeypatch.setattr(kernels, "check_index_range", lambda *_: None)
    x, indices = large_rows(3 * PIECE, 2), torch.zeros(3 * PIECE, dtype=torch.int64)
    expected = reference.accumulate(x[:-PIECE], indices[:-PIECE], 4)
    indices[-PIECE:] = bad
    for a, b in zip(accumulate(x, indices, 4), expected, strict=True):
        assert torch.equal(a, b)
