"""Sampling from priors, and their training steps, in indices per second.

Sampling with the cache is compared with recomputation for every index and with the loop of a plain GPT; training steps
are compared with that GPT's.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvq.models.priors import PRIORS, TransformerPrior

SIZE, GRID, COUNT = 512, (7, 7), 64
DIM, DEPTH, HEADS = 128, 4, 4
PLACES = GRID[0] * GRID[1]
KINDS = [kind for kind, prior in PRIORS.items() if not prior.in_scales and not prior.in_stages]


class PlainGPT(nn.Module):
    """Plain GPT of torch's own transformer layers, of the size of `TransformerPrior`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(SIZE + 1, DIM), nn.Embedding(PLACES, DIM)
        layer = nn.TransformerEncoderLayer(
            DIM, HEADS, 4 * DIM, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, SIZE)

    def forward(self, flat):
        length = flat.shape[1]
        x = self.embedding(flat) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.layers(x, mask=mask, is_causal=True))

    @torch.no_grad()
    def sample(self, count):
        flat = torch.full((count, 1), SIZE)
        for _ in range(PLACES):
            probabilities = self(flat)[:, -1].softmax(-1)
            flat = torch.cat([flat, torch.multinomial(probabilities, 1)], 1)
        return flat[:, 1:]

    def loss(self, indices):
        flat = indices.flatten(1)
        before = torch.cat([torch.full((len(flat), 1), SIZE), flat[:, :-1]], 1)
        return nn.functional.cross_entropy(self(before).flatten(0, 1), flat.flatten())


def per_second(benchmark, group, indices, call, rounds=3):
    benchmark.group = group
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["indices_per_second"] = round(indices / benchmark.stats.stats.median)
    print(f"\n{group}, {benchmark.name}: {benchmark.extra_info['indices_per_second']:,} indices a second")


@torch.no_grad()
def recomputed(prior, count):
    indices = torch.zeros(count, *GRID, dtype=torch.int64)
    for place in range(PLACES):
        indices.flatten(1)[:, place] = torch.multinomial(prior(indices)[:, place].softmax(-1), 1)[:, 0]
    return indices


def built(kind):
    torch.manual_seed(0)
    prior = PRIORS[kind](SIZE, GRID).eval()
    nn.init.normal_(prior.head.weight, std=0.3)
    return prior


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["cached", "recomputed"])
def bench_sampling(benchmark, kind, how):
    prior = built(kind)
    samples = {"cached": lambda: prior.sample(COUNT), "recomputed": lambda: recomputed(prior, COUNT)}[how]
    torch.manual_seed(1)
    cached = prior.sample(COUNT)
    torch.manual_seed(1)
    assert (cached == recomputed(prior, COUNT)).float().mean() > 0.95  # where rounding hardly ever decides a draw
    per_second(benchmark, f"sampling {COUNT} x {PLACES} indices", COUNT * PLACES, samples)


def bench_sampling_plain_gpt(benchmark):
    model = PlainGPT().eval()
    per_second(benchmark, f"sampling {COUNT} x {PLACES} indices", COUNT * PLACES, lambda: model.sample(COUNT))


@pytest.mark.parametrize("kind", [*KINDS, "plain gpt"])
def bench_training(benchmark, kind):
    model = PlainGPT() if kind == "plain gpt" else PRIORS[kind](SIZE, GRID)
    if kind == "transformer":
        ours, plain = (sum(p.numel() for p in m.parameters()) for m in (TransformerPrior(SIZE, GRID), PlainGPT()))
        assert abs(ours / plain - 1) < 0.2
    indices = torch.randint(0, SIZE, (48, *GRID), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        optimizer.zero_grad()
        model.loss(indices).backward()
        optimizer.step()

    per_second(benchmark, f"training step of 48 x {PLACES} indices", indices.numel(), step, rounds=10)
