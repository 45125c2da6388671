"""Interface of RQ-VAE-Recommender."""

import enum
from typing import Any, NamedTuple

import torch
from torch import nn

from . import squared


class QuantizeForwardMode(enum.Enum):
    GUMBEL_SOFTMAX = 1
    STE = 2


class QuantizeOutput(NamedTuple):
    embeddings: Any
    ids: Any


class Quantize(nn.Module):
    def __init__(self, embed_dim, n_embed, forward_mode, do_kmeans_init=False):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.forward_mode, self.do_kmeans_init, self.kmeans_initted = forward_mode, do_kmeans_init, False

    def _kmeans_init(self, x):
        self.embedding.weight.data.copy_(x.detach()[torch.randint(len(x), (len(self.embedding.weight),))])
        self.kmeans_initted = True

    def get_item_embeddings(self, item_ids):
        return self.out_proj(self.embedding(item_ids))

    def forward(self, x, temperature):
        if self.do_kmeans_init and not self.kmeans_initted:
            self._kmeans_init(x)
        codes = self.out_proj(self.embedding.weight)
        distances = squared(x, codes).detach()
        indices = distances.argmin(1)
        if self.training and self.forward_mode == QuantizeForwardMode.GUMBEL_SOFTMAX:
            return QuantizeOutput(nn.functional.gumbel_softmax(-distances, temperature) @ codes, indices)
        found = self.get_item_embeddings(indices)
        return QuantizeOutput(x + (found - x).detach() if self.training else found, indices)
