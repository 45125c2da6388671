"""The state of the layer: dtype, copies, checkpoints, initialization, and dead codes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import fastvq

from ..cases import HALF, close
from ..layers import DIM, SIZE, assert_same_state, batch, layer, state, train


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("options", [{}, {"learnable_codebook": True}, {"codebook_dim": 3}], ids=str)
def test_state_stays_float32(options, cast):
    """Bit for bit, and the layer works in the dtype that the module was cast to."""
    module = train(layer(**options))
    before = state(module._codebook)
    module = getattr(module, cast)()
    assert_same_state(module._codebook, before)
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(cast, torch.float32)
    assert all(p.dtype == dtype for name, p in module.named_parameters() if "_codebook" not in name)
    x = batch().to(dtype).requires_grad_()
    quantized, _, loss = module(x)
    (quantized.sum() + loss).backward()
    assert (quantized.dtype, x.grad.dtype) == (dtype, dtype)
    assert {t.dtype for t in module._codebook.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(dtype):
    plain, cast = layer(), layer()
    expected = plain(batch())
    with torch.autocast("cpu", dtype=dtype):
        for a, b in zip(cast(batch()), expected, strict=True):
            assert torch.equal(a, b)
        layer(codebook_dim=3, use_cosine_sim=True)(batch())
    assert_same_state(cast, state(plain))


def test_default_dtype():
    torch.set_default_dtype(torch.float64)
    module = layer(kmeans_init=True, threshold_ema_dead_code=2)
    module(batch())
    assert module.codebook.dtype == torch.float32


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch_round_trip(module),
}


def torch_round_trip(module):
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("trained", [0, 2])
def test_copies_go_on_alike(how, trained):
    module = train(layer(kmeans_init=True, threshold_ema_dead_code=1), trained)
    other = COPIES[how](module)
    for m in (module, other):
        torch.manual_seed(5)
        train(m, 2)
    assert_same_state(other, state(module))


@pytest.mark.parametrize("options", [{}, {"kmeans_init": True}, {"learnable_codebook": True}], ids=str)
def test_state_dict_round_trip(options):
    module = train(layer(**options))
    torch.manual_seed(9)
    other = fastvq.VectorQuantize(DIM, SIZE, **options)
    assert not torch.equal(other.codebook, module.codebook)
    other.load_state_dict(module.state_dict())
    for m in (module, other):
        m.reset_health()
        train(m, 2)
    assert_same_state(other, state(module))


def test_loading_an_untrained_state_brings_kmeans_back():
    module = train(layer(kmeans_init=True))
    module.load_state_dict(layer(kmeans_init=True).state_dict())
    module(batch())
    assert bool(module._codebook.initted)
    assert module.codebook.any()


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_init(cosine):
    """Once, on the first training batch, before its codes are chosen."""
    module = layer(kmeans_init=True, use_cosine_sim=cosine, decay=1.0)
    assert not module.eval()(batch())[0].any()
    assert not module._codebook.initted
    _, _, loss = module.train()(batch())
    first = module.codebook.clone()
    assert bool(module._codebook.initted)
    assert loss < 0.7 * layer(use_cosine_sim=cosine)(batch())[2]
    close(module._codebook.embed_avg[0], first * module._codebook.cluster_size[0, :, None])
    module(batch(seed=1))
    close(module.codebook, first)


def test_kmeans_init_with_fewer_vectors_than_codes():
    module = layer(kmeans_init=True, codebook_size=50)
    module(batch(1, 7, DIM))
    assert bool(module.codebook.isfinite().all())
    assert module.codebook.any(1).all()


def test_kmeans_init_of_a_learnable_codebook():
    module = layer(kmeans_init=True, learnable_codebook=True)
    parameter = module._codebook.embed
    module(batch())[2].backward()
    assert module._codebook.embed is parameter
    assert parameter.any()
    assert parameter.grad.any()


def test_dead_codes_are_replaced():
    module = layer(threshold_ema_dead_code=0.5, decay=0.0)
    x = batch()
    _, indices, _ = module(x)
    chosen = torch.bincount(indices.flatten(), minlength=SIZE) > 0
    rows = {tuple(row) for row in x.flatten(0, 1).tolist()}
    assert not chosen.all()
    assert all((tuple(code) in rows) == (not used) for code, used in zip(module.codebook.tolist(), chosen, strict=True))


def test_replacement_lifts_usage():
    def usage_after(threshold):
        module = layer(codebook_size=64, threshold_ema_dead_code=threshold)
        module._codebook.embed_avg[0, 1:] = module.codebook[1:] = 1000.0  # all but one far from the data
        train(module, 8)
        module.reset_health()
        train(module, 3)
        return module.usage()

    assert usage_after(0) < 0.3
    assert usage_after(0.5) > 0.6


def test_usage_and_perplexity():
    module = layer()
    assert all(value.isnan() for value in module.health()[:4])  # nothing has been counted
    counts = torch.zeros(SIZE, dtype=torch.int64)
    for seed in range(3):
        counts += torch.bincount(module(batch(seed=seed))[1].flatten(), minlength=SIZE)
    module.eval()(batch())
    assert torch.equal(module.code_counts, counts)
    assert torch.equal(module.usage(), fastvq.usage(counts))
    assert torch.equal(module.perplexity(), fastvq.perplexity(counts))
    module.reset_health()
    assert module.usage().isnan()


def test_usage_counts_while_frozen():
    module = layer(freeze_codebook=True)
    module(batch())
    assert module.code_counts.sum() == 40
