"""The op `sample`: exactly the random codes of the definition on every backend, and their probabilities."""

from __future__ import annotations

import math

import pytest
import torch

import fastvq
from fastvq.backends import reference
from fastvq.backends.noise import philox

from ..cases import ADVERSARIAL, DTYPES, FLOAT64_ONLY, HALF, METRICS, generator

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


def philox_by_integers(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def by_definition(x, codebook, temperature, seed, metric):
    """Apply the docstring of `fastvq.sample`, scalar by scalar."""
    indices = []
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    for n, row in enumerate(x.double().tolist()):
        scored = []
        for k, code in enumerate(codebook.double().tolist()):
            total = 0.0
            for a, b in zip(row, code, strict=True):
                total += (a - b) * (a - b) if metric == "l2" else a * b
            word = philox_by_integers((k // 4, n, 0, 0), key)[k % 4]
            noise = -math.log(-math.log((word + 0.5) * 2**-32))
            scored.append(((-math.sqrt(total) if metric == "l2" else total) / temperature + noise, -k))
        indices.append(-max(scored)[1])
    return torch.tensor(indices)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The words are the known answers of Random123 for philox4x32 with ten rounds."""
    actual = philox(tuple(torch.tensor(c) for c in counter), torch.tensor(key))
    assert tuple(int(word) for word in actual) == words


@pytest.mark.parametrize("metric", METRICS)
def test_reference_is_the_definition(metric):
    for n, size, d, temperature in [(1, 1, 1, 1.0), (20, 9, 3, 0.3), (15, 30, 6, 5.0)]:
        x, codebook = torch.randn(n, d), torch.randn(size, d)
        for seed in (0, -1, int(SEED)):
            expected = by_definition(x, codebook, temperature, seed, metric)
            options = {"temperature": temperature, "seed": torch.tensor(seed), "metric": metric}
            assert torch.equal(reference.sample(x, codebook, **options), expected)


@pytest.mark.parametrize("data", [*ADVERSARIAL, *FLOAT64_ONLY])
def test_equals_the_reference(data, backend):
    for dtype in DTYPES:
        if (data in FLOAT64_ONLY and dtype != torch.float64) or (data != "gaussian" and dtype in HALF):
            continue
        x, codebook = (t.to(dtype) for t in (ADVERSARIAL | FLOAT64_ONLY)[data](23, 130, 6, generator()))
        for metric in METRICS:
            for temperature in (0.01, 1.0, 300.0):
                options = {"temperature": temperature, "seed": SEED, "metric": metric}
                expected = reference.sample(x, codebook, **options)
                with fastvq.use_backend(backend):
                    assert torch.equal(fastvq.sample(x, codebook, **options), expected), (dtype, metric, temperature)


@pytest.mark.parametrize("tile", [1, 3, 13, 8192])
def test_tiles_threads_and_backends_agree(tile, monkeypatch):
    x, codebook = ADVERSARIAL["clustered"](300, 500, 16, generator())
    options = {"temperature": 0.7, "seed": SEED}
    expected = reference.sample(x, codebook, **options)
    monkeypatch.setattr("fastvq.backends.torch.search.TILE_CODES", tile)
    monkeypatch.setattr("fastvq.backends.torch.search.tile_elements", lambda device: 2000)
    with fastvq.use_backend("torch"):
        assert torch.equal(fastvq.sample(x, codebook, **options), expected)
        torch.set_num_threads(1)
        assert torch.equal(fastvq.sample(x, codebook, **options), expected)


def test_heads_have_noise_of_their_own(backend):
    x, codebook = torch.randn(50, 4).expand(3, 50, 4), torch.randn(60, 4).expand(3, 60, 4)
    with fastvq.use_backend(backend):
        indices = fastvq.sample(x, codebook, temperature=3.0, seed=SEED)
        assert torch.equal(indices, reference.sample(x, codebook, temperature=3.0, seed=SEED))
        assert torch.equal(indices[0], fastvq.sample(x[0], codebook[0], temperature=3.0, seed=SEED))
    assert not torch.equal(indices[0], indices[1])


@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_as_probable_as_the_softmax_says(metric, backend):
    """Pearson's chi-square over 40,000 draws; its 99.9 % quantile for 7 degrees of freedom is 24.3."""
    x, codebook = torch.randn(1, 4, generator=generator()), torch.randn(8, 4, generator=generator(1))
    distances = torch.cdist(x, codebook)[0]
    p = (-distances if metric == "l2" else (x @ codebook.T)[0]).div(1.5).softmax(0)
    draws = 40_000
    with fastvq.use_backend(backend):
        for seed in range(3):
            options = {"temperature": 1.5, "seed": torch.tensor(seed), "metric": metric}
            counts = fastvq.sample(x.expand(draws, 4), codebook, **options).bincount(minlength=8)
            assert ((counts - draws * p).square() / (draws * p)).sum() < 24.3


def test_a_cold_sample_is_the_nearest_code(backend):
    x, codebook = ADVERSARIAL["gaussian"](200, 100, 8, generator())
    with fastvq.use_backend(backend):
        assert torch.equal(fastvq.sample(x, codebook, temperature=1e-9, seed=SEED), fastvq.search(x, codebook))


def test_compiles_with_a_seed_that_changes():
    def step(x, codebook):
        seed = torch.randint(2**63 - 1, ())
        return fastvq.sample(x, codebook, temperature=1.0, seed=seed)

    x, codebook = torch.randn(64, 4), torch.randn(50, 4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    expected = [step(x, codebook) for _ in range(2)]
    torch.manual_seed(5)
    assert all(torch.equal(compiled(x, codebook), one) for one in expected)
    assert not torch.equal(*expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: must be positive, got 0.0"),
        ({"seed": torch.tensor(1.0)}, "seed: must be one int64 number, got torch.float32"),
        ({"seed": torch.tensor([1])}, "seed: must be one int64 number"),
        ({"metric": "cosine"}, "metric: must be 'l2' or 'dot', got 'cosine'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fastvq.sample(torch.zeros(3, 2), torch.zeros(4, 2), **({"temperature": 1.0, "seed": SEED} | options))
