"""Scenarios of tests/test_distributed.py, run on every rank: `tests/ranks.py OUT` writes {scenario: error or null}."""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastvq
from fastvq import distributed
from fastvq.codebook import Codebook, kmeans
from fastvq.parts.losses import binary_entropies

SCENARIOS: dict[str, Callable[[], None]] = {}
DIM = 6


def scenario(function: Callable[[], None]) -> None:
    SCENARIOS[function.__name__] = function


@contextlib.contextmanager
def collectives() -> Iterator[list[str]]:
    """Collect the names of the collectives called in the context."""
    names = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "all_gather_into_tensor", "barrier")
    real = {name: getattr(dist, name) for name in names}
    called: list[str] = []

    def counting(name):
        def call(*args, **kwargs):
            called.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield called
    finally:
        for name in names:
            setattr(dist, name, real[name])


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensor)
    return found


def assert_same_everywhere(module: torch.nn.Module) -> None:
    """Every tensor of the state, bit for bit, by other means than the package's own check."""
    for name, value in module.state_dict().items():
        for other in gathered(value):
            assert torch.equal(value.flatten().view(torch.uint8), other.flatten().view(torch.uint8)), name
    distributed.check_synchronized(module)


def batch(step: int, rows: int = 0, rank: int | None = None) -> torch.Tensor:
    """Return a rank's own rows (1, N, DIM); N depends on rank and step, and may be 0."""
    rank = dist.get_rank() if rank is None else rank
    g = torch.Generator().manual_seed(1000 * step + rank)
    count = rows or int(torch.randint(0, 40, (), generator=g))
    centers = torch.randn(30, DIM, generator=torch.Generator().manual_seed(7)) * 3
    owner = torch.randint(30, (count,), generator=g)
    return (centers[owner] + torch.randn(count, DIM, generator=g))[None]


BUILT_BEFORE = fastvq.VectorQuantize(
    DIM, 24, kmeans_init=True, kmeans_seeding="random", threshold_ema_dead_code=1, decay=0.9
)


@scenario
def two_hundred_steps_of_a_layer_built_before_the_group() -> None:
    layer = BUILT_BEFORE
    torch.manual_seed(100 + dist.get_rank())  # each rank draws its own candidates
    replaced = 0
    for step in range(200):
        before = layer.codebook.clone()
        with collectives() as called:
            x = batch(step)
            if step % 5 == 0 and x.shape[1]:
                x[0, 0] = torch.nan
            layer(x)
        # k-means: whether there are rows, the first means, one a round
        assert called == ["all_reduce"] * (1 if step else 13), (step, called)
        moved = (layer.codebook - before).abs().amax(1) > 3
        replaced += int(moved.sum()) if step else 0
        if step % 40 == 0:
            assert_same_everywhere(layer)
    assert_same_everywhere(layer)
    assert replaced > 5  # else the replacement wasn't tested
    assert layer.codebook.isfinite().all()


@scenario
def two_hundred_steps_of_residual_stages() -> None:
    layer = fastvq.ResidualVQ(
        dim=DIM, num_quantizers=4, codebook_size=16, kmeans_init=True, threshold_ema_dead_code=0.5,
        quantize_dropout=True, decay=0.9,
    )  # fmt: skip
    for step in range(200):
        with collectives() as called:
            indices = layer(batch(step))[1]
        if any(not stage._codebook.initted for stage in layer.layers):
            continue  # dropout may leave stages for a later first step
        kept = int((indices >= 0).any(0).any(0).sum()) if indices.numel() else 0
        assert len({int(n) for n in gathered(torch.tensor(kept)) if n}) <= 1, "ranks keep different stages"
        if step > 30:
            assert called == ["all_reduce"], (step, called)
    assert all(stage._codebook.initted for stage in layer.layers)
    assert_same_everywhere(layer)


@scenario
def shared_codebooks_heads_and_policies() -> None:
    torch.manual_seed(50 + dist.get_rank())
    layers = [
        fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=16, shared_codebook=True, kmeans_init=True,
                          threshold_ema_dead_code=0.5),
        fastvq.VectorQuantize(DIM, 16, use_cosine_sim=True, kmeans_init=True, threshold_ema_dead_code=0.5),
    ]  # fmt: skip
    codebooks = [
        Codebook(DIM, 16, heads=2, kmeans_init=True, replacement=fastvq.Replacement(0.1, relative=True, every=3)),
        Codebook(DIM, 16, replacement=fastvq.Replacement(1.0, rows="kmeans++", reservoir=32, at_once=5)),
        Codebook(DIM, 16, affine={"batch_decay": 0.9, "codebook_decay": 0.9, "sync": True}),
    ]
    for codebook in codebooks:  # without k-means or a broadcast, ranks start as they were built
        for value in codebook.state_dict().values():
            dist.broadcast(value, src=0)
    for step in range(40):
        x = batch(step)
        for layer in layers:
            layer(x)
        for codebook in codebooks:
            rows = x.expand(codebook.heads, -1, -1)
            codebook.initialize_(rows)
            codebook.learn_(rows, codebook(rows))
    for module in (*layers, *codebooks):
        assert_same_everywhere(module)


@scenario
def equal_to_one_process_on_the_joined_batch() -> None:
    for options in ({}, {"use_cosine_sim": True}, {"ema_update": False}):
        together = fastvq.VectorQuantize(DIM, 12, decay=0.8, **options)
        dist.broadcast(together._codebook.embed, src=0)
        together._codebook.embed_avg.copy_(together._codebook.embed)
        alone = copy.deepcopy(together)
        alone._codebook.sync = False
        for step in range(20):
            together(batch(step))
            joined = torch.cat([batch(step, rank=rank) for rank in range(dist.get_world_size())], 1)
            with collectives() as called:
                alone(joined)
            assert not called
            for name, value in together.state_dict().items():
                # sums of float32 parts instead of one float64 sum, over 20 steps
                torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-5, atol=1e-6)


@scenario
def kmeans_on_all_rows() -> None:
    """Check that k-means over ranks gives the same as on the joined rows, from the same first means."""
    x = batch(3, rows=50)[0]
    joined = torch.cat([batch(3, rows=50, rank=rank)[0] for rank in range(dist.get_world_size())])
    mask = torch.ones(len(x), dtype=torch.bool)
    means, counts = kmeans(x, 8, iterations=6, mask=mask, together=True)
    assert int(counts.sum()) == len(joined)
    for other in gathered(means):
        assert torch.equal(means, other)
    indices = fastvq.search(joined, means)
    again, sums = fastvq.accumulate(joined, indices, 8)
    moved = (sums / again.clamp_min(1)[:, None] - means).norm(dim=1)
    assert moved.median() < 1.0  # six rounds are near rest


@scenario
def stages_that_only_some_ranks_use() -> None:
    """Check that a stage that takes part on one rank learns the same on all, and one of no rank nothing."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=8)
    before = layer.codebooks.clone()
    x = batch(3, rows=12, rank=rank)
    layer(x.view(2, 6, DIM), n_quantizers=torch.tensor([1, 2 if rank else 3]))
    fastvq.distributed.check_synchronized(layer)
    assert [not torch.equal(*pair) for pair in zip(layer.codebooks, before, strict=True)] == [True, True, True, False]


@scenario
def fit_on_all_ranks() -> None:
    """Check that a fit ends where k-means on all rows rests, on every rank, though ranks have different batches."""
    ranks, own = dist.get_world_size(), dist.get_rank()
    shares = [list(batch(3, rows=50, rank=rank)[0].split(50 if rank else 20)) for rank in range(ranks)]
    layer = fastvq.VectorQuantize(DIM, 8)
    fitted = layer.fit(shares[own], iterations=30)
    joined = torch.cat([rows for share in shares for rows in share])
    assert fitted.rows == len(joined)
    fastvq.distributed.check_synchronized(layer)
    counts, sums = fastvq.accumulate(joined, fastvq.search(joined, layer.codebook), 8)
    torch.testing.assert_close(layer.codebook, sums / counts[:, None])


@scenario
def kmeans_of_rows_that_repeat() -> None:
    """Nearly all rows are equal, on every rank; the others are seeds, whichever rank has them."""
    others = torch.randn(30, DIM, generator=torch.Generator().manual_seed(dist.get_rank()))
    x = torch.cat([torch.ones(300, DIM), others])
    torch.manual_seed(dist.get_rank())
    for seeding, least, most in (("k-means++", 30, 32), ("random", 2, 16)):
        mask = torch.ones(len(x), dtype=torch.bool)
        means, counts = kmeans(x, 32, iterations=4, mask=mask, seeding=seeding, together=True)
        assert all(torch.equal(means, other) for other in gathered(means))
        assert least <= int((counts > 0).sum()) <= most, seeding


@scenario
def nothing_is_said_in_eval_or_frozen() -> None:
    layers = [
        fastvq.VectorQuantize(DIM, 12, kmeans_init=True, threshold_ema_dead_code=1),
        fastvq.ResidualVQ(
            dim=DIM, num_quantizers=2, codebook_size=12, threshold_ema_dead_code=1, quantize_dropout=True
        ),
    ]
    with collectives() as called:
        for layer in layers:
            layer.eval()(batch(1, rows=9))
            layer.encode(batch(1, rows=9))
            layer.get_output_from_indices(layer(batch(1, rows=9))[1])
        layers[0].train()(batch(1, rows=9), freeze_codebook=True)
    assert not called


@scenario
def a_rank_without_a_row_that_counts() -> None:
    layer = fastvq.VectorQuantize(DIM, 12, kmeans_init=True, threshold_ema_dead_code=1)
    for step in range(3):
        x = batch(step, rows=20)
        mask = torch.full((1, 20), dist.get_rank() != 0)
        layer(x, mask=mask)
    assert layer._codebook.initted
    assert_same_everywhere(layer)
    torch.testing.assert_close(
        fastvq.VectorQuantize(DIM, 12, kmeans_init=True)(torch.full((1, 4, DIM), torch.nan))[1], torch.full((1, 4), -1)
    )  # no rank has a row


@scenario
def updates_kept_for_a_commit() -> None:
    """Accumulation says nothing; the commit is the one all-reduce, and equals one step on all batches."""
    kept = Codebook(DIM, 10)
    for value in kept.state_dict().values():
        dist.broadcast(value, src=0)
    whole = copy.deepcopy(kept)
    batches = [batch(step, rows=15) for step in range(3)]
    with collectives() as called:
        for x in batches:
            kept.learn_(x, kept(x), accumulate_only=True)
        assert not called
        kept.commit_()
    assert called == ["all_reduce"]
    joined = torch.cat(batches, 1)
    whole.learn_(joined, whole(joined))
    torch.testing.assert_close(kept.embed, whole.embed)
    assert_same_everywhere(kept)


@scenario
def gradients_of_a_learnable_codebook_by_ddp() -> None:
    torch.manual_seed(3)
    encoder = torch.nn.Linear(DIM, DIM)
    layer = fastvq.VectorQuantize(DIM, 12, learnable_codebook=True, threshold_ema_dead_code=0.5)
    wrapped = DistributedDataParallel(_Chain(encoder, layer))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(10):
        quantized, _, loss = wrapped(batch(step, rows=10))
        optimizer.zero_grad()
        (quantized.square().mean() + loss).backward()
        optimizer.step()
    assert_same_everywhere(wrapped.module)


class _Chain(torch.nn.Module):
    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.modules_ = torch.nn.ModuleList(modules)

    def forward(self, x):
        for module in self.modules_:
            x = module(x)
        return x


@scenario
def ddp_leaves_the_moving_averages_alone() -> None:
    layer = fastvq.VectorQuantize(DIM, 12, kmeans_init=True, threshold_ema_dead_code=0.5)
    wrapped = DistributedDataParallel(_Chain(torch.nn.Linear(DIM, DIM), layer))
    for step in range(10):
        quantized, _, loss = wrapped(batch(step, rows=10))
        (quantized.square().mean() + loss).backward()
    assert_same_everywhere(wrapped.module)


@scenario
def health_is_that_of_all_vectors() -> None:
    """Each rank uses codes of its own; together they use all, whatever DDP broadcasts at each step."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    layer = fastvq.VectorQuantize(DIM, 4 * ranks, decay=1.0, freeze_codebook=True, codebook_dim=DIM)
    layer.codebook = torch.eye(4 * ranks, DIM) + 3 * torch.arange(4 * ranks)[:, None]
    wrapped = DistributedDataParallel(_Chain(torch.nn.Linear(1, 1), layer))
    x = layer.codebook[4 * rank : 4 * rank + 4].expand(2, -1, -1) + 0.1
    for _ in range(3):
        with collectives() as called:
            wrapped.module.modules_[1](x)
        assert not called
        wrapped._sync_buffers()
    with collectives() as called:
        report = layer.health()
    assert called == ["all_reduce"]
    assert int(layer.code_counts.sum()) == 24
    torch.testing.assert_close(torch.stack(report), torch.tensor([1.0, 4.0 * ranks, 0.0, 0.01, 0.0]))
    torch.testing.assert_close(layer.health(together=False).usage, torch.tensor(1.0 / ranks))
    apart = fastvq.VectorQuantize(DIM, 8, sync_codebook=False)
    apart(batch(1, rows=5))
    with collectives() as called:
        apart.health()
        fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=4, sync_codebook=False).health()
    assert not called
    stages = fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=4)
    stages(batch(1, rows=5))
    with collectives() as called:
        assert stages.health().usage.shape == (3,)
    assert called == ["all_reduce"]


@scenario
def reinitialized_codebooks_are_equal() -> None:
    torch.manual_seed(dist.get_rank())
    for layer in (
        fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=8, threshold_ema_dead_code=1),
        fastvq.SimVQ(DIM, 8, torch.nn.Identity()),
        fastvq.VectorQuantize(DIM, 8, kmeans_init=True),
    ):
        layer(batch(1, rows=20))
        layer.reinitialize_()
        layer(batch(2, rows=20))
        assert_same_everywhere(layer)


@scenario
def ddp_with_stages_that_are_dropped() -> None:
    torch.manual_seed(3)
    for options in ({"learnable_codebook": True}, {"implicit_neural_codebook": True}, {"diveq": True}):
        layer = fastvq.ResidualVQ(
            dim=DIM, num_quantizers=4, codebook_size=8, quantize_dropout=True, threshold_ema_dead_code=0.5, **options
        )
        wrapped = DistributedDataParallel(_Chain(torch.nn.Linear(DIM, DIM), layer))
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for step in range(5):
            quantized, _, losses = wrapped(batch(step, rows=10))
            optimizer.zero_grad()
            (quantized.square().mean() + losses.sum()).backward()
            optimizer.step()
        assert_same_everywhere(wrapped.module)


SHARDED = {
    "k-means": {"learnable_codebook": True, "kmeans_init": True},
    "replacement": {"learnable_codebook": True, "threshold_ema_dead_code": 3},
    "averages": {"orthogonal_reg_weight": 0.1, "kmeans_init": True},
    "averages, cosine": {"orthogonal_reg_weight": 0.1, "use_cosine_sim": True},
    "averages by hand": {"orthogonal_reg_weight": 0.1, "manual_ema_update": True},
    "buffers": {"kmeans_init": True, "threshold_ema_dead_code": 1, "codebook_dim": 3},
}


@scenario
def codebooks_that_fully_shard_has_sharded() -> None:
    """Compare with DDP what k-means, averages and replacement write, also where FSDP computes in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for name, options in SHARDED.items():
        for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
            torch.manual_seed(3)
            plain = _Chain(torch.nn.Linear(DIM, DIM), fastvq.VectorQuantize(DIM, 7, **options))
            sharded = copy.deepcopy(plain)
            fully_shard(sharded.modules_[0], mp_policy=policy)
            fully_shard(sharded, mp_policy=policy)
            wrapped = DistributedDataParallel(plain)
            for step in range(3):
                x = batch(step, rows=20)
                for model in (wrapped, sharded):
                    torch.manual_seed(10 * step + dist.get_rank())
                    quantized, _, loss = model(x)
                    (quantized.float().square().mean() + loss).backward()
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter -= 0.1 * parameter.grad
                            parameter.grad = None
            codebook = sharded.modules_[1]._codebook
            if "by hand" in name:
                plain.modules_[1]._codebook.update_ema()
                codebook.update_ema()
            embed = codebook.embed
            embed = embed.full_tensor() if hasattr(embed, "full_tensor") else embed
            assert embed.dtype == torch.float32, name
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if policy.param_dtype is None else {"rtol": 0.2, "atol": 0.3}
            if policy.param_dtype is not None and name == "replacement":
                # The rounding of bfloat16 decides whether a code at the threshold is replaced, and by which row.
                assert embed.isfinite().all(), name
                assert (embed.norm(dim=-1) > 1e-3).all(), name
            else:
                torch.testing.assert_close(embed, plain.modules_[1]._codebook.embed, **tolerance, msg=name)
            assert codebook.initted
    residual = fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=7, learnable_codebook=True, ema_update=False)
    fully_shard(residual)
    residual(batch(0, rows=3))
    residual.layers[0]._codebook.set_(torch.full((1, 7, DIM), torch.nan))
    assert residual.health(together=True).non_finite.flatten().tolist() == [1.0, 0.0]
    layer = fastvq.VectorQuantize(DIM, 7, learnable_codebook=True)
    fully_shard(layer)
    with pytest.raises(RuntimeError, match=r"^embed: is sharded over ranks \(a DTensor\)"):
        layer.encode(batch(0, rows=3))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    rounded = fastvq.VectorQuantize(DIM, 7, learnable_codebook=True, threshold_ema_dead_code=1e-9)
    fully_shard(rounded, mp_policy=policy)
    for step in range(10):  # writes that change nothing, and steps of less than bfloat16 resolves
        quantized, _, loss = rounded(batch(step, rows=20))
        loss.backward()
        with torch.no_grad():
            rounded._codebook.embed -= 1e-6 * rounded._codebook.embed.grad
    stepped = [
        fastvq.VectorQuantize(DIM, 7, learnable_codebook=True, in_place_codebook_optimizer=torch.optim.Adam),
        fastvq.LatentQuantize([4] * DIM, DIM, in_place_codebook_optimizer=torch.optim.Adam),
    ]
    for layer_of_its_own in stepped:
        fully_shard(layer_of_its_own)
        x = batch(0, rows=3)
        with pytest.raises(RuntimeError, match=r"^in_place_codebook_optimizer: its steps would be lost"):
            layer_of_its_own(x.mT if isinstance(layer_of_its_own, fastvq.LatentQuantize) else x)
    layer.reinitialize_()
    codes = torch.randn(7, DIM, generator=torch.Generator().manual_seed(1))
    layer._codebook.set_(codes[None])
    assert torch.equal(layer._codebook.embed.full_tensor()[0], codes)


@scenario
def the_self_check_finds_a_single_bit() -> None:
    layer = fastvq.VectorQuantize(DIM, 12)
    dist.broadcast(layer._codebook.embed, src=0)
    dist.broadcast(layer._codebook.embed_avg, src=0)
    distributed.check_synchronized(layer)
    if dist.get_rank() == dist.get_world_size() - 1:
        layer._codebook.embed_avg.view(torch.int32)[0, 3, 2] ^= 1
    with pytest.raises(RuntimeError, match=r"^ranks differ in _codebook\.embed_avg$"):
        distributed.check_synchronized(layer)


@scenario
def a_layer_that_must_not_synchronize() -> None:
    codebook = Codebook(DIM, 12, sync=False, replacement=fastvq.Replacement(1.0), kmeans_init=True)
    with collectives() as called:
        x = batch(1, rows=20)
        codebook.initialize_(x)
        codebook.learn_(x, codebook(x))
    assert not called


@scenario
def the_mean_over_ranks_has_the_gradient_of_all() -> None:
    ranks = dist.get_world_size()
    t = torch.tensor([1.0 + dist.get_rank(), 2.0], requires_grad=True)
    mean = distributed.mean(t)
    torch.testing.assert_close(mean.detach(), torch.tensor([(ranks + 1) / 2, 2.0]))
    (mean.square().sum() * (1 + dist.get_rank())).backward()
    # d/dt_r of sum_s (1 + s) |m|^2, m = mean of t: sum_s (1 + s) 2 m / ranks
    factor = sum(range(1, ranks + 1)) / ranks
    torch.testing.assert_close(t.grad, 2 * factor * mean.detach())


@scenario
def the_batch_entropy_is_that_of_the_joined_batch() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    lfq = fastvq.LFQ(dim=DIM)
    own = batch(3).requires_grad_()
    _, parts = lfq(own, inv_temperature=0.3, return_loss_breakdown=True)
    parts.batch_entropy.backward()
    joined = torch.cat([batch(3, rank=r) for r in range(ranks)], 1).requires_grad_()
    expected = binary_entropies(joined[0, :, None], torch.ones(joined.shape[1], dtype=torch.bool), sharpness=0.6)
    expected.batch.backward()
    torch.testing.assert_close(parts.batch_entropy, expected.batch)
    first = sum(batch(3, rank=r).shape[1] for r in range(rank))
    # DDP's mean over the ranks takes the factor back.
    torch.testing.assert_close(own.grad, ranks * joined.grad[:, first : first + own.shape[1]], rtol=1e-4, atol=1e-6)


@scenario
def seeds_are_common() -> None:
    torch.manual_seed(dist.get_rank())
    drawn = [distributed.common_seed() for _ in range(5)]
    assert all(torch.equal(other, torch.tensor(drawn)) for other in gathered(torch.tensor(drawn)))
    assert len(set(drawn)) > 1
    again = []

    def layer(x):
        again.append([distributed.common_seed() for _ in range(3)])
        return x.sin()

    checkpoint(layer, torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    assert again[0] == again[1] != drawn[:3]
    with collectives() as called:
        distributed.common_seed()
    assert not called


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    results: dict[str, str | None] = {}
    for name, run in SCENARIOS.items():
        error = None
        try:
            torch.manual_seed(0)
            run()
        except Exception:
            error = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        errors = [e for e in gathered(error) if e]  # type: ignore[arg-type]
        results[name] = "\n".join(errors) or None
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
