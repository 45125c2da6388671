"""Codebooks that grow and shrink, with their averages."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.codebook import Codebook

from ..cases import close
from ..layers import DIM, SIZE, batch, layer

OPTIONS = [{}, {"learnable_codebook": True}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fewer_codes_are_the_most_used(options):
    module = layer(**options)
    module._codebook.cluster_size[0] = torch.randperm(SIZE).float()
    before, sizes = module.codebook.detach().clone(), module._codebook.cluster_size[0].clone()
    averages = module._codebook.embed_avg[0].clone()
    module.resize_(5)
    kept = (sizes >= SIZE - 5).nonzero().flatten()
    assert torch.equal(module.codebook, before[kept])
    assert torch.equal(module._codebook.cluster_size[0], sizes[kept])
    assert torch.equal(module._codebook.embed_avg[0], averages[kept])
    assert isinstance(module._codebook.embed, torch.nn.Parameter) == ("learnable_codebook" in options)
    assert module(batch())[1].max() < 5
    assert module.usage() <= 1
    twin = layer(codebook_size=5, **options)
    twin.load_state_dict(module.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_more_codes_split_the_most_used(options):
    module = layer(**options)
    module._codebook.cluster_size[0] = 1 + torch.randperm(SIZE).float()
    before, sizes = module.codebook.detach().clone(), module._codebook.cluster_size[0].clone()
    module.resize_(SIZE + 3)
    largest = sizes.argsort(descending=True)[:3]
    assert torch.equal(module.codebook[:SIZE], before)
    assert ((module.codebook[SIZE:] - before[largest]).norm(dim=1) < 0.1 * before[largest].norm(dim=1)).all()
    assert not (module.codebook[SIZE:] == before[largest]).all(1).any()
    close(module._codebook.cluster_size.sum(), sizes.sum())
    close(module._codebook.cluster_size[0, SIZE:], sizes[largest] / 2)
    close(module._codebook.embed_avg[0, SIZE:], module.codebook[SIZE:].detach() * sizes[largest, None] / 2)
    x = batch()
    module(x)
    assert module.eval()(x)[1].max() < SIZE + 3


def test_more_than_twice_as_many_and_stages():
    rvq = fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=(4, 6), threshold_ema_dead_code=1)
    rvq.resize_(15)
    assert rvq.codebooks.shape == (2, 15, DIM)
    close(rvq.layers[0]._codebook.cluster_size.sum(), torch.tensor(4.0))
    rvq(batch())
    assert rvq.usage().shape == (2,)


STACK = {"dim": DIM, "codebook_size": 4}
LAYERS = {
    "grouped": lambda: fastvq.GroupedResidualVQ(**STACK, num_quantizers=2, groups=2),
    "split": lambda: fastvq.SplitResidualVQ(**STACK, num_quantizers=3),
    "scales": lambda: fastvq.HierarchicalVQ(**STACK, scales=(1, 10), channel_first=False),
    "scales of their own": lambda: fastvq.HierarchicalVQ(
        **STACK, scales=(1, 10), channel_first=False, shared_codebook=False
    ),
    "a chain": lambda: fastvq.Sequential(torch.nn.Identity(), fastvq.VectorQuantize(**STACK)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_of_codebooks(name):
    one = LAYERS[name]()
    one(batch())
    one.resize_(40)
    indices = one(batch())[1]
    indices = indices[-1] if isinstance(indices, tuple) else indices
    assert 4 <= int(indices.max()) < 40
    sizes = [part.size for part in one.modules() if isinstance(part, Codebook)]
    assert sizes
    assert set(sizes) == {40}
    assert one.get_output_from_indices(one.encode(batch())).shape == batch().shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vq_bridge": torch.nn.Linear(DIM, DIM)}, "vq_bridge: must be None"),
        (
            {"learnable_codebook": True, "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, 0.1)},
            "in_place_codebook_optimizer: must be None",
        ),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        layer(**options).resize_(5)
    with pytest.raises(ValueError, match=r"^codebook_size: must be"):
        layer().resize_(0)
    with pytest.raises(ValueError, match=r"^shared_codebook: must be False"):
        fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=4, shared_codebook=True).resize_(5)
