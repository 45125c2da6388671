"""Interface of WavTokenizer, and of other projects that took EnCodec's code."""

import torch
from torch import nn
from torch.nn import functional as F

from . import squared


class EuclideanCodebook(nn.Module):
    def __init__(self, dim, codebook_size, decay=0.9, epsilon=1e-5, threshold_ema_dead_code=2):
        super().__init__()
        self.codebook_size, self.decay, self.epsilon = codebook_size, decay, epsilon
        self.threshold_ema_dead_code = threshold_ema_dead_code
        embed = torch.randn(codebook_size, dim)
        self.register_buffer("inited", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def init_embed_(self, data):
        assert self.inited

    def expire_codes_(self, batch_samples):
        dead = self.cluster_size < self.threshold_ema_dead_code
        drawn = batch_samples[torch.randint(len(batch_samples), (self.codebook_size,))]
        self.embed.data.copy_(torch.where(dead[:, None], drawn, self.embed))

    def preprocess(self, x):
        return x.flatten(0, -2)

    def postprocess_emb(self, embed_ind, shape):
        return embed_ind.view(shape[:-1])

    def quantize(self, x):
        return squared(x, self.embed).argmin(-1)

    def dequantize(self, embed_ind):
        return F.embedding(embed_ind, self.embed)

    def encode(self, x):
        return self.postprocess_emb(self.quantize(self.preprocess(x)), x.shape)

    def forward(self, x):
        rows = self.preprocess(x)
        self.init_embed_(rows)
        found = self.quantize(rows)
        indices = self.postprocess_emb(found, x.shape)
        codes = self.dequantize(indices)
        if self.training:
            self.expire_codes_(rows)
            one_hot = F.one_hot(found, self.codebook_size).to(rows.dtype)
            self.cluster_size.data.lerp_(one_hot.sum(0), 1 - self.decay)
            self.embed_avg.data.lerp_(one_hot.T @ rows.detach(), 1 - self.decay)
            n = self.cluster_size.sum()
            sizes = (self.cluster_size + self.epsilon) / (n + self.codebook_size * self.epsilon) * n
            self.embed.data.copy_(self.embed_avg / sizes[:, None])
        return codes, indices


class VectorQuantization(nn.Module):
    def __init__(self, dim, codebook_size):
        super().__init__()
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        self._codebook = EuclideanCodebook(dim, codebook_size)

    def encode(self, x):
        return self._codebook.encode(self.project_in(x.movedim(1, -1)))

    def decode(self, embed_ind):
        return self.project_out(self._codebook.dequantize(embed_ind)).movedim(-1, 1)

    def forward(self, x):
        rows = x.movedim(1, -1)
        codes, indices = self._codebook(rows)
        if self.training:
            codes = rows + (codes - rows).detach()
        return codes.movedim(-1, 1), indices, F.mse_loss(rows, codes.detach())


class ResidualVectorQuantization(nn.Module):
    def __init__(self, *, num_quantizers, **settings):
        super().__init__()
        self.layers = nn.ModuleList([VectorQuantization(**settings) for _ in range(num_quantizers)])

    def forward(self, x, n_q=None):
        total, indices, losses = 0.0, [], []
        for layer in self.layers[: n_q or len(self.layers)]:
            codes, found, loss = layer(x - total)
            total = total + codes.detach()
            indices.append(found)
            losses.append(loss)
        return x + (total - x).detach(), torch.stack(indices), torch.stack(losses)

    def encode(self, x, n_q=None):
        indices = []
        for layer in self.layers[: n_q or len(self.layers)]:
            indices.append(layer.encode(x))
            x = x - layer.decode(indices[-1])
        return torch.stack(indices)
