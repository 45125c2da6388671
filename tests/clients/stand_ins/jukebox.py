"""Interface of Jukebox's bottleneck, for one process."""

import torch
from torch import nn

from . import squared


class BottleneckBlock(nn.Module):
    def __init__(self, k_bins, emb_width, mu):
        super().__init__()
        self.k_bins, self.emb_width, self.mu = k_bins, emb_width, mu
        self.register_buffer("k", torch.randn(k_bins, emb_width))
        self.k_sum, self.k_elem = self.k.clone(), torch.ones(k_bins)

    def quantise(self, x):
        least, indices = squared(x, self.k).min(-1)
        return indices, least.mean()

    def dequantise(self, x_l):
        return nn.functional.embedding(x_l, self.k)

    def forward(self, x, update_k=True):
        rows = x.movedim(1, -1).reshape(-1, self.emb_width)
        indices, fit = self.quantise(rows)
        codes = self.dequantise(indices)
        if update_k:
            one_hot = nn.functional.one_hot(indices, self.k_bins).to(rows.dtype).T
            self.k_sum = self.mu * self.k_sum + (1 - self.mu) * (one_hot @ rows.detach())
            self.k_elem = self.mu * self.k_elem + (1 - self.mu) * one_hot.sum(1)
            self.k = self.k_sum / self.k_elem[:, None]
        loss = nn.functional.mse_loss(rows, codes.detach())
        out = rows + (codes - rows).detach()
        batch, _, length = x.shape
        return indices.view(batch, length), out.view(batch, length, -1).movedim(-1, 1), loss, {"fit": fit}
