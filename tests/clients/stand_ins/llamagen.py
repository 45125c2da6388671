"""Interface of LlamaGen."""

import torch
from torch import nn
from torch.nn import functional as F

from . import squared


class VectorQuantizer(nn.Module):
    def __init__(self, n_e, e_dim, beta, entropy_loss_ratio, l2_norm, show_usage):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.entropy_loss_ratio, self.l2_norm, self.show_usage = entropy_loss_ratio, l2_norm, show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(1000))

    def unit(self, x):
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def forward(self, z):
        x, codes = self.unit(z.movedim(1, -1)), self.unit(self.embedding.weight)
        distances = squared(x.reshape(-1, self.e_dim), codes)
        indices = distances.argmin(1)
        chosen = codes[indices].view(x.shape)
        losses, usage = (None, None, None), 0
        if self.training and self.show_usage:
            self.codebook_used = torch.cat([self.codebook_used, indices])[-len(self.codebook_used) :]
            usage = len(self.codebook_used.unique()) / self.n_e
        if self.training:
            p = (-distances / 0.01).softmax(1)
            mean = p.mean(0)
            rows = -(p * (-distances / 0.01).log_softmax(1)).sum(1).mean()
            losses = (
                F.mse_loss(chosen, x.detach()),
                self.beta * F.mse_loss(x, chosen.detach()),
                self.entropy_loss_ratio * (rows + (mean * (mean + 1e-5).log()).sum()),
            )
        return (x + (chosen - x).detach()).movedim(-1, 1), (*losses, usage), (None, None, indices)
