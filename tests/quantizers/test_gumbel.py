"""GumbelQuantize compared with its formulae over the whole N x K softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastvq
from fastvq.parts import gumbel, gumbel_lookup

from .. import contract
from ..cases import close, generator

DIM, SIZE, N = 5, 11, 14


def rows(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*(shape or (2, 7, DIM)), generator=generator(seed), dtype=dtype)


def logits_of(x, keys, metric):
    return x @ keys.mT if metric == "dot" else -(x[:, None] - keys).square().sum(-1).sqrt()


def dense(x, keys, codes, temperature, seed, metric, hard, part):
    """Return samples by their definition; the noise is drawn for `part` rows at a time."""
    noise_generator = torch.Generator().manual_seed(seed)
    uniform = torch.cat([torch.rand(len(own), len(keys), generator=noise_generator) for own in x.split(part)])
    z = logits_of(x, keys, metric) - (-uniform.log()).log()
    y = (z / temperature).softmax(1)
    if hard:
        y = torch.nn.functional.one_hot(z.argmax(1), len(keys)) + y - y.detach()
    return y @ codes, z.argmax(1)


@pytest.mark.parametrize("metric", ["dot", "distance"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("part", [3, N])
def test_samples_and_gradients(monkeypatch, metric, hard, part):
    monkeypatch.setattr(gumbel, "LARGEST_PART", part * SIZE)
    seed, temperature = 5, torch.tensor(0.7, dtype=torch.float64)
    given = [rows(n, d, seed=s, dtype=torch.float64) for s, (n, d) in enumerate([(N, DIM), (SIZE, DIM), (SIZE, 4)])]
    upstream = rows(N, 4, seed=9, dtype=torch.float64)
    results = []
    for function in (gumbel_lookup, dense):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        if function is dense:
            quantized, indices = dense(*leaves, temperature, seed, metric, hard, part)
        else:
            options = {"temperature": temperature, "seed": torch.tensor(seed), "metric": metric, "hard": hard}
            quantized, indices = gumbel_lookup(*leaves, **options)
        (quantized * upstream).sum().backward()
        results.append((quantized.detach(), indices, *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_a_row_on_a_key_has_a_gradient():
    x = rows(3, DIM).requires_grad_()
    options = {"temperature": torch.tensor(1.0), "seed": torch.tensor(1), "metric": "distance"}
    gumbel_lookup(x, x.detach().clone(), x.detach().clone(), **options).quantized.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("logits", ["linear", "distance"])
def test_loss_and_indices(logits):
    layer = fastvq.GumbelQuantize(DIM, SIZE, logits=logits, kl_weight=0.3)
    x = rows()
    metric = "dot" if logits == "linear" else "distance"
    scores = logits_of(x.double().flatten(0, 1), layer.keys.detach().double(), metric)
    q = scores.softmax(1)
    _, indices, loss = layer(x)
    close(loss.detach(), 0.3 * (q * (q * SIZE).log()).sum(1).mean().float())
    assert torch.equal(layer.code_counts, indices.flatten().bincount(minlength=SIZE))
    layer.eval()
    quantized, indices, loss = layer(x)
    assert torch.equal(indices.flatten(), scores.argmax(1))
    assert torch.equal(quantized, layer.codebook[indices])
    assert torch.equal(layer.get_output_from_indices(indices), quantized)
    assert not loss


def test_indices_of_training_have_the_probabilities_of_the_softmax():
    layer = fastvq.GumbelQuantize(2, 3, hard=True, temperature=0.1)
    with torch.no_grad():
        layer.logit_weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    torch.manual_seed(0)
    quantized, indices, _ = layer(torch.tensor([1.0, 0.0]).expand(1, 20_000, 2))
    shares = indices.flatten().bincount() / 20_000
    assert (shares - torch.tensor([0.0, 1.0, 2.0]).softmax(0)).abs().max() < 0.015
    assert torch.equal(quantized, layer.codebook[indices])


@pytest.mark.parametrize("hard", [False, True])
def test_nothing_of_size_n_k_is_kept(hard):
    layer, n = fastvq.GumbelQuantize(4, 64, hard=hard), 300
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        layer(rows(1, n, 4).requires_grad_())
    assert max(kept) < n * 64 / 4


@pytest.mark.parametrize("logits", ["linear", "distance"])
@pytest.mark.parametrize("training", [True, False])
def test_a_code_that_is_not_finite_is_never_chosen(logits, training):
    layer = fastvq.GumbelQuantize(DIM, SIZE, logits=logits, hard=True).train(training)
    with torch.no_grad():
        layer.codebook[::2] = torch.nan
        if logits == "linear":
            layer.logit_weight[1] = torch.inf
    x = rows(4, 100, DIM).requires_grad_()
    quantized, indices, loss = layer(x)
    (quantized.sum() + loss).backward()
    odd = set(range(3 if logits == "linear" else 1, SIZE, 2))
    assert set(indices.unique().tolist()) <= odd
    assert quantized.isfinite().all()
    assert loss.isfinite()
    assert x.grad is None or x.grad.isfinite().all()


def test_schedules():
    layer = fastvq.GumbelQuantize(DIM, SIZE, temperature=2.0, final_temperature=1.0, kl_weight=0.0, annealing=0.5)
    values = []
    for progress in (0, 0.25, 0.5, 1):
        layer.anneal_(progress)
        values.append((float(layer.temperature), float(layer.kl_weight)))
    assert values == [(2.0, 0.0), (1.5, 0.0), (1.0, 0.0), (1.0, 0.0)]
    with pytest.raises(ValueError, match=r"^progress: must lie in \[0, 1\], got 1.5"):
        layer.anneal_(1.5)
    assert layer.half().temperature.dtype == torch.float32


def test_a_schedule_compiles_nothing_anew():
    layer = fastvq.GumbelQuantize(DIM, SIZE, final_temperature=0.1, final_kl_weight=1.0)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    losses = []
    for progress in (0.0, 0.3, 0.6):
        layer.anneal_(progress)
        losses.append(float(compiled(rows())[2].detach()))
    assert counter.frame_count == 1
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": "cosine"}, "logits: must be one of linear, distance, got 'cosine'"),
        ({"temperature": 0.0}, "temperature: must be positive and finite, got 0.0"),
        ({"final_temperature": math.inf}, "final_temperature: must be positive and finite, got inf"),
        ({"kl_weight": -1.0}, "kl_weight: must not be negative, got -1.0"),
        ({"annealing": 1.5}, r"annealing: must lie in \[0, 1\], got 1.5"),
        ({"codebook_size": 0}, "codebook_size: must be an integer of at least 1, got 0"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        fastvq.GumbelQuantize(**{"dim": DIM, "codebook_size": SIZE} | options)


def test_reinitialize():
    layer = fastvq.GumbelQuantize(DIM, SIZE)
    layer(rows())
    before = layer.codebook.detach().clone()
    layer.reinitialize_()
    assert not torch.equal(before, layer.codebook)
    assert not layer.code_counts.any()


def test_contract():
    layer = fastvq.GumbelQuantize(DIM, SIZE)
    contract.assert_non_finite_rows_are_excluded(layer, rows())
    contract.assert_compiles(layer, rows())
    contract.assert_half_works(lambda: fastvq.GumbelQuantize(DIM, SIZE, hard=True), rows(), torch.bfloat16)
    contract.assert_inference_mode_works(layer, rows())
