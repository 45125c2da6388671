"""Invalid arguments of every quantizer: the error begins with their name. Each quantizer's own tests have more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastvq

X = torch.randn(2, 5, 8)


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
    "too many groups": ("indices", lambda: grouped()(X, indices=torch.zeros(3, 2, 5, 2).long())),
}


STACK = {"dim": 8, "codebook_size": 4, "num_quantizers": 2}
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
