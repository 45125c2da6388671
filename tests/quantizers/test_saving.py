"""Files of safetensors, of layers whose parts share tensors too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import fastvq

from ..every import QUANTIZERS, batch_for, make, tensors

safetensors = pytest.importorskip("safetensors.torch")

rvq = partial(fastvq.ResidualVQ, dim=6, num_quantizers=3, codebook_size=12)


def bridge():
    return nn.Linear(6, 6)


SHARING = {
    "codebook": lambda: rvq(shared_codebook=True),
    "learnable codebook": lambda: rvq(shared_codebook=True, learnable_codebook=True),
    "codebook, affine": lambda: rvq(shared_codebook=True, affine_param=True),
    "bridge": lambda: rvq(vq_bridge=bridge()),
    "codebooks of groups": lambda: fastvq.GroupedResidualVQ(
        dim=6, groups=2, num_quantizers=2, codebook_size=8, shared_codebook=True
    ),
    "bridge of groups": lambda: fastvq.GroupedResidualVQ(
        dim=6, groups=2, num_quantizers=2, codebook_size=8, vq_bridge=nn.Linear(3, 3)
    ),
    "transform": lambda: fastvq.ResidualSimVQ(
        dim=6, num_quantizers=3, codebook_size=12, codebook_transform=nn.Linear(6, 6)
    ),
    "activation": lambda: fastvq.ResidualLFQ(
        dim=6, num_quantizers=3, codebook_size=64, straight_through_activation=nn.PReLU()
    ),
    "scales": lambda: fastvq.HierarchicalVQ(dim=6, codebook_size=12, scales=(1, 4), channel_first=False),
}
LAYERS = {**{kind: partial(make, kind) for kind in QUANTIZERS}, **SHARING}


def results(layer, kind):
    return tensors(layer(batch_for(kind if kind in QUANTIZERS else "plain")))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("route", ["save_file", "save_model"])
@pytest.mark.parametrize("kind", LAYERS)
def test_saved_and_loaded(kind, route, nested, tmp_path):
    torch.manual_seed(0)
    layer, fresh = LAYERS[kind](), LAYERS[kind]()
    results(layer, kind)
    model, other = (nn.ModuleDict({"layer": one}) if nested else one for one in (layer, fresh))
    path = tmp_path / "state.safetensors"
    if not model.state_dict():
        return
    if route == "save_file":
        safetensors.save_file(model.state_dict(), path)
        other.load_state_dict(safetensors.load_file(path), strict=True)
    else:
        safetensors.save_model(model, str(path))
        assert safetensors.load_model(other, str(path)) == (set(), [])
    for one, same in zip(results(layer.eval(), kind), results(fresh.eval(), kind), strict=True):
        assert torch.equal(one, same) or kind == "sampled"


@pytest.mark.parametrize("kind", SHARING)
def test_one_name_of_a_shared_tensor_suffices(kind):
    """As in files of `save_model`, which leaves out all others; and what is shared stays so."""
    layer, fresh = SHARING[kind](), SHARING[kind]()
    state = layer.state_dict()
    names = [n for n, t in layer.named_parameters()] + [n for n, t in layer.named_buffers()]
    fresh.load_state_dict({name: state[name] for name in names}, strict=True)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name])
    assert names == [n for n, t in fresh.named_parameters()] + [n for n, t in fresh.named_buffers()]
    missing = dict(state)
    for name in [n for n in missing if n.endswith(("embed", "weight"))]:
        del missing[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(missing, strict=True)


def test_tensors_of_a_state_with_variables_are_the_modules_own():
    layer = rvq(shared_codebook=True, learnable_codebook=True)
    state = layer.state_dict(keep_vars=True)
    assert state["layers.2._codebook.embed"] is layer.layers[0]._codebook.embed
