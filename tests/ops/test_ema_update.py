"""The op `ema_update_`, against the formulas of its docstring in float64."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.backends import reference

from ..cases import close, generator, weighted_by_loop


def state_and_statistics(k, d, seed=0):
    g = generator(seed)
    cluster_size = 5 * torch.rand(k, generator=g)
    embed_avg = torch.randn(k, d, generator=g)
    codebook = torch.randn(k, d, generator=g)
    counts = torch.randint(0, 4, (k,), generator=g).float()
    return [codebook, cluster_size, embed_avg], [counts, torch.randn(k, d, generator=g) * counts[:, None]]


def by_definition(state, statistics, decay, eps):
    codebook, size, average, counts, sums = (t.double() for t in (*state, *statistics))
    size = decay * size + (1 - decay) * counts
    average = decay * average + (1 - decay) * sums
    total = size.sum()
    smoothed = (size + eps) / (total + len(size) * eps) * total
    moved = average / smoothed[:, None]
    return torch.where((smoothed > 0)[:, None], moved, codebook).float(), size.float(), average.float()


def update_by(backend, state, statistics, **options):
    state = [t.clone() for t in state]
    with fastvq.use_backend(backend):
        assert fastvq.ema_update_(*state, *statistics, **options) is None
    return state


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (100, 33)], ids=str)
def test_is_the_definition(shape, backend):
    for decay in (0.0, 0.3, 0.8, 0.99, 1.0):
        for eps in (0.0, 1e-5, 0.1):
            state, statistics = state_and_statistics(*shape)
            expected = by_definition(state, statistics, decay, eps)
            for actual in (
                update_by(backend, state, statistics, decay=decay, eps=eps),
                update_by("reference", state, statistics, decay=decay, eps=eps),
            ):
                for a, b in zip(actual, expected, strict=True):
                    close(a, b)


def test_the_ends_of_decay_are_exact(backend):
    state, statistics = state_and_statistics(50, 8)
    kept = update_by(backend, state, statistics, decay=1.0, eps=1e-5)
    replaced = update_by(backend, state, statistics, decay=0.0, eps=1e-5)
    for kind in (1, 2):
        assert torch.equal(kept[kind], state[kind])
        assert torch.equal(replaced[kind], statistics[kind - 1])


def weights(k):
    """Shares of 0 and 1 with decay 0.75, between and beyond them."""
    return torch.tensor([0.0, 4.0, 1.0, 0.3, 2.5])[torch.arange(k) % 5]


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (100, 33)], ids=str)
def test_a_weight_scales_the_step_of_each_code(shape, backend):
    for decay in (0.0, 0.75, 1.0):
        state, statistics = state_and_statistics(*shape)
        weight = weights(shape[0])
        actual = update_by(backend, state, statistics, decay=decay, eps=1e-5, weight=weight)
        for a, b in zip(actual, weighted_by_loop(state, statistics, weight, decay, 1e-5), strict=True):
            close(a, b)
        for k, share in enumerate(((1 - decay) * weight).tolist()):
            if share in (0, 1):
                source = statistics if share else state[1:]
                assert torch.equal(actual[1][k], source[0][k])
                assert torch.equal(actual[2][k], source[1][k])


def test_a_weight_of_one_changes_no_bit(backend):
    state, statistics = state_and_statistics(100, 33)
    plain = update_by(backend, state, statistics, decay=0.8, eps=1e-5)
    weighted = update_by(backend, state, statistics, decay=0.8, eps=1e-5, weight=torch.ones(200)[::2])
    for a, b in zip(plain, weighted, strict=True):
        assert torch.equal(a, b)


def test_refuses_tensors_that_overlap(backend):
    """Memory that is written must not be read under another name, nor written twice."""
    (codebook, size, average), (counts, sums) = state_and_statistics(20, 6)
    storage = torch.rand(20, 13)
    overlapping = [
        ("embed_avg", codebook, size, codebook, counts, sums),
        ("sums", codebook, size, average, counts, average),
        ("counts", codebook, size, average, size, sums),
        ("counts", storage[:, :6], size, average, storage[:, 5], sums),
        ("embed_avg", storage[:, :6], storage[:, 12], storage[:, 5:11], counts, sums),
        ("embed_avg: must have memory of its own", codebook, size, torch.rand(6).expand(20, 6), counts, sums),
    ]
    for name, *tensors in overlapping:
        before = [t.clone() for t in tensors]
        with fastvq.use_backend(backend), pytest.raises(ValueError, match=f"^{name}"):
            fastvq.ema_update_(*tensors, decay=0.8, eps=1e-5)
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    with fastvq.use_backend(backend), pytest.raises(ValueError, match=r"^weight: must not overlap cluster_size"):
        fastvq.ema_update_(codebook, size, average, counts, sums, decay=0.8, eps=1e-5, weight=size)
    shared = torch.zeros(20, 6)  # read twice
    with fastvq.use_backend(backend):
        fastvq.ema_update_(codebook, size, average, shared[:, 0], shared, decay=1.0, eps=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_codebook_without_vectors_stays(eps, backend):
    codebook = torch.randn(6, 4, generator=generator())
    empty = [torch.zeros(6), torch.zeros(6, 4)]
    after = update_by(backend, [codebook, *empty], empty, decay=0.9, eps=eps)
    assert torch.equal(after[0], codebook)
    assert not any(t.any() for t in after[1:])


def test_without_smoothing_a_code_of_size_zero_stays(backend):
    state, statistics = state_and_statistics(5, 3)
    state[1][2] = statistics[0][2] = 0
    after = update_by(backend, state, statistics, decay=0.5, eps=0.0)
    assert torch.equal(after[0][2], state[0][2])
    assert bool(after[0].isfinite().all())


def test_state_may_be_views(backend):
    """Views may share a storage: the update writes their elements and no others."""
    state, statistics = state_and_statistics(20, 6)
    expected = update_by(backend, state, statistics, decay=0.8, eps=1e-5)
    storage = torch.full((20, 2 * 6 + 1, 2), torch.nan)
    views = [storage[:, :6, 0], storage[:, 12, 0], storage[:, 6:12, 0]]
    for view, values in zip(views, state, strict=True):
        view.copy_(values)
    with fastvq.use_backend(backend):
        fastvq.ema_update_(*views, statistics[0], statistics[1].T.contiguous().T, decay=0.8, eps=1e-5)
    for view, values in zip(views, expected, strict=True):
        assert torch.equal(view, values)
    assert bool(storage[..., 1].isnan().all())


def test_threads_change_no_bit(backend):
    state, statistics = state_and_statistics(3000, 40)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(update_by(backend, state, statistics, decay=0.8, eps=1e-5))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_reference_and_native_agree_closely():
    state, statistics = state_and_statistics(200, 16)
    native = update_by("native", state, statistics, decay=0.8, eps=1e-5)
    reference.ema_update_(*state, *statistics, decay=0.8, eps=1e-5)
    for a, b in zip(native, state, strict=True):
        close(a, b)


STATE = {
    "codebook": torch.zeros(5, 4),
    "cluster_size": torch.zeros(5),
    "embed_avg": torch.zeros(5, 4),
    "counts": torch.zeros(5),
    "sums": torch.zeros(5, 4),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *[({name: t.half()}, TypeError, f"{name}: must be float32 .* got torch.float16") for name, t in STATE.items()],
        *[({name: t[:-1]}, ValueError, f"{name}: must have shape") for name, t in STATE.items() if name != "codebook"],
        *[
            ({n: t.to("meta")}, ValueError, f"{n}: must be on the device of codebook")
            for n, t in STATE.items()
            if n != "codebook"
        ],
        ({"codebook": torch.zeros(5)}, ValueError, r"codebook: must have shape \(K, D\), got \(5,\)"),
        ({"decay": 1.5}, ValueError, r"decay: must lie in \[0, 1\], got 1.5"),
        ({"decay": -0.1}, ValueError, "decay: must lie in"),
        ({"eps": -1e-5}, ValueError, "eps: must not be negative"),
        ({"eps": float("nan")}, ValueError, "eps: must not be negative"),
    ],
)
def test_refuses_by_name(change, error, message):
    with pytest.raises(error, match=message):
        fastvq.ema_update_(**{**STATE, "decay": 0.8, "eps": 1e-5, **change})
