"""Masked vectors, for every quantizer."""

from __future__ import annotations

import pytest
import torch

from .. import every

LENS = torch.tensor([16, 3, 0, 9])
KEPT = torch.arange(16) < LENS[:, None]


def forward(kind, layer, x, **options):
    """Return (quantized with vectors last, or None; indices (B, N, ...), groups last)."""
    with torch.no_grad():
        results = layer(x, **options)
    if kind == "random projections":
        return None, results
    quantized, indices = results[:2]
    if kind == "LatentQuantize":
        quantized = quantized.transpose(1, 2)
    return quantized, indices.movedim(0, -1) if kind.startswith("grouped") else indices


@pytest.mark.parametrize("kind", every.QUANTIZERS)
def test_lengths_are_a_mask_and_leave_other_vectors_alone(kind):
    layer, x = every.make(kind).eval(), every.batch_for(kind)
    masked, counted, plain = (forward(kind, layer, x, **o) for o in ({"mask": KEPT}, {"lens": LENS}, {}))
    assert (masked[1][~KEPT] == -1).all()
    assert torch.equal(masked[1][KEPT], plain[1][KEPT])
    assert torch.equal(masked[1], counted[1])
    if plain[0] is not None:
        assert not masked[0][~KEPT].any()
        torch.testing.assert_close(masked[0][KEPT], plain[0][KEPT])
        assert torch.equal(masked[0], counted[0])


@pytest.mark.parametrize("kind", every.QUANTIZERS)
def test_masked_vectors_have_no_part_in_learning(kind):
    """Two batches that differ only in masked vectors leave the same state, losses and gradients."""
    x = every.batch_for(kind)
    other = torch.where(KEPT[:, None] if kind == "LatentQuantize" else KEPT[..., None], x, 100 * x + 1)
    found = []
    for given in (x, other):
        layer = every.make(kind).train()
        leaf = given.clone().requires_grad_()
        torch.manual_seed(5)
        results = layer(leaf, mask=KEPT)
        losses = [t for t in every.tensors(results) if t.requires_grad]
        if losses:
            sum(t.float().sum() for t in losses).backward()
            rows = leaf.grad.transpose(1, 2) if kind == "LatentQuantize" else leaf.grad
            assert not rows[~KEPT].any()
        found.append([*layer.state_dict().values(), *every.tensors(results)])
        found[-1] += [p.grad for p in layer.parameters() if p.grad is not None]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
