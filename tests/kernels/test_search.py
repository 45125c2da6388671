"""The kernels' indices are the specification's: every tier, every layout of the work, and as matrix units compute."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton.runtime import interpreter

from fastvq.backends import reference
from fastvq.kernels import frame, launch
from fastvq.kernels import search as kernels

from ..cases import ADVERSARIAL, COPIES, DTYPES, FLOAT64_ONLY, METRICS, first_copies, generator, layouts
from . import models

# One tile and less; several tiles of codes, with a rest; more codes than a tile of columns, and padding to fold into.
SHAPES = [(5, 9, 3), (7, 75, 33), (6, 130, 8)]


def mismatch(x, codebook, device, metric="l2", search=kernels.search):
    """Return the differences between the kernels' indices and the specification's, empty if there are none."""
    expected = reference.search(x, codebook, metric=metric)
    actual = search(x.to(device), codebook.to(device), metric=metric).cpu()
    assert (actual.dtype, actual.shape) == (torch.int64, expected.shape)
    wrong = (actual != expected).nonzero()
    return f"{len(wrong)} of {expected.numel()}, first {wrong[0].tolist()}" if len(wrong) else ""


@pytest.mark.parametrize("data", ADVERSARIAL)
def test_adversarial_data(data, device):
    """Test all data with each shape and each metric, which take turns: the interpreter is slow."""
    turn = list(ADVERSARIAL).index(data)
    for shape, metric in zip(SHAPES, itertools.cycle(METRICS[turn % 2 :] + METRICS[: turn % 2]), strict=False):
        assert not mismatch(*ADVERSARIAL[data](*shape, generator()), device, metric), (shape, metric)


@pytest.mark.parametrize("dtype", [(a, b) for a in DTYPES for b in DTYPES if a != torch.float32 or b != a], ids=str)
def test_dtypes(dtype, device):
    """Test all pairs of dtypes; each of rows and of codes meets both kinds of data."""
    data = ("clustered", "duplicate_codes")[sum(map(DTYPES.index, dtype)) % 2]
    x, codebook = ADVERSARIAL[data](15, 70, 20, generator())
    assert not mismatch(x.to(dtype[0]), codebook.to(dtype[1]), device)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("data", FLOAT64_ONLY)
def test_float64(data, metric, device):
    assert not mismatch(*FLOAT64_ONLY[data](8, 40, 5, generator()), device, metric)


@pytest.mark.parametrize(
    "shape", [(5, 40, 64), (5, 40, 128), (4, 70, 200), (3, 33, 513), (1, 1, 1), (3, 1, 16)], ids=str
)
@pytest.mark.parametrize("data", ["gaussian", "rounded_midpoints"])
def test_sizes(data, shape, device):
    assert not mismatch(*ADVERSARIAL[data](*shape, generator()), device)


def test_heads(device):
    heads = [ADVERSARIAL[data](9, 40, 6, generator()) for data in ("offset", "non_finite_codes")]
    x, codebook = (torch.stack(tensors) for tensors in zip(*heads, strict=True))
    assert not mismatch(x, codebook, device)
    assert not mismatch(x.transpose(0, 1).contiguous().transpose(0, 1), codebook, device, "dot")


def test_layouts(device):
    x, codebook = ADVERSARIAL["clustered"](9, 40, 6, generator())
    for _, view in layouts(x):
        assert not mismatch(view, codebook, device)
    for _, view in layouts(codebook):
        assert not mismatch(x, view, device)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)], ids=str)
def test_no_rows(shape, device):
    n, d = shape[-2], shape[-1]
    x = torch.zeros(0, d) if shape[0] == 0 else torch.zeros(2, 0, d)
    codebook = torch.zeros(n or 4, d) if shape[0] == 0 else torch.zeros(2, 4, d)
    assert kernels.search(x.to(device), codebook.to(device)).shape == x.shape[:-1]


def test_more_rows_than_a_launch_takes(device, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_ROWS", 4)
    x, codebook = ADVERSARIAL["clustered"](9, 40, 6, generator())
    assert not mismatch(x, codebook, device)
    assert not mismatch(x.expand(2, -1, -1), codebook.expand(2, -1, -1), device)


def test_rows_that_would_need_much_scratch(device, monkeypatch):
    monkeypatch.setattr(kernels, "SCRATCH", 1)
    monkeypatch.setattr(kernels, "LEAST_ROWS", 3)
    assert not mismatch(*ADVERSARIAL["clustered"](7, 33, 140, generator()), device)


def test_more_heads_than_a_launch_takes(device, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_HEADS", 2)
    assert not mismatch(torch.randn(5, 4, 6), torch.randn(5, 9, 6), device)


def no_bound_beside_a_giant():
    """Float64 codes so long that no row has a bound: infinity times nothing is a NaN, as which a row isn't finite."""
    codebook = torch.randn(128, 4, generator=generator(), dtype=torch.float64)
    codebook[5] = 1e160
    return torch.zeros(1, 4), codebook


def codes_that_overflow_about_their_mean():
    codebook = torch.full((3, 64), 1e38)
    codebook[:, 0] = torch.tensor([3.0e38, -3.0e38, -3.0e38])
    return codebook.double().mean(0, keepdim=True).float(), codebook


def rows_against_which_padding_scores_best():
    return -1e4 * (1 + torch.rand(4, 8, generator=generator())), 0.5 + torch.rand(10, 8, generator=generator())


def rows_that_cannot_be_scaled_down():
    return torch.full((1, 4096), 3.4e38), -torch.linspace(2.1e37, 2.12e37, 30)[:, None].expand(30, 4096)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "problem",
    [
        no_bound_beside_a_giant,
        codes_that_overflow_about_their_mean,
        rows_against_which_padding_scores_best,
        rows_that_cannot_be_scaled_down,
    ],
)
def test_beyond_what_can_be_bounded(problem, metric, device):
    assert not mismatch(*problem(), device, metric)


@models.needs_interpreter
def test_padding_is_never_read(monkeypatch):
    """A code in the padding would be read past the end of the codebook, which here is in the middle of a tensor."""
    x, codebook = rows_against_which_padding_scores_best()
    memory = torch.cat([codebook, codebook])
    first, last = memory[10:].data_ptr(), memory.data_ptr() + 4 * memory.numel()
    load = interpreter.InterpreterBuilder.create_masked_load

    def guarded(self, pointers, mask, *rest, **options):
        read = pointers.data[mask.data]
        assert not ((read >= first) & (read < last)).any(), "past the end of the codebook"
        return load(self, pointers, mask, *rest, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", guarded)
    assert not mismatch(x, memory[:10], "cpu", "dot")


def test_more_codes_than_can_be_numbered(device, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST", 39)
    with pytest.raises(ValueError, match="codebook: the Triton kernels take up to 39 codes, got 40"):
        kernels.search(torch.zeros(1, 2, device=device), torch.zeros(40, 2, device=device))


@pytest.mark.parametrize("splits", [1, 3, 32])
@pytest.mark.parametrize("data", ["gaussian", "exact_midpoints", "non_finite_vectors", "far_codes"])
def test_any_split_of_the_codes(data, splits, device, monkeypatch):
    monkeypatch.setattr(launch, "splits", lambda device, blocks, tiles: min(splits, tiles))
    assert not mismatch(*ADVERSARIAL[data](12, 300, 8, generator()), device)


def skip_tiers(monkeypatch, skipped):
    """Leaves all rows uncertified in the scans with a given number of terms."""
    tier = kernels._tier

    def skipping(x, codebook, frame, out, listed, work, terms, *rest):
        if terms not in skipped:
            return tier(x, codebook, frame, out, listed, work, terms, *rest)
        rows, count = listed or (
            torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]),
            torch.tensor(x.shape[1]),
        )
        work[0].copy_(rows)
        work[1].copy_(count)
        return None

    monkeypatch.setattr(kernels, "_tier", skipping)


TIER_DATA = ("gaussian", "codes_one_ulp_apart", "non_finite_codes", "mixed_magnitudes")


@pytest.mark.parametrize("skipped", [(1,), (3,), (1, 3)], ids=str)
@pytest.mark.parametrize("data", TIER_DATA)
def test_every_tier_by_itself(data, skipped, device, monkeypatch):
    """Test each tier on all data and with both metrics, which take turns."""
    metric = METRICS[(TIER_DATA.index(data) + sum(skipped) // 2) % 2]
    skip_tiers(monkeypatch, skipped)
    assert not mismatch(*ADVERSARIAL[data](12, 75, 17, generator()), device, metric)


def uncertified_shares(x, codebook, device, monkeypatch, metric="l2"):
    """Return the shares of rows that the first and the second scan leave uncertified."""
    counts = []
    work_list = kernels._work_list
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_work_list", lambda x: counts.append(work_list(x)) or counts[-1])
        assert not mismatch(x, codebook, device, metric)
    return [int(count.sum()) / len(x) for _, count in counts]


def test_the_first_scan_certifies_clustered_data(device, monkeypatch):
    first, second = uncertified_shares(*ADVERSARIAL["clustered"](512, 256, 32, generator()), device, monkeypatch)
    assert first < 0.01
    assert second == 0


def test_the_scans_certify_gaussian_data(device, monkeypatch):
    first, second = uncertified_shares(*ADVERSARIAL["gaussian"](512, 256, 32, generator()), device, monkeypatch)
    print(f"gaussian (512, 256, 32): uncertified after the first scan {first:.2%}, by the second {second:.2%}")
    assert first < 0.06
    assert second < 0.005


def test_one_far_code_costs_no_certificate(device, monkeypatch):
    x, codebook = ADVERSARIAL["clustered"](300, 128, 16, generator())
    x[x.sub(codebook[7]).norm(dim=1) < 3] = 0
    codebook[7] *= 1e4
    assert uncertified_shares(x, codebook, device, monkeypatch)[0] < 0.02


def test_an_offset_costs_no_certificate(device, monkeypatch):
    x, codebook = ADVERSARIAL["clustered"](300, 128, 16, generator())
    assert uncertified_shares(x + 10, codebook + 10, device, monkeypatch)[0] < 0.02


@pytest.mark.parametrize("data", COPIES)
def test_copies_cost_no_certificate(data, device, monkeypatch):
    """Test that no more rows stay uncertified than among the distinct codes, and that those are few."""
    metric = METRICS[list(COPIES).index(data) % 2]
    x, codebook = COPIES[data](16, 150, 20, generator())
    shares = uncertified_shares(x, codebook, device, monkeypatch, metric)
    assert shares == uncertified_shares(x, first_copies(codebook), device, monkeypatch, metric)
    if data != "copies_but_for_one_bit":
        assert shares == [0, 0]


def test_copies_of_several_heads_and_splits(device, monkeypatch):
    monkeypatch.setattr(launch, "splits", lambda device, blocks, tiles: min(3, tiles))
    heads = [COPIES[data](9, 100, 6, generator()) for data in ("zero_codes", "few_codes_among_zeros")]
    x, codebook = (torch.stack(tensors) for tensors in zip(*heads, strict=True))
    assert uncertified_shares(x, codebook, device, monkeypatch) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copies_of_other_dtypes(dtype, device, monkeypatch):
    for data in ("copies_in_random_order", "zero_codes"):
        x, codebook = (t.to(dtype) for t in COPIES[data](9, 40, 5, generator()))
        assert uncertified_shares(x, codebook, device, monkeypatch) == [0, 0]


def test_codes_that_share_their_slots_are_no_copies(device, monkeypatch):
    """Test a table of one slot, in which all codes meet."""
    monkeypatch.setattr(frame, "slots_for", lambda size: 1)
    assert not mismatch(*ADVERSARIAL["codes_themselves"](24, 75, 3, generator()), device)
    assert uncertified_shares(*COPIES["zero_codes"](9, 40, 3, generator()), device, monkeypatch) == [0, 0]


UNIT_DATA = ("gaussian", "rounded_midpoints", "offset", "equidistant_codes", "mixed_magnitudes", "nearly_equal_norms")


@models.needs_interpreter
@pytest.mark.parametrize("model", models.MODELS)
@pytest.mark.parametrize("data", UNIT_DATA)
def test_as_matrix_units_compute(data, model, monkeypatch):
    """Test all models on all data; each model and each kind of data meets both shapes."""
    calls = models.use(monkeypatch, models.MODELS[model])
    turn = UNIT_DATA.index(data) + list(models.MODELS).index(model)
    shape = [(20, 75, 33), (16, 40, 8)][turn % 2]
    assert not mismatch(*ADVERSARIAL[data](*shape, generator()), "cpu")
    assert calls


@models.needs_interpreter
def test_a_wrong_product_is_mended_within_the_bound_and_noticed_beyond(monkeypatch):
    """Test matrix units with errors at the bound and beyond.

    One that is as wrong as the bound allows changes no index, however many rows stay uncertified; one that is a
    thousand times as wrong does, so that these tests would notice it.
    """
    x, codebook = ADVERSARIAL["rounded_midpoints"](60, 75, 33, generator())
    models.use(monkeypatch, lambda a, b, c: models.at_the_limit(a, b, c, share=0.9))
    assert not mismatch(x, codebook, "cpu")
    models.use(monkeypatch, lambda a, b, c: models.at_the_limit(a, b, c, share=1000))
    assert mismatch(x, codebook, "cpu")
