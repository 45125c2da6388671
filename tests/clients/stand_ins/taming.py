"""Interface of taming-transformers."""

import torch
from torch import nn

from . import squared


def table(n_e: int, e_dim: int) -> nn.Embedding:
    embedding = nn.Embedding(n_e, e_dim)
    nn.init.uniform_(embedding.weight, -1 / n_e, 1 / n_e)
    return embedding


class VectorQuantizer(nn.Module):
    def __init__(self, n_e, e_dim, beta):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = table(n_e, e_dim)

    def forward(self, z):
        rows = z.movedim(1, -1).reshape(-1, self.e_dim)
        indices = squared(rows, self.embedding.weight).argmin(1)
        one_hot = nn.functional.one_hot(indices, self.n_e).to(z.dtype)
        codes = (one_hot @ self.embedding.weight).view(z.movedim(1, -1).shape).movedim(-1, 1)
        loss = nn.functional.mse_loss(z, codes.detach()) + self.beta * nn.functional.mse_loss(codes, z.detach())
        share = one_hot.mean(0)
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        return z + (codes - z).detach(), loss, (perplexity, one_hot, indices[:, None])


class VectorQuantizer2(nn.Module):
    def __init__(self, n_e, e_dim, beta, remap=None, sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.remap, self.sane_index_shape, self.legacy = remap, sane_index_shape, legacy
        self.embedding = table(n_e, e_dim)
        if remap is not None:
            self.register_buffer("used", torch.tensor(remap))

    def remap_to_used(self, inds):
        """Return the place of each index among those in use, 0 where it is not one of them."""
        return (inds[..., None] == self.used).long().argmax(-1)

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        assert temp in (None, 1.0)
        assert (rescale_logits, return_logits) == (False, False)
        rows = z.movedim(1, -1).reshape(-1, self.e_dim)
        indices = squared(rows, self.embedding.weight).argmin(1)
        codes = self.embedding(indices).view(z.movedim(1, -1).shape).movedim(-1, 1)
        commitment = nn.functional.mse_loss(z, codes.detach())
        learning = nn.functional.mse_loss(codes, z.detach())
        loss = commitment + self.beta * learning if self.legacy else self.beta * commitment + learning
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(len(z), *z.shape[2:])
        return z + (codes - z).detach(), loss, (None, None, indices)
