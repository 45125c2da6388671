"""Codebooks of vector_quantize_pytorch: its search and its statistics, within its own layers.

Importing the layers from fastvq instead replaces them whole, with the differences that docs/migration.md lists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Call, ClientAdapter, client_globals, is_accelerated, near, noise
from .nearest import nearest, statistics

PEER = "vector_quantize_pytorch 1.32.0"


_BRIEF = "_fastvq_brief"
"""Attribute of a codebook during a call whose caller reads no distances."""


class _Layer(nn.Module):
    """Tells the codebook where no distances are needed: they are read by few losses, and by nobody in eval."""

    _codebook: Any

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        arguments = (
            *(x, indices, mask, lens, topk, sample_codebook_temp, freeze_codebook, return_loss_breakdown),
            *(codebook_transform_fn, ema_update_weight, accum_ema_update, ema_update),
        )
        if indices is not None or (self.training and _reads_distances(self)):
            return super().forward(*arguments)
        self._codebook.__dict__[_BRIEF] = True
        try:
            return super().forward(*arguments)
        finally:
            self._codebook.__dict__.pop(_BRIEF, None)


class _Codebook(nn.Module):
    """Returns None in place of the distances (N, K) where `_Layer` says that nobody reads them."""

    embed: Tensor
    codebook_size: int
    all_reduce_fn: Any
    init_embed_: Any
    update_codebook: Any

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> Any:
        options = (mask, freeze_codebook, codebook_transform_fn, ema_update_weight, accum_ema_update, ema_update)
        if _BRIEF not in self.__dict__ or codebook_transform_fn is not None or topk is not None or _samples(self):
            return super().forward(x, sample_codebook_temp, *options, topk, update_usage)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.float() if x.dim() == 4 else x.float()[None]
            flat = rows.flatten(1, -2)
            if mask is not None:
                mask = mask[:, None].expand(-1, flat.shape[1] // mask.numel(), -1).reshape(1, -1).expand(len(flat), -1)
            self.init_embed_(flat, mask=mask)
            codes = self.embed if self.learnable_codebook else self.embed.detach()
            found = nearest(flat, codes, metric="dot" if self.use_cosine_sim else "l2")
            quantized = torch.stack([F.embedding(own, e) for own, e in zip(found, codes.float(), strict=True)])
            if self.training and update_usage and not freeze_codebook:
                self.update_codebook(
                    flat,
                    found,
                    mask=mask,
                    ema_update_weight=ema_update_weight,
                    accum_ema_update=accum_ema_update,
                    ema_update=self.ema_update if ema_update is None else ema_update,
                )
            quantized, indices = quantized.view(rows.shape), found.view(rows.shape[:-1])
            return (quantized, indices, None) if x.dim() == 4 else (quantized[0], indices[0], None)

    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
    ) -> None:
        """Take indices (H, N) as well as the one-hot matrix (H, N, K)."""
        if embed_onehot.is_floating_point():
            super().track_cluster_size_and_embed_avg(  # type: ignore[misc]
                flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
            )
            return
        indices = embed_onehot if mask is None else embed_onehot.masked_fill(~mask, -1)
        heads = [statistics(*pair, self.codebook_size) for pair in zip(flatten.detach(), indices, strict=True)]
        counts, sums = (torch.stack(parts) for parts in zip(*heads, strict=True))
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, counts)
        names = client_globals(self, "track_cluster_size_and_embed_avg")
        for name, value in (("cluster_size", counts), ("embed_avg", sums)):
            if accum_ema_update:
                names["accum_grad_"](getattr(self, name), value)
            else:
                names["ema_inplace"](getattr(self, name), value, self.decay, ema_update_weight)


def _samples(codebook: Any) -> bool:
    """Return whether codes are drawn, or chosen with the gradient of Gumbel sampling."""
    settings = getattr(codebook.gumbel_sample, "keywords", None)
    return codebook.training and (settings is None or settings["stochastic"] or settings["straight_through"])


def _reads_distances(layer: Any) -> bool:
    return layer.has_codebook_diversity_loss or (layer.has_commitment_loss and layer.commitment_use_cross_entropy_loss)


def _trial(module: Any) -> list[Call]:
    module._codebook.initted.fill_(True)
    axes = 1 + module.accept_image_fmap + 2 * module.accept_3d_fmap
    channels_last = axes == 1 and module.channel_last
    x = noise(module, 2, 8, module.dim) if channels_last else noise(module, 2, module.dim, *[2] * axes)
    return [Call("forward", x), Call("forward", x, training=True)]


def _codebook_trial(module: Any) -> list[Call]:
    module.initted.fill_(True)
    rows = torch.stack([near(codes) for codes in module.embed])
    return [Call("forward", rows[:, None]), Call("forward", rows[:, None], training=True)]


def _refuse_codebook(module: Any) -> str:
    if module.affine_param:
        return "affine_param: its moving statistics are the client's own"
    return "vq_bridge: its codes are made anew at each step" if module.vq_bridge is not None else ""


def _refuse_layer(module: Any) -> str:
    return "" if is_accelerated(module._codebook) else "its codebook stays the client's"


ADAPTERS = (
    ClientAdapter(
        PEER,
        ("Codebook",),
        ("embed", "embed_avg", "cluster_size", "initted", "gumbel_sample", "affine_param", "vq_bridge"),
        _Codebook,
        _codebook_trial,
        _refuse_codebook,
    ),
    ClientAdapter(
        PEER,
        ("VectorQuantize",),
        ("_codebook", "has_codebook_diversity_loss", "has_commitment_loss", "commitment_use_cross_entropy_loss"),
        _Layer,
        _trial,
        _refuse_layer,
    ),
)
