"""VQBridge: a network through which all codes of a codebook learn from each step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_sizes


class VQBridge(nn.Module):
    """Residual network over a codebook, for the argument vq_bridge of `VectorQuantize`.

        tokens = W_c [e_1 ... e_P], [e_P+1 ... e_2P], ... + positions      compress
        tokens <- tokens + attention(norm(tokens)),  tokens + mlp(norm(tokens)), `depth` times      process
        e' = e + W_r norm(tokens)      recover

    Each code in use depends on all parameters and, by the attention, on all codes, so that each step moves all codes.
    W_r begins small, so that e' is near e; it isn't zero, or codes beside unused ones would stay. After training, the
    codes in use are a constant: set `layer.codebook` of a layer without a bridge to them.

    Args:
        dim: D.
        codebook_size: K, a multiple of patch.
        patch: P, the number of codes that make one token.
        width: dimension of the tokens, a multiple of heads.
        depth, heads: number of blocks, and of attention heads.
        mlp_ratio: width of the hidden layer of the MLPs, in units of width.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Memory is O(K D + K width / P) where torch's attention is fused, as it is on most devices.

    Source: Chang et al., Scalable Training for Vector-Quantized Networks with 100% Codebook Utilization (FVQ), 2025
    (arXiv 2509.10140), compress-process-recover by a ViT. Sizes, the start and the residual are choices of this
    implementation, as the paper's text was not at hand.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        patch: int = 16,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, codebook_size=codebook_size, patch=patch, width=width)
        check_sizes(depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        if codebook_size % patch:
            raise ValueError(f"patch: must divide codebook_size={codebook_size}, got {patch}")
        if width % heads:
            raise ValueError(f"heads: must divide width={width}, got {heads}")
        self.dim, self.codebook_size, self.patch = dim, codebook_size, patch
        self.compress = nn.Linear(patch * dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(codebook_size // patch, width))
        self.blocks = nn.ModuleList([_Block(width, heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.recover = nn.Linear(width, patch * dim)
        nn.init.normal_(self.recover.weight, std=0.01 * dim**-0.5)
        nn.init.zeros_(self.recover.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the codes in use (H, K, D), of codes (H, K, D)."""
        if codes.shape[-2:] != (self.codebook_size, self.dim):
            raise ValueError(f"codes: must have shape (H, {self.codebook_size}, {self.dim}), got {tuple(codes.shape)}")
        tokens = codes.unflatten(-2, (-1, self.patch)).flatten(-2).to(self.positions.dtype)
        tokens = self.compress(tokens) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return codes + self.recover(self.norm(tokens)).view(codes.shape).to(codes.dtype)


class _Block(nn.Module):
    """Block of a vision transformer: attention, then an MLP, both behind a layer norm."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.project_in(self.norm_attention(tokens)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        query, key, value = (part.transpose(-2, -3) for part in heads)
        found = F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2)
        tokens = tokens + self.project_out(found)
        return tokens + self.mlp(self.norm_mlp(tokens))
