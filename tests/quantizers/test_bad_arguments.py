"""Invalid arguments of every quantizer: the error begins with their name. Each quantizer's own tests have more."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import fastvq

from ..every import QUANTIZERS, batch_for, make

X = torch.randn(2, 5, 8)


STACK = {"dim": 8, "codebook_size": 4, "num_quantizers": 2}


def vq(**options):
    return fastvq.VectorQuantize(**{"dim": 8, "codebook_size": 16} | options)


def rvq(**options):
    return fastvq.ResidualVQ(**{"dim": 8, "num_quantizers": 2, "codebook_size": 16} | options)


def grouped():
    return fastvq.GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=16).eval()


def random_projection(**options):
    return fastvq.RandomProjectionQuantizer(dim=8, codebook_size=16, codebook_dim=4, **options)


CASES = {
    "a size that is no integer": ("codebook_size", lambda: vq(codebook_size=16.0)),
    "rounds that are no integer": ("kmeans_iters", lambda: vq(kmeans_iters=1.5)),
    "a negative temperature": ("sample_codebook_temp", lambda: vq(sample_codebook_temp=-1.0)),
    "a bridge by name": ("vq_bridge", lambda: vq(vq_bridge="linear")),
    "an optimizer by name": (
        "in_place_codebook_optimizer",
        lambda: vq(learnable_codebook=True, in_place_codebook_optimizer="adam"),
    ),
    "an optimizer of values by name": (
        "in_place_codebook_optimizer",
        lambda: fastvq.LatentQuantize([4, 4], 8, in_place_codebook_optimizer="adam"),
    ),
    "a transform by name": ("codebook_transform", lambda: fastvq.SimVQ(8, 16, codebook_transform="linear")),
    "a policy by name": ("replacement", lambda: vq(replacement="kmeans++")),
    "two policies": (
        "replacement, threshold_ema_dead_code",
        lambda: vq(replacement=fastvq.Replacement(), threshold_ema_dead_code=2),
    ),
    "a decay above 1": ("affine_param_batch_decay", lambda: vq(affine_param=True, affine_param_batch_decay=5.0)),
    "a size of LFQ": ("codebook_size", lambda: fastvq.LFQ(codebook_size=16.0)),
    "codes of SimVQ": ("init_fn", lambda: fastvq.SimVQ(8, 16, init_fn=lambda codes: codes[:3])),
    "k-means of what never learns": ("kmeans_init", lambda: random_projection(kmeans_init=True)),
    "heads beside num_codebooks": ("heads", lambda: random_projection(heads=2)),
    "too few groups": ("indices", lambda: grouped().get_output_from_indices(torch.zeros(1, 2, 5, 2).long())),
    "rows of lengths in a list": ("lens", lambda: vq()(X, lens=[2, 3])),
    "lengths that are no integers": ("lens", lambda: rvq()(X, lens=torch.tensor([2.0, 3.0]))),
    "a length beyond that of x": ("lens", lambda: rvq().encode(X, lens=torch.tensor([2, 6]))),
    "a negative length": ("lens", lambda: fastvq.FSQ([3, 3], dim=8)(X, lens=torch.tensor([-1, 5]))),
    "a mask in a list": ("mask", lambda: vq()(X, mask=[[True] * 5] * 2)),
    "a mask of a function in a list": ("mask", lambda: fastvq.quantize(X, X[0], mask=[[True] * 5] * 2)),
    "a decay for each code": ("decay", lambda: vq(decay=torch.full((16,), 0.9))),
    "a decay that is an integer tensor": ("decay", lambda: setattr(vq(), "decay", torch.tensor(1))),
    "no decay": ("decay", lambda: setattr(rvq(), "decay", None)),
    "a decay in words": ("decay", lambda: vq(decay="0.9")),
    "no weight": ("commitment_weight", lambda: vq(commitment_weight=None)),
    "a fraction in words": ("sync_update_v", lambda: vq(sync_update_v="half")),
    "a diversity without a temperature": (
        "codebook_diversity_temperature",
        lambda: vq(codebook_diversity_temperature=float("inf")),
    ),
    "a number for a policy": ("replacement", lambda: vq(replacement=3)),
    "half a step": ("every", lambda: fastvq.Replacement(every=1.5)),
    "a policy without a threshold": ("threshold", lambda: fastvq.Replacement(None)),
    "a bridge of other codes": ("vq_bridge", lambda: vq(vq_bridge=fastvq.parts.VQBridge(8, 32))),
    "a bridge of other dimensions": ("vq_bridge", lambda: vq(vq_bridge=fastvq.parts.VQBridge(4, 16))),
    "a module that is no bridge": ("vq_bridge", lambda: vq(vq_bridge=torch.nn.Linear(8, 4))(X)),
    "a bridge of other codes, alone": ("codes", lambda: fastvq.parts.VQBridge(8, 16)(torch.zeros(1, 16, 4))),
    "stages that are no integer": ("num_quantizers", lambda: rvq(num_quantizers=2.0)),
    "stages of FSQ": ("num_quantizers", lambda: fastvq.ResidualFSQ(levels=[3, 3], num_quantizers=2.0)),
    "stages of LFQ": ("num_quantizers", lambda: fastvq.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2.0)),
    "stages of DAC": ("num_quantizers", lambda: fastvq.FactorizedResidualVQ(8, 16, 2.0)),
    "stages of Mimi": ("num_quantizers", lambda: fastvq.SplitResidualVQ(dim=8, codebook_size=16, num_quantizers=4.0)),
    "dimensions of stages": ("codebook_dim", lambda: fastvq.FactorizedResidualVQ(8, 16, 2, (4, 2.0))),
    "dimensions of codes": ("codebook_dim", lambda: rvq(codebook_dim=4.0)),
    "dimensions of levels": ("dim", lambda: fastvq.FSQ([3, 3], dim=8.0)),
    "codebooks of levels": ("num_codebooks", lambda: fastvq.FSQ([3, 3], num_codebooks=1.5)),
    "groups that are no integer": ("groups", lambda: fastvq.GroupedResidualVQ(**STACK, groups=2.0)),
    "one scale": ("scales", lambda: fastvq.HierarchicalVQ(dim=8, codebook_size=4, scales=3)),
    "scales that are no integers": ("scales", lambda: fastvq.HierarchicalVQ(dim=8, codebook_size=4, scales=(1, 2.0))),
    "half a beam": ("beam_size", lambda: rvq(beam_size=1.5)),
    "half a stage": ("quantize_dropout_cutoff_index", lambda: rvq(quantize_dropout_cutoff_index=0.5)),
    "half a bit": ("bits", lambda: fastvq.BinaryMapper(1.5)),
    "codes that are frozen": ("freeze_codebook", lambda: vq(freeze_codebook=True).fit([X])),
    "a temperature without end": (
        "temperature",
        lambda: fastvq.parts.balanced_assignment(X, X[0], temperature=float("inf")),
    ),
    "vectors that are integers": ("x", lambda: fastvq.parts.balanced_assignment(X.long(), X[0])),
    "codes of other dimensions": ("x, codebook", lambda: fastvq.parts.balanced_assignment(X, X[0, :, :4])),
    "data that are none": ("batches", lambda: vq().fit(None)),
    "indices of strides that are none": (
        "indices",
        lambda: fastvq.StridedResidualVQ(8, 4, (1,)).get_output_from_indices(3),
    ),
    "logits that are none": ("logits", lambda: fastvq.BinaryMapper(3).encode([1.0, 2.0, 3.0])),
    "logits that are integers": ("logits", lambda: fastvq.BinaryMapper(3)(torch.zeros(2, 3, dtype=torch.int64))),
    "no temperature": ("temperature", lambda: fastvq.BinaryMapper(3)(torch.zeros(2, 3), temperature=None)),
    "grids in a list": (
        "indices",
        lambda: fastvq.HierarchicalVQ(dim=8, codebook_size=4, scales=(1,)).get_output_from_indices([[1]]),
    ),
    "nothing to restore": ("model", lambda: fastvq.restore(None)),
    "too many groups": ("indices", lambda: grouped()(X, indices=torch.zeros(3, 2, 5, 2).long())),
}


WITH_STAGES = {
    "ResidualVQ": STACK,
    "ResidualSimVQ": STACK,
    "ResidualLFQ": STACK,
    "SplitResidualVQ": STACK,
    "GroupedResidualVQ": {**STACK, "groups": 2},
    "GroupedResidualLFQ": {**STACK, "groups": 2},
    "ResidualFSQ": {"dim": 8, "levels": [4, 4], "num_quantizers": 2},
    "GroupedResidualFSQ": {"dim": 8, "levels": [4, 4], "num_quantizers": 2, "groups": 2},
    "StridedResidualVQ": {"dim": 8, "codebook_size": 4, "strides": (2, 1), "codebook_dim": 4},
    "RandomProjectionQuantizer": {"dim": 8, "codebook_size": 4, "codebook_dim": 4},
    "EvoLFQ": {"encoder": torch.nn.Identity(), "decoder": torch.nn.Identity(), "dim": 4},
    "IFSQ": {"levels": [3, 3]},
}


@pytest.mark.parametrize("case", CASES)
def test_the_argument_is_named(case):
    name, call = CASES[case]
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        call()


def test_numpys_integers_are_integers():
    assert vq(dim=np.int64(8), codebook_size=np.int32(16))(X)[1].shape == (2, 5)


@pytest.mark.parametrize("name", WITH_STAGES)
def test_a_layer_of_stages_names_itself(name):
    """An argument that its stages lack is no argument of the layer, whose class the user wrote."""
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'nonsense'"):
        getattr(fastvq, name)(**WITH_STAGES[name], nonsense=1)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_what_is_no_tensor_is_named(kind):
    layer, x = make(kind).eval(), batch_for(kind, length=6)
    indices = layer.encode(x)
    calls = [("x", lambda: layer(x.tolist())), ("x", lambda: layer.encode(x.numpy()))]
    calls += [("mask", lambda: layer.encode(x, mask=[[True] * 6] * 4)), ("lens", lambda: layer.encode(x, lens=[6] * 4))]
    for name in ("get_output_from_indices", "get_codes_from_indices", "indices_to_codes"):
        if hasattr(layer, name):
            calls.append(("indices", partial(getattr(layer, name), indices.tolist())))
            calls.append(("indices", partial(getattr(layer, name), indices.float())))
    for argument, call in calls:
        with pytest.raises(TypeError, match=f"^{argument}: must be "):
            call()


PARTLY_FROZEN = {
    "ResidualVQ": (lambda: rvq(), lambda layer: layer.layers[1]),
    "SplitResidualVQ": (lambda: fastvq.SplitResidualVQ(**STACK), lambda layer: layer.acoustic.layers[0]),
    "GroupedResidualVQ": (lambda: fastvq.GroupedResidualVQ(**STACK, groups=2), lambda layer: layer.rvqs[1].layers[1]),
    "HierarchicalVQ": (
        lambda: fastvq.HierarchicalVQ(
            dim=8, codebook_size=4, scales=(1, 5), shared_codebook=False, channel_first=False
        ),
        lambda layer: layer.vqs[1],
    ),
}


@pytest.mark.parametrize("name", PARTLY_FROZEN)
def test_nothing_is_fitted_where_a_codebook_is_frozen(name):
    make, stage = PARTLY_FROZEN[name]
    layer = make()
    stage(layer).freeze_codebook = True
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"^freeze_codebook: must be False to fit the codes"):
        layer.fit([X, X])
    assert all(torch.equal(before[key], tensor) for key, tensor in layer.state_dict().items())
