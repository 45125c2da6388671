"""The prior: which codes follow which. Learned once the VQ-VAE is trained; it samples new grids of codes and says how
many bits a grid is worth."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INPUT_SIZE, _HEAD_SIZE = 0.5, 0.05  # of weights that start from the codes' vectors
_Cache = tuple[Tensor, Tensor]  # keys and values (B, heads, places so far, D) of a block


class TransformerPrior(nn.Module):
    """A decoder-only transformer over grids of codes in raster order, with or without classes.

        p(codes | label) = prod_i p(code_i | code_0 ... code_{i-1}, label)

    Each place is given the code before it and, in grids of two or three axes, the ones above it and above to the
    right; its position, as a sum of one learned vector for each axis; and the label. Attention could find the
    neighbours by itself, but takes longer to learn it. Blocks are pre-normalised: causal attention, then a perceptron
    four times as wide.

    Args:
        codebook_size: K.
        grid: shape of one sample's codes: (T,), (H, W) or (T, H, W).
        dim: width. depth: blocks. heads: of each attention; they divide dim.
        classes: how many labels there are; 0 for none.
        dropout: in training, of what each attention and perceptron adds.
        vectors: (K, D), what the codes stand for: where they are given, similar codes start alike, at the input and in
            the logits, and less has to be learned. Without them an untrained prior is uniform.
        label_dropout: in training, the share of samples whose label is left out, so that guidance has a model without.

    Shapes: codes (B, *grid) int64 in [0, K); labels (B,) int64 in [0, classes), or None for none.

    Raises:
        ValueError: an argument that can't be, by name; codes or labels that don't fit.

    Source: van den Oord et al. 2017, section 3.3 (a learned prior in place of the uniform one); Vaswani et al.,
    Attention Is All You Need, 2017; Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, equation 6 (guidance).
    """

    def __init__(
        self,
        codebook_size: int,
        grid: tuple[int, ...],
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        if codebook_size < 1:
            raise ValueError(f"codebook_size: must be at least 1, got {codebook_size}")
        if not grid or min(grid) < 1:
            raise ValueError(f"grid: must be one or more lengths of at least 1, got {grid}")
        if dim % heads:
            raise ValueError(f"heads: must divide dim={dim}, got {heads}")
        for name, share in (("dropout", dropout), ("label_dropout", label_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {share}")
        self.codebook_size, self.grid, self.classes = codebook_size, tuple(grid), classes
        self.places = math.prod(grid)
        self.label_dropout = label_dropout
        # How far back a place looks for a code that it is given, with the vectors of these codes.
        self.offsets = (1, *(o for o in (grid[-1], grid[-1] - 1) if len(grid) > 1 and 0 < o < self.places))
        self.codes = nn.ModuleList([nn.Embedding(codebook_size, dim) for _ in self.offsets])
        self.start = nn.Parameter(torch.zeros(dim))
        self.labels = nn.Embedding(classes + 1, dim)  # the last one stands for "no label"
        self.axes = nn.ModuleList([nn.Embedding(length, dim) for length in grid])
        self.blocks = nn.ModuleList([_Block(dim, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, codebook_size)
        for embedding in (*self.codes, self.labels, *self.axes):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if vectors is not None:
            self._start_from(vectors)

    @torch.no_grad()
    def _start_from(self, vectors: Tensor) -> None:
        if vectors.dim() != 2 or len(vectors) != self.codebook_size:
            raise ValueError(f"vectors: must have shape ({self.codebook_size}, D), got {tuple(vectors.shape)}")
        centred = vectors.detach().float().cpu() - vectors.detach().float().cpu().mean(0)
        centred = centred / centred.square().mean().sqrt().clamp_min(1e-12)
        tables: list[tuple[Any, float]] = [(embedding.weight, _INPUT_SIZE) for embedding in self.codes]
        for weight, size in [*tables, (self.head.weight, _HEAD_SIZE)]:
            directions = torch.randn(centred.shape[1], weight.shape[1]) / math.sqrt(centred.shape[1])
            weight.copy_(size * centred @ directions)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, places, K): at place i those of code i, given the codes before it."""
        flat = self._checked(codes)
        x = F.pad(self.start[None], (0, 0, 0, self.places - 1)) + self._positions()
        for offset, vectors in zip(self.offsets, self.codes, strict=True):
            x = x + F.pad(vectors(flat[:, : self.places - offset]), (0, 0, offset, 0))
        x = x + self._label_vectors(labels, len(flat), flat.device)[:, None]
        for block in self.blocks:
            x, _ = block(x, None)
        return self.head(self.norm(x))

    def loss(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of a code, in nats, ()."""
        logits = self(codes, labels)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    @torch.no_grad()
    def bits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log2 p(codes | label) of each sample, (B,) float64: what an ideal coder needs for it. Call it in eval mode.

        Under the uniform prior that the VQ-VAE is trained with it is (places) log2 K.
        """
        logits = self(codes, labels).double()
        chosen = codes.flatten(1)[..., None]
        return -logits.log_softmax(-1).gather(-1, chosen).squeeze(-1).sum(1) / math.log(2)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        given: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """New codes (count, *grid), one place after the other; attention keeps what it has computed.

        Args:
            count: how many samples.
            labels: (count,), or None.
            temperature: divides the logits; 0 takes the likeliest code.
            top_k: draw among the k likeliest codes.
            top_p: draw among the fewest codes that have this probability together.
            guidance: g in  logits = g logits(label) + (1 - g) logits(no label);  1 is the model itself.
            given: (count, *grid), codes to keep, -1 where one is to be drawn: an image's upper half, for example.
                Places are drawn in raster order, from the codes before them alone.
            generator: for the draws, on the device of the model.

        Raises:
            ValueError: an argument that can't be, by name.
        """
        self._check_sampling(count, temperature, top_k, top_p, guidance, labels, given)
        device = self.start.device
        labels_twice = self._label_vectors(labels, count, device)
        guided = guidance != 1.0
        if guided:
            labels_twice = torch.cat([labels_twice, self._label_vectors(None, count, device)])
        kept = None if given is None else given.flatten(1).to(device)
        positions = self._positions()
        caches: list[_Cache | None] = [None for _ in self.blocks]
        drawn: list[Tensor] = []
        x = self.start.expand(count, -1)
        for place in range(self.places):
            hidden = ((torch.cat([x, x]) if guided else x) + positions[place] + labels_twice)[:, None]
            for i, block in enumerate(self.blocks):
                hidden, caches[i] = block(hidden, caches[i])
            logits = self.head(self.norm(hidden[:, 0])).float()
            if guided:
                logits = guidance * logits[:count] + (1 - guidance) * logits[count:]
            code = _draw(logits, temperature, top_k, top_p, generator)
            if kept is not None:
                code = torch.where(kept[:, place] >= 0, kept[:, place], code)
            drawn.append(code)
            known = zip(self.offsets, self.codes, strict=True)
            x = sum((vectors(drawn[-offset]) for offset, vectors in known if offset <= len(drawn)), torch.zeros(()))
        return torch.stack(drawn, 1).unflatten(1, self.grid)

    def _positions(self) -> Tensor:
        """(places, dim)."""
        device = self.start.device
        total: Tensor | None = None
        for axis, embedding in enumerate(self.axes):
            shape = [1] * len(self.grid)
            shape[axis] = self.grid[axis]
            vectors = embedding(torch.arange(self.grid[axis], device=device)).reshape(*shape, -1)
            total = vectors if total is None else total + vectors
        assert total is not None
        return total.expand(*self.grid, -1).flatten(0, -2)

    def _label_vectors(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        """(count, dim)."""
        none = torch.full((count,), self.classes, device=device)
        if labels is None:
            return self.labels(none)
        if self.classes == 0:
            raise ValueError("labels: this prior was made without classes")
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(f"labels: must be int64 of shape ({count},), got {labels.dtype} {tuple(labels.shape)}")
        if self.training and self.label_dropout:
            labels = torch.where(torch.rand(count, device=device) < self.label_dropout, none, labels)
        return self.labels(labels)

    def _checked(self, codes: Tensor) -> Tensor:
        if codes.shape[1:] != self.grid or codes.dtype != torch.int64:
            raise ValueError(
                f"codes: must be int64 of shape (B, {', '.join(map(str, self.grid))}), got {codes.dtype}"
                f" {tuple(codes.shape)}"
            )
        # Elsewhere than on the CPU the device asserts when it looks them up: looking here would wait for it.
        if codes.device.type == "cpu" and codes.numel() and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise ValueError(
                f"codes: must lie in [0, {self.codebook_size}), got {int(codes.min())} to {int(codes.max())}"
            )
        return codes.flatten(1)

    def _check_sampling(
        self,
        count: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guidance: float,
        labels: Tensor | None,
        given: Tensor | None,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: must be at least 1, got {count}")
        if not temperature >= 0:
            raise ValueError(f"temperature: must not be negative, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: must lie in (0, 1], got {top_p}")
        if guidance != 1.0 and labels is None:
            raise ValueError(f"guidance: of {guidance} needs labels to guide by")
        if given is not None and (given.shape != (count, *self.grid) or given.dtype != torch.int64):
            raise ValueError(
                f"given: must be int64 of shape {(count, *self.grid)}, got {given.dtype} {tuple(given.shape)}"
            )
        if self.training:
            raise ValueError("sample: call eval() first, or dropout disturbs it")


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """A code (B,) from logits (B, K)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # what stands before it has the probability already
        probabilities = probabilities.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: _Cache | None) -> tuple[Tensor, _Cache]:
        """x (B, places, dim) after what the cache holds, and the cache with it. With a cache x is one place."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.mlp_norm(x))), (k, v)
