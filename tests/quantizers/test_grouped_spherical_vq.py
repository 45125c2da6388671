"""GSQ: a spherical quantizer for each group of channels."""

from __future__ import annotations

import pytest
import torch

import fastvq

from ..cases import close


@pytest.mark.parametrize("training", [True, False])
def test_groups_are_quantized_apart(training):
    torch.manual_seed(0)
    gsq = fastvq.GroupedSphericalVQ(6, 12, 3, channel_first=True).train(training)
    x = torch.randn(2, 6, 4, 5)
    quantized, indices, loss = gsq(x)
    parts = [group(part) for group, part in zip(gsq.groups, x.chunk(3, 1), strict=True)]
    assert torch.equal(quantized, torch.cat([part[0] for part in parts], 1))
    assert torch.equal(indices, torch.stack([part[1] for part in parts], -1))
    close(loss, torch.stack([part[2] for part in parts]).mean())
    assert torch.equal(gsq.encode(x), indices)
    close(gsq.indices_to_codes(indices), quantized)
    close(gsq.codebooks.norm(dim=-1), torch.ones(3, 12))


def test_a_vector_that_is_not_finite_has_no_index_in_any_group():
    gsq, x = fastvq.GroupedSphericalVQ(6, 12, 3), torch.randn(1, 4, 6)
    x[0, 2, 0] = torch.inf
    assert (gsq(x)[1][0, 2] == -1).all()


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="groups: must divide dim=6, got 4"):
        fastvq.GroupedSphericalVQ(6, 12, 4)
    gsq = fastvq.GroupedSphericalVQ(6, 12, 3)
    with pytest.raises(ValueError, match="x: must have dim=6 as its last size"):
        gsq(torch.randn(2, 6, 5))
    with pytest.raises(ValueError, match=r"indices: must have shape \(..., G=3\)"):
        gsq.indices_to_codes(torch.zeros(2, 2, dtype=torch.int64))
