"""The factorized search against a loop in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvq.parts.factorized import FactorizedStage, factorized_output, factorized_search

from ..cases import close, generator


def stages(count, dims, *, dim=12, size=16):
    g = generator(3)
    return [
        FactorizedStage(*(torch.randn(*shape, generator=g) for shape in ((d, dim), (d,), (dim, d), (dim,), (size, d))))
        for d in dims[:count]
    ]


@pytest.mark.parametrize("strides", [(1, 1, 1), (4, 2, 1), (1, 2, 4), (2, 6, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_every_index_is_that_of_a_loop_in_float64(strides, masked):
    x = torch.randn(2, 12, 24, generator=generator(1))
    mask = torch.rand(2, 24, generator=generator(2)) > 0.3 if masked else None
    if mask is not None:
        mask[1, 12:] = False
        x = x.masked_fill(~mask[:, None], 0)
    own = stages(3, (4, 5, 3))
    found = factorized_search(x, own, strides=strides, mask=mask)
    output = factorized_output(own, found.indices, found.codes, strides=strides)
    residual = x.double()
    for stage, stride, indices in zip(own, strides, found.indices, strict=True):
        into, into_bias, back, back_bias, codes = (t.double() for t in stage)
        here = torch.ones(2, 24, dtype=torch.bool) if mask is None else mask
        cells = (residual * here[:, None]).unflatten(2, (-1, stride)).sum(-1)
        number = here.unflatten(1, (-1, stride)).sum(-1)
        z = (cells / number.clamp_min(1)[:, None]).mT @ into.T + into_bias
        expected = (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)
        assert torch.equal(indices, torch.where(number > 0, expected, -1))
        out = (codes[expected] @ back.T + back_bias).mT
        residual = residual - out.repeat_interleave(stride, 2)
    taken = (x.double() - residual).float()
    if mask is not None:
        taken, output = taken.masked_fill(~mask[:, None], 0), output.masked_fill(~mask[:, None], 0)
    close(output, taken, tolerance={"rtol": 1e-4, "atol": 1e-4})


def test_rows_without_a_code_have_the_index_that_is_asked_for():
    x, own = torch.randn(1, 12, 3), stages(1, (4,))
    x[0, :, 1] = torch.nan
    assert factorized_search(x, own).indices[0][0, 1] == -1
    assert factorized_search(x, own, missing=0).indices[0][0, 1] == 0
