"""The native ops as such: calls that fit nothing are refused, and never end the process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvq.backends import native

pytestmark = pytest.mark.skipif(not native.build_record()["built"], reason="no native library was built")

ROOT = Path(__file__).parents[2]
N, K, D, Q = 6, 5, 4, 2
X, CODES, STACK = torch.ones(N, D), torch.ones(K, D), torch.ones(Q, K, D)
INDICES, GROUPS = torch.zeros(N, dtype=torch.int64), torch.ones(2, 3, D)
SEED = torch.zeros((), dtype=torch.int64)
SUMS = torch.ones(2, 3)
SOFT = {"metric": 0, "scale": 1.0, "floor": 0.0}
CALLS = {
    "search": ((X, CODES), {"metric": 0, "mask": torch.ones(N, dtype=torch.bool)}),
    "topk_search": ((X, CODES, 2), {"metric": 0, "mask": torch.ones(N, dtype=torch.bool)}),
    "residual_search": ((X, [STACK, CODES]), {"metric": 0, "mask": torch.ones(N, dtype=torch.bool)}),
    "sample": ((X, CODES), {"temperature": 1.0, "seed": SEED, "metric": 0}),
    "quantize_forward": ((X, CODES, INDICES, True), {}),
    "quantize_backward": ((X, X, INDICES, X, torch.ones(())), {"gradient": 0, "commitment_weight": 1.0}),
    "residual_quantize_forward": ((X, [STACK], INDICES[:, None].repeat(1, Q), True), {}),
    "residual_quantize_backward": (
        (X, [STACK], INDICES[:, None].repeat(1, Q), X, torch.ones(Q)),
        {"gradient": 1, "commitment_weight": 1.0},
    ),
    "soft_assign_forward": (
        (GROUPS, CODES, torch.ones(2, 3, dtype=torch.bool), INDICES.view(2, 3)),
        {**SOFT, "statistics": True},
    ),
    "soft_assign_backward": (
        (GROUPS, CODES, None, SUMS, SUMS, INDICES.view(2, 3), SUMS, SUMS, torch.ones(2, K), GROUPS),
        {**SOFT, "need_x": True, "need_codebook": True},
    ),
    "accumulate": ((X, INDICES, K), {}),
    "ema_update_": (
        (CODES.clone(), torch.ones(K), CODES.clone(), torch.ones(K), CODES),
        {"decay": 0.5, "eps": 0.1, "weight": torch.ones(K)},
    ),
    "min_distance_": ((torch.ones(N), X, CODES), {}),
}

PLACE_OF_INDICES = {
    "quantize_forward": 2,
    "quantize_backward": 2,
    "residual_quantize_backward": 2,
    "soft_assign_forward": 3,
    "soft_assign_backward": 5,
    "accumulate": 1,
}


def wrong(tensor):
    """Tensors of other ranks, sizes and dtypes."""
    yield from (tensor[..., None], tensor.reshape(-1), tensor.new_empty(0), tensor.new_ones(()))
    for axis in range(tensor.dim()):
        yield tensor.narrow(axis, 0, 0)
        yield tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        yield torch.cat([tensor, tensor], axis)
    yield from (tensor.to(dtype) for dtype in (torch.float64, torch.int64, torch.bool, torch.float16, torch.complex64))


def variants(name):
    """Return the call with one argument replaced, for each argument."""
    arguments, options = CALLS[name]
    for i, value in enumerate(arguments):
        for other in replacements(value):
            yield (*arguments[:i], other, *arguments[i + 1 :]), options
    for key, value in options.items():
        for other in replacements(value):
            yield arguments, {**options, key: other}


def replacements(value):
    if isinstance(value, torch.Tensor):
        return wrong(value)
    if isinstance(value, list):
        places = [[*value[:i], other, *value[i + 1 :]] for i, one in enumerate(value) for other in wrong(one)]
        return ([], *places)
    if isinstance(value, bool) or value is None:
        return ()
    return (-1, 0, 7, 2**40) if isinstance(value, int) else (-1.0, 0.0, float("nan"), float("inf"))


def call(name, arguments, options):
    return getattr(torch.ops.fastvq, name)(*each_tensor(torch.clone, arguments), **options)


def each_tensor(function, arguments):
    """Return the arguments with function(tensor) in place of each tensor, those of lists too."""
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(each_tensor(function, a) for a in arguments)
    return function(arguments) if isinstance(arguments, torch.Tensor) else arguments


@pytest.fixture(scope="module", autouse=True)
def loaded():
    assert native.instruction_set()


@pytest.mark.parametrize("name", CALLS)
def test_the_call_is_right(name):
    """Control of the tests below: the arguments that they spoil are accepted as they are."""
    call(f"native_{name}", *CALLS[name])


@pytest.mark.parametrize("prefix", ["native_", ""])
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_fit_nothing_are_refused(name, prefix):
    """Either it is an error, or the results have the right shapes for what came: nothing is read beyond its end."""
    refused = 0
    for arguments, options in variants(name):
        try:
            call(prefix + name, arguments, options)
        except (RuntimeError, ValueError, TypeError, IndexError, MemoryError):
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("prefix", ["native_", ""])
@pytest.mark.parametrize("name", PLACE_OF_INDICES)
def test_an_index_out_of_range(name, prefix):
    arguments, options = CALLS[name]
    place = PLACE_OF_INDICES[name]
    beyond = () if name == "quantize_backward" else (K, 2**40)  # it has no codebook to index
    for bad in (-2, -(2**40), *beyond):
        indices = arguments[place].clone()
        indices.view(-1)[3] = bad
        with pytest.raises(IndexError, match=r"^indices: must"):
            call(prefix + name, (*arguments[:place], indices, *arguments[place + 1 :]), options)


def strided(tensor):
    """Return the same values with other strides."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0] if tensor.dim() else tensor


@pytest.mark.parametrize("name", CALLS)
def test_strides_change_nothing(name):
    arguments, options = CALLS[name]
    state, views = each_tensor(torch.clone, arguments), each_tensor(strided, arguments)
    expected = getattr(torch.ops.fastvq, f"native_{name}")(*state, **options)
    actual = getattr(torch.ops.fastvq, f"native_{name}")(
        *views, **{k: each_tensor(strided, v) for k, v in options.items()}
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for a, b in zip(views, state, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["search", "topk_search", "residual_search"])
@pytest.mark.parametrize("heads", [False, True])
def test_masked_rows_are_not_searched(name, heads):
    if heads and name == "residual_search":
        pytest.skip("has no heads")
    g = torch.Generator().manual_seed(0)
    shape = (3, 40, D) if heads else (40, D)
    x, codes = torch.randn(shape, generator=g), torch.randn((3, K, D) if heads else (K, D), generator=g)
    codes = [torch.randn(Q, K, D, generator=g)] if name == "residual_search" else codes
    more = (2,) if name == "topk_search" else ()
    run = getattr(torch.ops.fastvq, f"native_{name}")
    for mask in (torch.rand(shape[:-1], generator=g) < 0.4, *(torch.full(shape[:-1], yes) for yes in (False, True))):
        expected = run(x, codes, *more)
        expected[~mask] = -1
        assert torch.equal(run(x, codes, *more, mask=mask), expected)
    if heads:  # a head without rows beside one with all
        mask = torch.tensor([True, False, True])[:, None].repeat(1, 40)
        assert bool((run(x, codes, *more, mask=mask)[1] == -1).all())


@pytest.mark.parametrize("seed", [0, 1])
def test_random_calls_do_not_end_the_process(seed):
    """In a process of their own; `python -m tests.backends.fuzz SEED COUNT` makes more of them."""
    command = [sys.executable, "-m", "tests.backends.fuzz", str(seed), "2000"]
    environment = os.environ | {"MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1000 < int(done.stdout) < 2000


def overlapping():
    """Yield arguments of ema_update_ that share memory, and the one that must not."""
    (codebook, sizes, averages, counts, sums), _ = CALLS["ema_update_"]
    both = torch.ones(K + 1, D)
    yield (codebook, sizes, codebook, counts, sums), "codebook"
    yield (codebook, sizes, averages, counts, codebook), "codebook"
    yield (codebook, sizes, averages, sizes, sums), "cluster_size"
    yield (codebook, sizes, averages, counts, averages), "embed_avg"
    yield (both[:K], sizes, both[1:], counts, sums), "codebook"
    yield (codebook, torch.ones(1).expand(K), averages, counts, sums), "cluster_size"
    yield (codebook, codebook[:, 0], averages, counts, sums), "codebook"
    yield (torch.ones(K, 1).expand(K, D), sizes, averages, counts, sums), "codebook"


@pytest.mark.parametrize(("arguments", "name"), [*overlapping()])
def test_memory_that_is_written_twice_or_read(arguments, name):
    with pytest.raises(RuntimeError, match=f"^{name}: must "):
        torch.ops.fastvq.native_ema_update_(*arguments, decay=0.5, eps=0.1)
    x = torch.ones(N, D)
    for distances, centers in ((x[:, 0], CODES), (x.flatten()[:N], CODES), (torch.ones(1).expand(N), CODES)):
        with pytest.raises(RuntimeError, match=r"^distances: must "):
            torch.ops.fastvq.native_min_distance_(distances, x, centers)


def test_interleaved_memory_is_no_overlap():
    memory = torch.ones(K, 2 * D + 2)
    codebook, averages, sizes, counts = memory[:, :D], memory[:, D : 2 * D], memory[:, -2], memory[:, -1]
    torch.ops.fastvq.native_ema_update_(codebook, sizes, averages, counts, torch.full((K, D), 3.0), decay=0.5, eps=0.0)
    assert averages.eq(2).all()
    assert codebook.eq(2).all()
    assert sizes.eq(1).all()


def test_every_kernel_is_called_above():
    assert set(CALLS) == set(native.KERNELS)
    assert len(list(itertools.chain(*map(variants, CALLS)))) > 500
