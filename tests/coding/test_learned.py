"""Files coded with a learned prior: size, independence of threads, and refusal without the prior."""

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

# Those of several scales are tested in tests/models/test_scale_priors.py, those of stages alone further below.
KINDS = {kind: prior for kind, prior in PRIORS.items() if not prior.in_scales and not prior.in_stages}
OPTIONS = {
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "pixelcnn": {"dim": 16, "depth": 3},
    "lstm": {"dim": 16},
    "depth": {"dim": 16, "depth": 2, "heads": 2, "stage_dim": 8, "stage_depth": 2},
}


def make(kind="transformer", size=13, grid=(3, 4), seed=0, **options):
    """Return a prior that is certain of some indices and uncertain of others."""
    torch.manual_seed(seed)
    prior = KINDS[kind](size, grid, **OPTIONS[kind] | options).eval()
    for parameter in prior.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[-1]), generator=generator(seed))
    torch.nn.init.normal_(prior.head.weight, std=0.6, generator=generator(seed))
    return prior


def coded(indices, prior, **options):
    return coding.encode(indices, prior.codebook_size, model="prior", prior=prior, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("grid", [(1,), (6,), (3, 4), (2, 1, 2)])
def test_round_trip(kind, size, grid):
    prior = make(kind, size, grid)
    for count in (0, 1, 300):
        indices = torch.randint(0, size, (count, *grid), generator=generator())
        data = coded(indices, prior)
        assert torch.equal(coding.decode(data, prior=prior), indices)
        assert coding.read_header(data).prior.fingerprint == coding.prior_fingerprint(prior)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_in_training_mode_codes_as_in_eval(kind):
    """In training, labels of some samples are left out, which a decoder could not guess."""
    prior = make(kind, 9, (3, 4), classes=3, label_dropout=0.5)
    indices, labels = torch.randint(0, 9, (40, 3, 4), generator=generator()), torch.arange(40) % 3
    data = coded(indices, prior, labels=labels)
    before = torch.get_rng_state()
    assert coded(indices, prior.train(), labels=labels) == data
    assert torch.equal(coding.decode(data, prior=prior), indices)
    assert prior.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_as_long_as_the_prior_predicts(kind):
    """Within half a per cent and 64 bytes of -log2 p in floats, labels included."""
    prior = make(kind, 64, (5, 5), classes=10)
    labels = torch.randint(0, 10, (300,), generator=generator())
    indices = prior.sample(300, labels, generator=generator())
    for given, extra in ((labels, 300 * math.log2(10)), (None, 0.0)):
        ideal = (float(prior.bits(indices, given).sum()) + extra) / 8
        assert ideal < 0.9 * indices.numel() * 6 / 8 or given is None
        data = coded(indices, prior, labels=given)
        assert abs(len(data) - ideal) <= 0.005 * ideal + 64
        assert torch.equal(coding.decode(data, prior=prior), indices)
        measured = coding.measure(indices, 64, prior=prior, labels=given)["prior"]
        assert measured["bytes"] == len(data)
        assert measured["bits_per_index"] * indices.numel() / 8 == pytest.approx(ideal, rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_do_not_depend_on_threads_or_other_samples(kind):
    prior = make(kind)
    indices = correlated(300, 3, 4, 13)
    torch.set_num_threads(1)
    data = coded(indices, prior)
    torch.set_num_threads(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert coded(indices, prior) == data
    assert torch.equal(coding.decode(data, prior=prior), indices)


FILE_OF_VERSION_1 = (
    "4656511a010200033132333435363738050000000200000002000000030000000140815ea2e02dfad8"
    "380e70d0c3b92d5b1f2e6c6422eb3719857260433210312c"
)


def test_the_format_stays_readable():
    """With weights independent of random generators: an old file must always decode to the same indices."""
    prior = TransformerPrior(5, (2, 3), dim=8, depth=1, heads=2, classes=2).eval()
    with torch.no_grad():
        for i, parameter in enumerate(prior.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.int64) * 37 + 11 * i
            parameter.copy_((ramp % 101 - 50).reshape(parameter.shape).float() / 64)
    indices = torch.tensor([[[0, 1, 2], [3, 4, 0]], [[4, 4, 0], [2, 2, 1]]])
    data = coded(indices, prior, labels=torch.tensor([0, 1]), fingerprint=b"12345678")
    assert data.hex() == FILE_OF_VERSION_1
    assert torch.equal(coding.decode(data, prior=prior), indices)


def test_another_prior_is_refused():
    prior, indices = make(classes=3), correlated(9, 3, 4, 13)
    data = coded(indices, prior)
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
    ("indices", "options", "message"),
    [
        (torch.zeros(2, 4, 3), {}, "indices: must be integers"),
        (torch.zeros(2, 4, 3).long(), {}, r"built for grids \(3, 4\) and 13 codes; these are \(4, 3\) and"),
        (torch.zeros(2).long(), {}, r"these are \(\) and"),
        (torch.full((2, 3, 4), -1), {}, "must not hold -1 with a prior"),
        (torch.zeros(2, 3, 4).long(), {"labels": torch.zeros(3).long()}, r"labels: must be int64 of shape \(2,\)"),
        (torch.zeros(2, 3, 4).long(), {"labels": torch.tensor([0, 3])}, r"labels: must lie in \[0, 3\)"),
        (torch.zeros(2, 3, 4).long(), {"prior": None}, 'model="prior" needs one'),
    ],
)
def test_errors_of_a_prior_name_the_argument(indices, options, message):
    options = {"prior": make(classes=3), "model": "prior"} | options
    with pytest.raises(CodingError, match=message):
        coding.encode(indices, 13, **options)


def test_mutated_and_hostile_files():
    prior, indices = make(classes=3), correlated(20, 3, 4, 13)
    data = coded(indices, prior, labels=torch.arange(20) % 3)
    choose, refused = random.Random(0), 0
    for _ in range(1000):
        try:
            assert torch.equal(coding.decode(mutated(data, choose), prior=prior), indices)
        except CodingError:
            refused += 1
    assert refused > 950
    for _ in range(100):
        try:
            assert torch.equal(coding.decode(resealed(mutated(data, choose)), prior=prior, max_indices=1000), indices)
        except CodingError as error:
            refused += "differ from the encoded ones" in str(error)
    assert refused > 970
    header = coding.read_header(data)
    for shape in [(1 << 31, 3, 4), (1 << 20, 3, 4), (3, 1 << 20, 4)]:
        with pytest.raises(CodingError, match="indices"):
            coding.decode(container.pack(header._replace(shape=shape), b"\xff" * 64), prior=prior)


@pytest.mark.parametrize(
    "options", [*({"kind": k} for k in ("transformer", "lstm", "depth")), {"pattern": "delay"}], ids=str
)
@pytest.mark.parametrize("grid", [(3, 4, 3), (5, 3), (1, 3)], ids=str)
def test_several_codebooks_are_restored(options, grid):
    torch.manual_seed(0)
    kind, sizes = options.get("kind", "transformer"), (9, 1, 4)
    settings = {"pattern": options["pattern"]} if "pattern" in options else {}
    prior = PRIORS[kind](sizes, grid, **OPTIONS[kind], **settings, classes=2).eval()
    for head in prior.head.layers:
        torch.nn.init.normal_(head.weight, std=0.6, generator=generator())
    labels = torch.arange(40) % 2
    indices = prior.sample(40, labels, generator=generator())
    data = coding.encode(indices, sizes, model="prior", prior=prior, labels=labels)
    assert torch.equal(coding.decode(data, prior=prior), indices)
    ideal = float(prior.bits(indices, labels).sum()) / 8
    assert abs(len(data) - ideal) <= 0.005 * ideal + 100
    for wrong in (9, (9, 2, 4)):
        with pytest.raises(CodingError, match=r"prior: was built for grids .* and \(9, 1, 4\) codes; these are"):
            coding.encode(indices, wrong, model="prior", prior=prior)
