"""Interface of LC-Rec's RQ-VAE."""

import torch
from torch import nn
from torch.nn import functional as F

from . import squared


class VectorQuantizer(nn.Module):
    def __init__(self, n_e, e_dim, beta=0.25, sk_epsilon=0.0):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.sk_epsilon, self.initted = n_e, e_dim, beta, sk_epsilon, False
        self.embedding = nn.Embedding(n_e, e_dim)

    def init_emb(self, data):
        self.embedding.weight.data.copy_(data.detach()[torch.randint(len(data), (self.n_e,))])
        self.initted = True

    def forward(self, x, use_sk=True):
        rows = x.view(-1, self.e_dim)
        if self.training and not self.initted:
            self.init_emb(rows)
        distances = squared(rows, self.embedding.weight)
        if use_sk and self.sk_epsilon > 0:
            indices = (-distances / self.sk_epsilon).softmax(0).argmax(1)
        else:
            indices = distances.argmin(1)
        indices = indices.view(x.shape[:-1])
        codes = self.embedding(indices)
        loss = F.mse_loss(codes, x.detach()) + self.beta * F.mse_loss(codes.detach(), x)
        return x + (codes - x).detach(), loss, indices
