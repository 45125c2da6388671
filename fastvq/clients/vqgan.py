"""Quantizers of image tokenizers with a learned table: taming-transformers, diffusers, LlamaGen, and transformers'."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.functional.soft_assign import soft_assign

from .adapter import Call, ClientAdapter, near
from .nearest import nearest

TAMING = "taming-transformers 049bd91"
DIFFUSERS = "diffusers 0.42.1"
LLAMAGEN = "LlamaGen 3786e6a"
TRANSFORMERS = "transformers 5.24.0"


class _Remapping(nn.Module):
    """VectorQuantizer2 of taming-transformers."""

    def forward(self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False) -> Any:
        if not (temp in (None, 1.0) and rescale_logits is False and return_logits is False):
            return super().forward(z, temp, rescale_logits, return_logits)
        return _quantize_and_remap(self, z)


class _Diffusers(nn.Module):
    def forward(self, z: Tensor) -> Any:
        return _quantize_and_remap(self, z)


def _quantize_and_remap(module: Any, z: Tensor) -> Any:
    quantized, loss, indices = _quantize(module, z, *((1.0, module.beta) if module.legacy else (module.beta, 1.0)))
    if module.remap is not None:
        indices = module.remap_to_used(indices.reshape(len(z), -1)).reshape(-1, 1)
    if module.sane_index_shape:
        indices = indices.reshape(len(z), *z.shape[2:])
    return quantized, loss, (None, None, indices)


class _OneHot(nn.Module):
    """VectorQuantizer of taming-transformers, which returns the one-hot matrix."""

    beta: float
    n_e: int
    embedding: nn.Embedding

    def forward(self, z: Tensor) -> Any:
        quantized, loss, found = _quantize(self, z, 1.0, self.beta)
        one_hot = F.one_hot(found, self.n_e).to(z)
        mean = one_hot.mean(0)
        perplexity = torch.exp(-(mean * torch.log(mean + 1e-10)).sum())
        return quantized, loss, (perplexity, one_hot, found[:, None])


class _Transformers(nn.Module):
    """The quantizer of Janus and Chameleon."""

    beta: float
    embedding: nn.Embedding

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _quantize(self, hidden_state, 1.0, self.beta)


class _Emu3(nn.Module):
    embedding: nn.Embedding

    def forward(self, hidden_state: Tensor) -> Tensor:
        rows = hidden_state.movedim(2, -1)
        return nearest(rows.reshape(-1, rows.shape[-1]), self.embedding.weight).view(rows.shape[:-1])


def _quantize(module: Any, z: Tensor, commitment: float, codebook: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes (B, C, H, W) with a straight-through gradient, the loss, and the indices (B H W)."""
    rows = z.permute(0, 2, 3, 1).contiguous()
    indices = nearest(rows.view(-1, rows.shape[-1]), module.embedding.weight)
    codes = module.embedding(indices).view(rows.shape)
    loss = commitment * (codes.detach() - rows).square().mean() + codebook * (codes - rows.detach()).square().mean()
    codes = rows + (codes - rows).detach()
    return codes.permute(0, 3, 1, 2).contiguous(), loss, indices


class _LlamaGen(nn.Module):
    n_e: int
    e_dim: int
    beta: float
    entropy_loss_ratio: float
    l2_norm: bool
    show_usage: bool
    embedding: nn.Embedding
    codebook_used: Tensor

    def forward(self, z: Tensor) -> Any:
        rows, codes = z.permute(0, 2, 3, 1), self.embedding.weight
        if self.l2_norm:
            rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
        flat = rows.reshape(-1, self.e_dim)
        indices = nearest(flat, codes)
        chosen = F.embedding(indices, codes).view(rows.shape)
        usage: float = 0
        if self.show_usage and self.training:
            number = len(indices)
            self.codebook_used[:-number] = self.codebook_used[number:].clone()
            self.codebook_used[-number:] = indices
            usage = len(torch.unique(self.codebook_used)) / self.n_e
        losses: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if self.training:
            entropy = _entropy_loss(flat, codes) if self.entropy_loss_ratio else flat.new_zeros(())
            losses = (
                (chosen - rows.detach()).square().mean(),
                self.beta * (chosen.detach() - rows).square().mean(),
                self.entropy_loss_ratio * entropy,
            )
        quantized = rows + (chosen - rows).detach()
        return quantized.permute(0, 3, 1, 2), (*losses, usage), (None, None, indices)


def _entropy_loss(rows: Tensor, codes: Tensor) -> Tensor:
    """Return LlamaGen's entropy loss without the softmax over all codes.

    It is that of this process's vectors; `fastvq.parts.entropy_loss` takes the mean over all ranks.
    """
    assignment = soft_assign(rows, codes, metric="l2", scale=100.0)
    return assignment.entropy.mean() + (assignment.mean * torch.log(assignment.mean + 1e-5)).sum()


def _image_trial(module: Any) -> list[Call]:
    x = near(module.embedding.weight, 18).view(2, 3, 3, -1).permute(0, 3, 1, 2)
    return [Call("forward", x), Call("forward", x, training=True)]


def _video_trial(module: Any) -> list[Call]:
    return [Call("forward", near(module.embedding.weight, 18).view(1, 2, 3, 3, -1).permute(0, 1, 4, 2, 3))]


def _refuse_unknown_beta(module: Any) -> str:
    return "" if isinstance(module.beta, (int, float)) else f"beta is a {type(module.beta).__name__}, no number"


ADAPTERS = (
    ClientAdapter(
        TAMING,
        ("VectorQuantizer2", "VectorQuantizer"),
        ("embedding", "beta", "legacy", "remap", "sane_index_shape"),
        _Remapping,
        _image_trial,
    ),
    ClientAdapter(
        DIFFUSERS,
        ("VectorQuantizer",),
        ("embedding", "beta", "legacy", "remap", "sane_index_shape"),
        _Diffusers,
        _image_trial,
    ),
    ClientAdapter(TAMING, ("VectorQuantizer",), ("embedding", "beta", "n_e", "e_dim"), _OneHot, _image_trial),
    ClientAdapter(
        LLAMAGEN,
        ("VectorQuantizer",),
        ("embedding", "beta", "n_e", "e_dim", "entropy_loss_ratio", "l2_norm", "show_usage"),
        _LlamaGen,
        _image_trial,
    ),
    ClientAdapter(
        TRANSFORMERS,
        ("JanusVQVAEVectorQuantizer", "ChameleonVQVAEVectorQuantizer"),
        ("embedding", "beta"),
        _Transformers,
        _image_trial,
    ),
    ClientAdapter(TRANSFORMERS, ("Emu3VQVAEVectorQuantizer",), ("embedding",), _Emu3, _video_trial),
)
