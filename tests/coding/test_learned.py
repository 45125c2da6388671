"""Files coded with a learned prior: as long as it says, the same by any number of threads, refused without it."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastvq import coding
from fastvq.coding import container
from fastvq.errors import CodingError
from fastvq.models import TransformerPrior
from fastvq.models.priors import PRIORS

from ..cases import generator
from .test_codec import correlated, mutated, resealed

KINDS = PRIORS
OPTIONS = {"transformer": {"dim": 16, "depth": 2, "heads": 2}, "pixelcnn": {"dim": 16, "depth": 3}, "lstm": {"dim": 16}}


def make(kind="transformer", size=13, grid=(3, 4), seed=0, **options):
    """A prior that is sure of some codes and not of others."""
    torch.manual_seed(seed)
    prior = KINDS[kind](size, grid, **OPTIONS[kind] | options).eval()
    for parameter in prior.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[-1]), generator=generator(seed))
    torch.nn.init.normal_(prior.head.weight, std=0.6, generator=generator(seed))
    return prior


def coded(codes, prior, **options):
    return coding.encode(codes, prior.codebook_size, model="prior", prior=prior, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("grid", [(1,), (6,), (3, 4)])
def test_round_trip(kind, size, grid):
    prior = make(kind, size, grid)
    for count in (0, 1, 300):
        codes = torch.randint(0, size, (count, *grid), generator=generator())
        data = coded(codes, prior)
        assert torch.equal(coding.decode(data, prior=prior), codes)
        assert coding.read_header(data).prior.identity == coding.prior_fingerprint(prior)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_in_training_codes_as_in_eval(kind):
    """Labels are left out of some samples in training, which no decoder could guess."""
    prior = make(kind, 9, (3, 4), classes=3, label_dropout=0.5)
    codes, labels = torch.randint(0, 9, (40, 3, 4), generator=generator()), torch.arange(40) % 3
    data = coded(codes, prior, labels=labels)
    before = torch.get_rng_state()
    assert coded(codes, prior.train(), labels=labels) == data
    assert torch.equal(coding.decode(data, prior=prior), codes)
    assert prior.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_as_long_as_the_prior_says(kind):
    """Within half a per cent and 64 bytes of -log2 p in floats, labels included."""
    prior = make(kind, 64, (5, 5), classes=10)
    labels = torch.randint(0, 10, (300,), generator=generator())
    codes = prior.sample(300, labels, generator=generator())
    for given, extra in ((labels, 300 * math.log2(10)), (None, 0.0)):
        ideal = (float(prior.bits(codes, given).sum()) + extra) / 8
        assert ideal < 0.9 * codes.numel() * 6 / 8 or given is None
        data = coded(codes, prior, labels=given)
        assert abs(len(data) - ideal) <= 0.005 * ideal + 64
        assert torch.equal(coding.decode(data, prior=prior), codes)
        measured = coding.measure(codes, 64, prior=prior, labels=given)["prior"]
        assert measured["bytes"] == len(data)
        assert measured["bits_per_index"] * codes.numel() / 8 == pytest.approx(ideal, rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_by_any_number_of_threads_and_beside_any_others(kind):
    prior = make(kind)
    codes = correlated(300, 3, 4, 13)
    torch.set_num_threads(1)
    data = coded(codes, prior)
    torch.set_num_threads(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert coded(codes, prior) == data
    assert torch.equal(coding.decode(data, prior=prior), codes)


FILE_OF_VERSION_1 = (
    "4656511a010200033132333435363738050000000200000002000000030000000140815ea2e02dfad8"
    "380e70d0c3b92d5b1f2e6c6422eb3719857260433210312c"
)


def test_the_format_stays_readable():
    """Weights that no random generator makes: an old file must decode to the same codes for ever."""
    prior = TransformerPrior(5, (2, 3), dim=8, depth=1, heads=2, classes=2).eval()
    with torch.no_grad():
        for i, parameter in enumerate(prior.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.int64) * 37 + 11 * i
            parameter.copy_((ramp % 101 - 50).reshape(parameter.shape).float() / 64)
    codes = torch.tensor([[[0, 1, 2], [3, 4, 0]], [[4, 4, 0], [2, 2, 1]]])
    data = coded(codes, prior, labels=torch.tensor([0, 1]), fingerprint=b"12345678")
    assert data.hex() == FILE_OF_VERSION_1
    assert torch.equal(coding.decode(data, prior=prior), codes)


def test_another_prior_is_refused():
    prior, codes = make(classes=3), correlated(9, 3, 4, 13)
    data = coded(codes, prior)
    with pytest.raises(CodingError, match=r"coded with the prior [0-9a-f]{16}: decoding needs it"):
        coding.decode(data)
    for other in (make(seed=1, classes=3), make(heads=4, classes=3), make(classes=4)):
        with pytest.raises(CodingError, match="coded with another prior"):
            coding.decode(data, prior=other)
    with torch.no_grad():
        prior.head.bias[0] += 1e-6
    with pytest.raises(CodingError, match="coded with another prior"):
        coding.decode(data, prior=prior)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (torch.zeros(2, 4, 3), {}, "codes: must be integers"),
        (torch.zeros(2, 4, 3).long(), {}, r"knows grids \(3, 4\) of 13 codes; these are \(4, 3\) of 13"),
        (torch.zeros(2).long(), {}, r"these are \(\) of 13"),
        (torch.full((2, 3, 4), -1), {}, "a prior knows no vectors without a code"),
        (torch.zeros(2, 3, 4).long(), {"labels": torch.zeros(3).long()}, r"labels: must be int64 of shape \(2,\)"),
        (torch.zeros(2, 3, 4).long(), {"labels": torch.tensor([0, 3])}, r"labels: must lie in \[0, 3\)"),
        (torch.zeros(2, 3, 4).long(), {"prior": None}, "needs prior="),
    ],
)
def test_what_a_prior_cannot_code_is_named(codes, options, message):
    options = {"prior": make(classes=3), "model": "prior"} | options
    with pytest.raises(CodingError, match=message):
        coding.encode(codes, 13, **options)


def test_mutated_and_hostile_files():
    prior, codes = make(classes=3), correlated(20, 3, 4, 13)
    data = coded(codes, prior, labels=torch.arange(20) % 3)
    choose, refused = random.Random(0), 0
    for _ in range(1000):
        try:
            assert torch.equal(coding.decode(mutated(data, choose), prior=prior), codes)
        except CodingError:
            refused += 1
    assert refused > 950
    for _ in range(100):
        try:
            assert torch.equal(coding.decode(resealed(mutated(data, choose)), prior=prior, max_indices=1000), codes)
        except CodingError as error:
            refused += "aren't those that were encoded" in str(error)
    assert refused > 970
    header = coding.read_header(data)
    for shape in [(1 << 31, 3, 4), (1 << 20, 3, 4), (3, 1 << 20, 4)]:
        with pytest.raises(CodingError, match="codes"):
            coding.decode(container.pack(header._replace(shape=shape), b"\xff" * 64), prior=prior)
