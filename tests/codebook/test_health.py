"""Usage, perplexity and error of codebooks, and their counting in training."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fastvq
from fastvq.codebook.health import Health, dead_share, perplexity, usage

from ..cases import close


def test_usage_and_perplexity():
    counts = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    close(usage(counts), torch.tensor([1.0, 0.25, 0.0, 0.5]))
    close(perplexity(counts), torch.tensor([4.0, 1.0, 0.0, 2.0]))
    p = torch.tensor([0.7, 0.2, 0.1])
    close(perplexity(1000 * p), torch.tensor(math.exp(-sum(v * math.log(v) for v in p.tolist()))))


def test_perplexity_of_many_counts():
    """Beyond 2^24, where float32 no longer counts."""
    close(perplexity(torch.full((8192,), 2**40)), torch.tensor(8192.0))


def test_dead_share():
    counts = torch.tensor([[100, 100, 9, 0], [0, 0, 0, 0], [5, 5, 5, 5]])
    close(dead_share(counts), torch.tensor([0.25, 0.0, 0.0]))  # a tenth of equal use is 5.225: the 9 lives
    close(dead_share(torch.tensor([100, 100, 5, 0])), torch.tensor(0.5))


def test_counts_skip_what_does_not_count():
    health = Health(4)
    health.observe_(torch.tensor([0, -1, 3, 3, -1]))
    health.observe_(torch.tensor([[3], [0]]))
    assert health.code_counts.tolist() == [2, 0, 0, 3]
    health.reset_()
    assert not health.code_counts.any()
    assert not health.state_dict()


def test_heads_are_counted_apart():
    health = Health(3, heads=2)
    health.observe_(torch.tensor([[0, 1, -1], [2, 2, 2]]))
    assert health.code_counts.tolist() == [[1, 1, 0], [0, 0, 3]]


def test_the_error_is_the_mean_over_all_vectors():
    """Each batch with the weight of its vectors; an empty one, and one in which every vector is excluded, with none."""
    health = Health(2)
    health.observe_(torch.tensor([0, 1, 1]), torch.tensor(1.0))
    health.observe_(torch.tensor([-1, -1]), torch.tensor(math.nan))
    health.observe_(torch.tensor([0, -1]), torch.tensor(3.0))
    close(health.error, torch.tensor(1.5))
    health.reset_()
    health.observe_(torch.tensor([0]), torch.tensor(7.0))
    close(health.error, torch.tensor(7.0))


def test_precision_is_kept():
    health = copy.deepcopy(Health(2)).half()
    assert health.error.dtype == health.weight.dtype == torch.float32


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("options", [{}, {"learnable_codebook": True}, {"use_cosine_sim": True}], ids=str)
def test_quantization_error_of_a_layer(options, weight):
    """It doesn't depend on the weight of the losses, and excludes the rows with index -1."""
    layer = fastvq.VectorQuantize(6, 10, commitment_weight=weight, freeze_codebook=True, **options)
    x = torch.randn(2, 7, 6)
    x[1, 3] = torch.nan
    mask = torch.rand(2, 7) < 0.7
    quantized, indices, _ = layer(x, mask=mask)
    compared = torch.nn.functional.normalize(x, dim=-1) if "use_cosine_sim" in options else x
    close(layer.quantization_error(), (compared - quantized).square()[indices >= 0].mean().detach())
    report = layer.health()
    assert isinstance(report, fastvq.HealthReport)
    assert report.dead_share == layer.dead_share()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 4, 6)])
def test_stages_report_apart(sizes, shared):
    if shared and len(set(sizes)) > 1:
        sizes = (8, 8)
    layer = fastvq.ResidualVQ(dim=5, codebook_size=sizes, shared_codebook=shared)
    x = torch.randn(3, 9, 5)
    indices = layer(x)[1]
    for stage, size in enumerate(sizes):
        counts = torch.bincount(indices[..., stage].flatten(), minlength=size)
        assert torch.equal(layer.code_counts[stage, :size], counts)
        close(layer.perplexity()[stage], perplexity(counts))
        close(layer.usage()[stage], usage(counts))
    assert layer.code_counts.shape == (len(sizes), 8)
    assert (layer.quantization_error() > 0).all()
    layer.reset_health()
    assert not layer.code_counts.any()
    assert all(value.isnan().all() for value in layer.health()[:4])
