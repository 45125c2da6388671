"""The affine reparametrization of a codebook."""

from __future__ import annotations

import copy

import pytest
import torch

import fastvq
from fastvq.codebook import Codebook

from ..cases import close, generator

D = 4
SETTINGS = {"batch_decay": 0.9, "codebook_decay": 0.8, "sync": False}


def test_codes_take_mean_and_deviation_of_the_rows():
    codebook = Codebook(D, 500, affine=SETTINGS)
    x = 5 + 3 * torch.randn(1, 4000, D)
    codebook.initialize_(x)
    close(codebook.codes.mean(1), x.mean(1), torch.bfloat16)
    close(codebook.codes.std(1, unbiased=False), x.std(1, unbiased=False), torch.bfloat16)
    close(codebook.own_rows(codebook.codes), codebook.embed, torch.float16)


def test_statistics_move():
    codebook = Codebook(D, 20, affine=SETTINGS)
    first, second = torch.randn(1, 50, D), 2 + torch.randn(1, 50, D)
    second[0, 7] = torch.nan
    codebook.initialize_(first)
    codebook.initialize_(second, torch.arange(50)[None] < 30)
    taking_part = second[:, [i for i in range(30) if i != 7]]
    close(codebook.batch_mean, 0.9 * first.mean(1, keepdim=True) + 0.1 * taking_part.mean(1, keepdim=True))
    variance = first.var(1, keepdim=True, unbiased=False), taking_part.var(1, keepdim=True, unbiased=False)
    close(codebook.batch_variance, 0.9 * variance[0] + 0.1 * variance[1])
    close(codebook.codebook_mean, codebook.embed.mean(1, keepdim=True))


def test_without_a_row_the_map_is_the_identity():
    codebook = Codebook(D, 20, affine=SETTINGS)
    assert torch.equal(codebook.codes, codebook.embed)
    codebook.initialize_(torch.full((1, 3, D), torch.nan))
    close(codebook.codes, codebook.embed)
    codebook.initialize_(torch.zeros(1, 0, D))
    assert bool(codebook.codes.isfinite().all())


def test_learning_in_the_codes_own_place():
    """Codes learn from the rows mapped back, so that their image moves to the rows."""
    codebook = Codebook(D, 1, decay=0.0, affine=SETTINGS)
    codebook.embed.fill_(0.5)
    x = 4 + torch.randn(1, 60, D)
    codebook.initialize_(x)
    rows = codebook.own_rows(x)
    codebook.learn_(x, torch.zeros(1, 60, dtype=torch.int64))
    close(codebook.embed, rows.mean(1, keepdim=True))


def test_a_checkpoint_with_and_without_statistics():
    trained = Codebook(D, 20, affine=SETTINGS)
    fresh = Codebook(D, 20, affine=SETTINGS)
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
    trained.initialize_(torch.randn(1, 9, D))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.codes, trained.codes)
    untrained = Codebook(D, 20, affine=SETTINGS)
    fresh.load_state_dict(untrained.state_dict())
    assert torch.equal(fresh.codes, untrained.codes)
    # As vector_quantize_pytorch saves it before the first step: without statistics of a batch, and arbitrary others.
    state = {name: t for name, t in untrained.state_dict().items() if not name.startswith("batch_")}
    state["codebook_mean"] = state["codebook_variance"] = torch.full((1, 1, D), 7.0)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.codes, untrained.codes)


def test_the_gradient_reaches_a_learnable_codebook():
    codebook = Codebook(D, 20, learnable=True, affine=SETTINGS)
    codebook.initialize_(3 * torch.randn(1, 50, D))
    codebook.codes.sum().backward()
    assert codebook.embed.grad is not None
    assert bool(codebook.embed.grad.any())


@pytest.mark.parametrize(("options", "least"), [({"threshold_ema_dead_code": 1}, 32), ({"eps": 1e-12}, 32), ({}, 0)])
def test_distinct_rows_far_from_the_origin_keep_their_codes(options, least):
    """Unused codes that drift to the origin would make up the variance; by default they do, see docs/learning.md."""
    rows = 1e3 + 1e-3 * torch.randn(32, 16, generator=generator(1))
    x = rows[torch.randint(32, (1, 1024), generator=generator(2))]
    torch.manual_seed(0)
    layer = fastvq.VectorQuantize(16, 64, affine_param=True, kmeans_init=True, **options)
    for _ in range(20):
        layer(x)
    used = layer.eval()(x)[1].unique().numel()
    assert used >= least
    assert least or used < 8, "docs/learning.md says otherwise"
