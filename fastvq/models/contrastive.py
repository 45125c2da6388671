"""Contrastive model of images and captions."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import END, PAD, TextTokenizer

_LARGEST_SCALE = math.log(100)


class ContrastiveModel(nn.Module):
    """Two encoders that give an image and its caption nearby unit vectors, and other pairs distant ones.

        similarity = <image(x), text(caption)>
        loss = (CE(rows of S) + CE(columns of S)) / 2,  S = exp(s) similarities of all pairs of a batch

    The largest element of a row of S, and of a column, should be the diagonal one. Images pass strided convolutions and
    the mean over all places, captions a transformer and the mean over their indices.

    Args:
        channels: C of the images.
        vocabulary, text_length: see `TextTokenizer`.
        dim: length of the unit vectors. width: channels of the first convolution, of which each next has twice as many.
        text_width, text_depth: width and number of blocks of the transformer. dropout: in its blocks.

    Attributes:
        tokenizer: the tokenizer of captions; None until it is set.
        scale: s, the logarithm of the inverse temperature.
        settings: the constructor's arguments.

    Shapes: images (B, C, H, W) in [0, 1], of any size from 8x8 on; captions (B, text_length) int64.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (CLIP),
    2021, figure 3.
    """

    tokenizer: TextTokenizer | None = None

    def __init__(
        self,
        channels: int,
        *,
        vocabulary: int,
        text_length: int,
        dim: int = 64,
        width: int = 32,
        text_width: int = 96,
        text_depth: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels: must be 1 or 3, got {channels}")
        self.settings = {
            "channels": channels,
            "vocabulary": vocabulary,
            "text_length": text_length,
            "dim": dim,
            "width": width,
            "text_width": text_width,
            "text_depth": text_depth,
            "dropout": dropout,
        }
        layers: list[nn.Module] = []
        widths = [channels, width, 2 * width, 4 * width]
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Conv2d(inner, outer, 4, stride=2, padding=1), nn.BatchNorm2d(outer), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.image_head = nn.Linear(4 * width, dim)
        self.words, self.places = nn.Embedding(vocabulary, text_width), nn.Embedding(text_length, text_width)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        block = nn.TransformerEncoderLayer(
            text_width, 4, 2 * text_width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, text_depth, enable_nested_tensor=False)
        self.text_head = nn.Linear(text_width, dim)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def images(self, x: Tensor) -> Tensor:
        """Return a unit vector for each image, (B, dim)."""
        channels = self.settings["channels"]
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < 8:
            raise ValueError(f"x: must be images (B, {channels}, H, W) of at least 8x8, got {tuple(x.shape)}")
        return F.normalize(self.image_head(self.convolutions(2 * x - 1).mean((2, 3))), dim=-1)

    def texts(self, captions: Tensor) -> Tensor:
        """Return a unit vector for each caption, (B, dim)."""
        length = self.settings["text_length"]
        if captions.dim() != 2 or captions.shape[1] != length or captions.dtype != torch.int64:
            raise ValueError(
                f"captions: must be int64 of shape (B, {length}), got {captions.dtype} {tuple(captions.shape)}"
            )
        blank = captions == PAD
        x = self.blocks(self.words(captions) + self.places.weight, src_key_padding_mask=blank)
        mask = ~(blank | (captions == END))[..., None]
        return F.normalize(self.text_head((x * mask).sum(1) / mask.sum(1)), dim=-1)

    def forward(self, x: Tensor, captions: Tensor) -> Tensor:
        """Return the similarities (B of x, B of captions) of all pairs, in [-1, 1]."""
        return self.images(x) @ self.texts(captions).T

    def loss(self, x: Tensor, captions: Tensor) -> Tensor:
        """Return the loss () of a batch of images and their captions.

        Captions that are equal do not count as wrong for each other's images.
        """
        logits = self(x, captions) * self.scale.clamp(max=_LARGEST_SCALE).exp()
        own = torch.arange(len(x), device=x.device)
        same = (captions[:, None] == captions).all(-1)
        logits = logits.masked_fill(same & (own[:, None] != own), -math.inf)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def retrieval(model: ContrastiveModel, x: Tensor, captions: Tensor, *, among: int = 1) -> float:
    """Return the share of images whose own caption is among the `among` most similar of all.

    By chance it is among / N, for images x (N, C, H, W) with captions (N, text_length).
    """
    if len(x) == 0:
        return 0.0
    nearest = model(x, captions).topk(min(among, len(captions)), 1).indices
    return (captions[nearest] == captions[:, None]).all(-1).any(1).double().mean().item()
