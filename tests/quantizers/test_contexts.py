"""Layers in their execution contexts: activation checkpointing, autocast, DDP, compiled, from "meta" ..."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastvq

from ..cases import generator
from ..every import QUANTIZERS, batch_for, make, tensors
from ..layers import state

DIM, SIZE = 6, 12


class Scales(nn.Module):
    """`HierarchicalVQ` with the indices of its scales in one tensor."""

    def __init__(self, **options):
        super().__init__()
        self.vq = fastvq.HierarchicalVQ(dim=DIM, codebook_size=SIZE, scales=(1, 4, 16), channel_first=False, **options)

    def forward(self, x):
        quantized, indices, loss = self.vq(x)
        return quantized, torch.cat(indices, 1), loss


LAYERS = {
    "plain": lambda: fastvq.VectorQuantize(DIM, SIZE, decay=0.8),
    "straight through": lambda: fastvq.VectorQuantize(DIM, SIZE, rotation_trick=False),
    "projected": lambda: fastvq.VectorQuantize(DIM, SIZE, codebook_dim=4),
    "cosine": lambda: fastvq.VectorQuantize(DIM, SIZE, use_cosine_sim=True),
    "k-means and replacement": lambda: fastvq.VectorQuantize(DIM, SIZE, kmeans_init=True, threshold_ema_dead_code=2),
    "learnable": lambda: fastvq.VectorQuantize(DIM, SIZE, learnable_codebook=True, ema_update=False),
    "residual": lambda: fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=SIZE),
    "residual, k-means and replacement": lambda: fastvq.ResidualVQ(
        dim=DIM, num_quantizers=3, codebook_size=SIZE, kmeans_init=True, threshold_ema_dead_code=2
    ),
    "residual, dropout": lambda: fastvq.ResidualVQ(
        dim=DIM, num_quantizers=4, codebook_size=SIZE, quantize_dropout=True, codebook_dim=4
    ),
    "residual, one codebook": lambda: fastvq.ResidualVQ(
        dim=DIM, num_quantizers=3, codebook_size=SIZE, shared_codebook=True
    ),
    "SimVQ": lambda: fastvq.SimVQ(DIM, SIZE),
    "SimVQ, dropout": lambda: fastvq.ResidualSimVQ(
        dim=DIM, num_quantizers=3, codebook_size=SIZE, quantize_dropout=True
    ),
    "LFQ": lambda: fastvq.LFQ(dim=DIM, codebook_size=16, frac_per_sample_entropy=0.5, orthogonal_rotation=True),
    "LFQ, dropout": lambda: fastvq.ResidualLFQ(dim=DIM, num_quantizers=3, codebook_size=16, quantize_dropout=True),
    "one codebook for all scales": Scales,
    "scales, k-means": lambda: Scales(shared_codebook=False, nested_dropout=0.5),
}


class Model(nn.Module):
    """A layer between two linear maps; `segment` runs the checkpointed part."""

    def __init__(self, kind, segment=None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.layer = LAYERS[kind]()
        self.segment = segment or (lambda part, x: part(x))

    def forward(self, x):
        def part(x):
            return self.layer(self.encoder(x))

        quantized, indices, loss = self.segment(part, x)
        return self.decoder(quantized), indices, loss.sum()


def batch(seed):
    return torch.randn(4, 16, DIM, generator=generator(seed)).requires_grad_()


def train(model, steps=3, micro_batches=1, context=contextlib.nullcontext):
    """Return everything that a run changes: outputs, gradients and state of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        pending = []
        for micro_batch in range(micro_batches):
            x = batch(10 * step + micro_batch)
            with context():
                output, indices, loss = model(x)
            pending.append((x, output.square().mean() + loss))
            seen += [output.detach(), indices]
        for x, objective in pending:
            objective.backward()
            seen.append(x.grad)
        seen += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        seen += state(model).values()
    return seen


def assert_same_runs(ours, expected):
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(kind, use_reentrant):
    """A run equals the one without checkpointing bit for bit.

    The codebook learns once per step, and gradients use the codes before that.
    """

    def segment(part, x):
        return checkpoint(part, x, use_reentrant=use_reentrant)

    assert_same_runs(train(Model(kind, segment)), train(Model(kind)))


def train_alone(kind, use, steps=2):
    """Return the same for a quantizer behind a linear map, with an objective of all its results."""
    layer, encoder = make(kind), nn.Linear(DIM, DIM)
    parameters = [p for p in (*encoder.parameters(), *layer.parameters()) if p.requires_grad]
    seen = []

    def part(x):
        rows = encoder(x.transpose(1, 2)).transpose(1, 2) if kind == "LatentQuantize" else encoder(x)
        return tuple(tensors(layer(rows)))

    for step in range(steps):
        torch.manual_seed(step)
        x = batch_for(kind, seed=step).requires_grad_()
        results = use(part, x)
        objective = sum(r.square().sum() for r in results if r.requires_grad)
        seen += [r.detach() for r in results]
        if isinstance(objective, torch.Tensor):
            objective.backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    seen.append(parameter.grad)
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
        seen += [x.grad] if x.grad is not None else []
        seen += state(layer).values()
    return seen


# The reentrant kind runs the first pass without gradients, for which DiVeQ draws no noise.
@pytest.mark.parametrize(
    ("kind", "use_reentrant"), [(k, r) for k in QUANTIZERS for r in (True, False) if not (r and k == "DiVeQ")]
)
def test_checkpointing_every_quantizer(kind, use_reentrant):
    ours = train_alone(kind, lambda part, x: checkpoint(part, x, use_reentrant=use_reentrant))
    assert_same_runs(ours, train_alone(kind, lambda part, x: part(x)))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_eval_changes_nothing(kind):
    """Also under inference_mode, after which it trains as before."""
    layer = make(kind)
    twin = copy.deepcopy(layer)
    layer.eval()
    before = state(layer)
    results = tensors(layer(batch_for(kind)))
    with torch.inference_mode():
        assert all(map(torch.equal, tensors(layer(batch_for(kind))), results))
    assert all(map(torch.equal, state(layer).values(), before.values()))
    layer.train()
    for one in (layer, twin):
        torch.manual_seed(1)
        one(batch_for(kind, seed=1).requires_grad_())
    assert all(map(torch.equal, state(layer).values(), state(twin).values()))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_half_precision_modules(kind):
    """They train and evaluate in that dtype; codebook statistics stay in float32."""
    for dtype in (torch.float16, torch.bfloat16):
        layer = make(kind).to(dtype)
        for train in (True, False):
            layer.train(train)
            first = tensors(layer(batch_for(kind).to(dtype).requires_grad_()))[0]
            assert not first.is_floating_point() or (first.dtype == dtype and first.isfinite().all())
        kept = [
            t for name, t in state(layer).items() if name.endswith(("cluster_size", "embed_avg", "_codebook.embed"))
        ]
        assert {t.dtype for t in kept} <= {torch.float32}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_vectors_of_another_dtype_than_the_layer(kind):
    """Projections compute in their own dtype, and the output has that of the vectors."""
    x = batch_for(kind)
    for module, vectors in ((torch.float32, torch.float16), (torch.bfloat16, torch.float32)):
        layer, own = make(kind).to(module), x.to(vectors).requires_grad_()
        first = tensors(layer(own))[0]
        assert not first.is_floating_point() or (first.dtype == vectors and first.isfinite().all())
        layer.eval()
        indices = [tensor for tensor in tensors(layer(own)) if not tensor.is_floating_point()]
        if kind not in ("sampled", "residual, sampled"):
            assert all(map(torch.equal, tensors(layer.encode(own)), indices))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_copies_go_on_alike(kind):
    for trained in (False, True):
        layer = make(kind)
        if trained:
            layer(batch_for(kind))
        copies = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        for seed in (1, 2):
            results = []
            for one in copies:
                torch.manual_seed(seed)
                results.append(tensors(one(batch_for(kind, seed=seed))))
            for result in results[1:]:
                assert all(map(torch.equal, results[0], result))
        for one in copies[1:]:
            assert all(map(torch.equal, state(layer).values(), state(one).values()))


@pytest.mark.parametrize("kind", ["plain", "residual, dropout"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_micro_batches(kind, use_reentrant):
    """Two forward passes, then their backward passes."""

    def segment(part, x):
        return checkpoint(part, x, use_reentrant=use_reentrant)

    assert_same_runs(train(Model(kind, segment), micro_batches=2), train(Model(kind), micro_batches=2))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_nested_checkpoints(kind):
    def segment(part, x):
        return checkpoint(lambda y: checkpoint(part, y, use_reentrant=False), x, use_reentrant=False)

    assert_same_runs(train(Model(kind, segment)), train(Model(kind)))


def test_a_compiled_layer_cannot_be_repeated():
    """The layer cannot detect the repetition; an error is better than gradients of other codes."""
    layer = torch.compile(fastvq.VectorQuantize(DIM, SIZE), fullgraph=True, backend="aot_eager")
    quantized, _, loss = checkpoint(layer, batch(0), use_reentrant=False)
    with pytest.raises(RuntimeError, match="a codebook would learn a batch again, within backward"):
        (quantized.sum() + loss).backward()
    frozen = fastvq.VectorQuantize(DIM, SIZE, freeze_codebook=True)
    layer = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    quantized, _, loss = checkpoint(layer, batch(0), use_reentrant=False)
    (quantized.sum() + loss).backward()


@pytest.mark.parametrize("kind", ["plain", "cosine", "residual, k-means and replacement"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    """The layer's input has the dtype of autocast; its indices are exact for that, its state is float32."""
    model = Model(kind)
    given = []
    model.layer.register_forward_pre_hook(lambda layer, args: given.append(args[0]))
    train(model, context=lambda: torch.autocast("cpu", dtype))
    model.eval()
    with torch.autocast("cpu", dtype):
        _, indices, _ = model(batch(9))
    assert given[-1].dtype == dtype
    assert torch.equal(indices, model.layer(given[-1].float())[1])
    assert torch.equal(indices, model.layer(given[-1])[1])
    assert {t.dtype for t in state(model.layer).values() if t.is_floating_point()} == {torch.float32}


@pytest.fixture
def _process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["plain", "k-means and replacement", "residual", "learnable"])
@pytest.mark.usefixtures("_process_group")
def test_ddp_in_one_process(kind):
    model = Model(kind)
    ours = train(nn.parallel.DistributedDataParallel(model))
    assert_same_runs(ours, train(Model(kind)))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "k-means" not in kind and "one" not in kind])
def test_functional_call(kind):
    """It learns in the given tensors.

    Only the module knows whether k-means has run, and torch does not restore the state of a module that is used twice.
    """
    model = Model(kind)
    copies = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    before = state(model)
    torch.manual_seed(0)
    ours = torch.func.functional_call(model, copies, (batch(0),))
    after = state(model)
    for name in copies:  # statistics aren't part of them
        assert torch.equal(after[name], before[name])
    torch.manual_seed(0)
    for one, other in zip(ours, model(batch(0)), strict=True):
        assert torch.equal(one, other)
    after = state(model)
    for name, tensor in copies.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("layer", ["VectorQuantize", "ResidualVQ"])
def test_functional_call_with_copied_parameters_alone(layer):
    """k-means goes to the copies, but is noted in the module's own buffers: other parameters get theirs."""
    settings = {"dim": DIM, "codebook_size": SIZE, "kmeans_init": True, "learnable_codebook": True, "ema_update": False}
    torch.manual_seed(0)
    model = getattr(fastvq, layer)(**settings | ({"num_quantizers": 2} if layer == "ResidualVQ" else {}))
    copies = [{name: t.detach().clone() for name, t in model.named_parameters()} for _ in range(2)]
    for own in copies:
        torch.func.functional_call(model, own, (batch(0).detach(),))
        assert all(bool(t.any(-1).all()) for name, t in own.items() if name.endswith("embed")), list(own)
    learned = {name: t.clone() for name, t in copies[0].items()}
    torch.func.functional_call(model, copies[0], (batch(1).detach(),))
    assert all(torch.equal(t, learned[name]) for name, t in copies[0].items()), "k-means runs once"
    torch.manual_seed(0)
    indices = model(batch(0).detach())[1]
    assert indices.unique().numel() > 1
    torch.manual_seed(0)
    fresh = getattr(fastvq, layer)(**settings | ({"num_quantizers": 2} if layer == "ResidualVQ" else {}))
    torch.manual_seed(0)
    assert torch.equal(indices, fresh(batch(0).detach())[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["plain", "projected", "cosine", "residual"])
def test_vmap_in_eval(kind):
    model = Model(kind).eval()
    x = batch(0).detach()
    with torch.no_grad():
        codes = torch.func.vmap(lambda row: model.layer(row[None])[1][0])(x)
        assert torch.equal(codes, model.layer(x)[1])


@pytest.mark.parametrize("kind", ["plain", "k-means and replacement", "residual, k-means and replacement"])
def test_inference_mode_then_training(kind):
    model, other = Model(kind).eval(), Model(kind)
    with torch.inference_mode():
        model(batch(0))
    assert_same_runs(train(model.train()), train(other))


@pytest.mark.parametrize("kind", LAYERS)
def test_built_without_memory(kind):
    """Built on "meta", then filled from a checkpoint: the same run, with health counted from zero."""
    for assign in (False, True):
        trained = Model(kind)
        train(trained, steps=1)
        with torch.device("meta"):
            model = Model(kind)
        if not assign:
            poison = [torch.full((size,), torch.nan) for size in range(200)]
            del poison
            model.to_empty(device="cpu")
        model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
        for module in trained.modules():  # what isn't saved
            for name in getattr(module, "_statistics", ()):
                if getattr(module, name) is not None:
                    getattr(module, name).zero_()
        assert_same_runs(train(model), train(trained))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_averaged_models(kind):
    model = Model(kind)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model)
    averaged.update_parameters(model)
    averaged(batch(0))
