"""VQBridge: it starts near the identity, and moves all codes."""

from __future__ import annotations

import pytest
import torch

import fastvq
from fastvq.parts import VQBridge

from ..cases import close, generator


def test_it_starts_near_the_identity_and_moves_all_codes():
    torch.manual_seed(0)
    bridge = VQBridge(6, 32, patch=8, width=16)
    vq = fastvq.VectorQuantize(6, 32, vq_bridge=bridge)
    x = 0.01 * torch.randn(4, 1, 6, generator=generator())  # few vectors choose few codes
    assert (vq._codebook.codes - vq._codebook.embed).square().mean() < 0.1 * vq._codebook.embed.square().mean()
    optimizer = torch.optim.SGD(bridge.parameters(), 1.0)
    for _ in range(2):
        before = vq._codebook.codes.detach()
        optimizer.zero_grad()
        vq(x)[2].backward()
        optimizer.step()
        assert (vq._codebook.codes != before).any(-1).all()
    vq.eval()
    quantized, indices, _ = vq(x)
    close(quantized, vq._codebook.codes[0][indices].detach())


def test_the_tokens_are_those_of_a_vision_transformer():
    """Each block is torch's pre-norm encoder layer with the same weights."""
    torch.manual_seed(0)
    bridge = VQBridge(3, 20, patch=5, width=8, depth=1, heads=2).double()
    with torch.no_grad():
        bridge.recover.weight.normal_()
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True).double()
    block = bridge.blocks[0]
    pairs = (
        (layer.self_attn.in_proj_weight, block.project_in.weight),
        (layer.self_attn.in_proj_bias, block.project_in.bias),
        (layer.self_attn.out_proj.weight, block.project_out.weight),
        (layer.self_attn.out_proj.bias, block.project_out.bias),
        (layer.linear1.weight, block.mlp[0].weight),
        (layer.linear1.bias, block.mlp[0].bias),
        (layer.linear2.weight, block.mlp[2].weight),
        (layer.linear2.bias, block.mlp[2].bias),
    )
    with torch.no_grad():
        for theirs, own in pairs:
            theirs.copy_(own)
    codes = torch.randn(2, 20, 3, dtype=torch.float64, generator=generator())
    tokens = torch.stack([codes[:, 5 * i : 5 * i + 5].reshape(2, 15) for i in range(4)], 1)
    expected = bridge.recover(bridge.norm(layer(bridge.compress(tokens) + bridge.positions)))
    close(bridge(codes).detach(), (codes + expected.reshape(2, 20, 3)).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patch": 5}, "patch: must divide codebook_size=32"), ({"width": 10}, "heads: must divide width=10"),
     ({"depth": 0}, "depth: must be an integer")],
)  # fmt: skip
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        VQBridge(6, 32, **options)
    with pytest.raises(ValueError, match=r"^codes: must have shape \(H, 32, 6\)"):
        VQBridge(6, 32)(torch.zeros(1, 16, 6))
