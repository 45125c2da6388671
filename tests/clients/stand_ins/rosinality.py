"""Interface of rosinality's VQ-VAE-2."""

import types

import torch
from torch import nn

from . import squared

dist_fn = types.SimpleNamespace(all_reduce=lambda tensor: tensor)


class Quantize(nn.Module):
    def __init__(self, dim, n_embed, decay=0.99, eps=1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input):
        rows = input.reshape(-1, self.dim)
        indices = squared(rows, self.embed.T).argmin(1)
        codes = self.embed_code(indices.view(input.shape[:-1]))
        if self.training:
            one_hot = nn.functional.one_hot(indices, self.n_embed).to(rows.dtype)
            counts, sums = one_hot.sum(0), rows.detach().T @ one_hot
            dist_fn.all_reduce(counts)
            dist_fn.all_reduce(sums)
            self.cluster_size.data.copy_(self.decay * self.cluster_size + (1 - self.decay) * counts)
            self.embed_avg.data.copy_(self.decay * self.embed_avg + (1 - self.decay) * sums)
            n = self.cluster_size.sum()
            self.embed.data.copy_(self.embed_avg / ((self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n))
        return (
            input + (codes - input).detach(),
            nn.functional.mse_loss(input, codes.detach()),
            indices.view(codes.shape[:-1]),
        )

    def embed_code(self, embed_id):
        return nn.functional.embedding(embed_id, self.embed.T)
