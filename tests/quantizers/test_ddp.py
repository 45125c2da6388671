"""Layers under DistributedDataParallel with its default settings, which waits for every parameter at each step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastvq

from ..every import QUANTIZERS, adam, batch_for, make, tensors

vq = partial(fastvq.VectorQuantize, 6, 12)
rvq = partial(fastvq.ResidualVQ, dim=6, num_quantizers=4, codebook_size=12, quantize_dropout=True)
scales = partial(fastvq.HierarchicalVQ, dim=6, codebook_size=12, scales=(1, 2, 16), channel_first=False)
UNUSED = {
    "dropout, learnable": partial(rvq, learnable_codebook=True),
    "dropout, implicit": partial(rvq, implicit_neural_codebook=True),
    "dropout, orthogonal": partial(rvq, orthogonal_reg_weight=0.1),
    "dropout, DiVeQ": partial(rvq, diveq=True, threshold_ema_dead_code=1),
    "dropout, directional": partial(rvq, directional_reparam=True, threshold_ema_dead_code=1),
    "dropout, beam": partial(rvq, learnable_codebook=True, beam_size=2),
    "dropout, shared": partial(rvq, learnable_codebook=True, shared_codebook=True),
    "dropout, in place": partial(rvq, learnable_codebook=True, in_place_codebook_optimizer=adam),
    "dropout, SimVQ": partial(fastvq.ResidualSimVQ, dim=6, num_quantizers=4, codebook_size=12, quantize_dropout=True),
    "dropout, LFQ": partial(fastvq.ResidualLFQ, dim=6, num_quantizers=4, codebook_size=16, quantize_dropout=True),
    "dropout, groups": partial(
        fastvq.GroupedResidualVQ, dim=6, groups=2, num_quantizers=4, codebook_size=12, quantize_dropout=True,
        learnable_codebook=True,
    ),
    "frozen, learnable": partial(vq, learnable_codebook=True, freeze_codebook=True),
    "frozen, orthogonal": partial(vq, orthogonal_reg_weight=0.1, freeze_codebook=True),
    "frozen, residual": partial(rvq, learnable_codebook=True, freeze_codebook=True, quantize_dropout=False),
    "no commitment": partial(vq, learnable_codebook=True, commitment_weight=0.0),
    "not routed": partial(vq, learnable_codebook=True, route_gradients_to_input=False, freeze_codebook=True),
    "bridge": partial(vq, vq_bridge=nn.Linear(6, 6), freeze_codebook=True),
    "scales, nested dropout": partial(scales, nested_dropout=0.9, share_quant_resi=0, shared_codebook=False),
    "scales, orthogonal": partial(scales, nested_dropout=0.9, orthogonal_reg_weight=0.1, shared_codebook=False),
    "scales without phi": partial(scales, quant_resi=0.0),
    "values in place": partial(
        fastvq.LatentQuantize, [5, 4, 3], 6, in_place_codebook_optimizer=partial(torch.optim.SGD, lr=0.1)
    ),
    "values without losses": partial(
        fastvq.LatentQuantize, [5, 4, 3], 6, commitment_loss_weight=0.0, quantization_loss_weight=0.0
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Model(nn.Module):
    """A layer behind a linear map."""

    def __init__(self, layer, kind=""):
        super().__init__()
        self.encoder, self.layer, self.kind = nn.Linear(6, 6), layer, kind

    def forward(self, x):
        channels_first = isinstance(self.layer, fastvq.LatentQuantize)
        encoded = self.encoder(x.mT).mT if channels_first else self.encoder(x)
        if isinstance(self.layer, fastvq.RandomProjectionQuantizer):
            return encoded, self.layer(encoded)
        return self.layer(encoded)


def objective(results, use):
    return sum(t.float().square().sum() for t in use([t for t in tensors(results) if t.requires_grad]))


def run(model, use=lambda found: found, steps=4):
    """Train; return the gradients of all steps, with zeros for none."""
    seen = []
    own = model.module if isinstance(model, DistributedDataParallel) else model
    for step in range(steps):
        torch.manual_seed(step)
        x = batch_for(own.kind, seed=step)
        own.zero_grad()
        objective(model(x), use).backward()
        seen += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own.parameters()]
    return seen


def assert_same_under_ddp(layer, kind="plain", use=lambda found: found):
    model = Model(layer, kind)
    alone = copy.deepcopy(model)
    for one, other in zip(run(DistributedDataParallel(model), use), run(alone, use), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer(kind):
    assert_same_under_ddp(make(kind), kind)


@pytest.mark.parametrize("kind", UNUSED)
def test_parameters_that_take_no_part(kind):
    torch.manual_seed(0)
    layer = UNUSED[kind]()
    assert_same_under_ddp(layer, "LatentQuantize" if isinstance(layer, fastvq.LatentQuantize) else "plain")


@pytest.mark.parametrize("part", [0, -1])
def test_one_of_the_results_is_enough(part):
    """The output, or the loss."""
    assert_same_under_ddp(UNUSED["dropout, learnable"](), use=lambda found: [found[part]])


def test_ddp_that_searches_for_unused_parameters_finds_them():
    torch.manual_seed(0)
    model = Model(rvq(learnable_codebook=True, quantize_dropout=False), "plain")
    model.layer.layers[-1].freeze_codebook = True
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(batch_for("plain"))[2].sum().backward()
    assert model.layer.layers[0]._codebook.embed.grad is not None
    assert model.layer.layers[-1]._codebook.embed.grad is None
