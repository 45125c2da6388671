"""Factorized quantizers: DAC's own and that of transformers, and SNAC.

Each stage projects the residual to a few dimensions, compares unit vectors there, and projects the code back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Call, ClientAdapter, is_accelerated, near, noise
from .nearest import nearest

TRANSFORMERS = "transformers 5.24.0"
DESCRIPT = "descript-audio-codec 1.0.0"

_OFFLOADED = "_hf_hook"
"""Attribute of modules whose weights the package accelerate moves to the device when they are called."""


class _CosineStage(nn.Module):
    codebook: nn.Embedding

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return _decode_latents(self.codebook, latents)


class _TransformersCosineStage(nn.Module):
    codebook: nn.Embedding

    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if _OFFLOADED in vars(self.codebook):  # the client's method fetches the weight
            result: tuple[Tensor, Tensor] = super().decode_latents(hidden_states)  # type: ignore[misc]
            return result
        return _decode_latents(self.codebook, hidden_states)


def _decode_latents(codebook: nn.Embedding, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (B, D, T) of the nearest directions, and their indices (B, T)."""
    indices = _nearest_direction(latents, codebook.weight)
    return codebook(indices).transpose(1, 2), indices


def _nearest_direction(latents: Tensor, codes: Tensor) -> Tensor:
    batch, dim, length = latents.shape
    rows = F.normalize(latents.detach().transpose(1, 2).reshape(batch * length, dim))
    return nearest(rows, F.normalize(codes.detach())).view(batch, length)


class _Stages(nn.Module):
    quantizers: Any

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, ...]:
        found = None if self.training else _all_stages(self.quantizers, z, n_quantizers)
        if found is None:
            result: tuple[Tensor, ...] = super().forward(z, n_quantizers)
            return result
        loss = found.loss()
        return found.quantized, torch.stack(found.indices, 1), found.latents, loss, loss.clone()


class _NamedStages(nn.Module):
    """The same with a dictionary of results, as in the repository after version 1.0.0."""

    quantizers: Any

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> dict[str, Tensor]:
        found = None if self.training else _all_stages(self.quantizers, z, n_quantizers)
        if found is None:
            result: dict[str, Tensor] = super().forward(z, n_quantizers)
            return result
        loss = found.loss()
        return {
            "z": found.quantized,
            "codes": torch.stack(found.indices, 1),
            "latents": found.latents,
            "vq/commitment_loss": loss,
            "vq/codebook_loss": loss.clone(),
        }


class _TransformersStages(nn.Module):
    quantizers: Any

    def forward(self, hidden_state: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, ...]:
        found = None if self.training else _all_stages(self.quantizers, hidden_state, n_quantizers)
        if found is None:
            result: tuple[Tensor, ...] = super().forward(hidden_state, n_quantizers)
            return result
        loss = found.loss().expand(len(hidden_state)).clone()  # the client repeats it for each item of the batch
        return found.quantized, torch.stack(found.indices, 1), found.latents, loss, loss.clone()


class _Found(NamedTuple):
    """The results of all stages for vectors (B, C, T)."""

    quantized: Tensor  # (B, C, T)
    indices: list[Tensor]  # (B, T) each
    latents: Tensor  # (B, sum of D, T), what each stage compares with its codes
    codes: Tensor  # (B, sum of D, T)
    dims: list[int]  # D of each stage

    def loss(self) -> Tensor:
        """Return the sum over the stages of the mean squared error, which is the value of both losses."""
        pairs = zip(self.latents.split(self.dims, 1), self.codes.split(self.dims, 1), strict=True)
        return torch.stack([F.mse_loss(latents, codes) for latents, codes in pairs]).sum()


def _all_stages(stages: Any, x: Tensor, number: int | None) -> _Found | None:
    """Quantize x (B, C, T) by the first stages, all projections of the residuals in one product.

        latents_q = W_q (x - sum_{p<q} (O_p e_p + c_p)) + b_q = (W_q x + b_q) - sum_{p<q} ((W_q O_p) e_p + W_q c_p)

    W_q, b_q project to the codes of stage q, O_q, c_q back. W_q O_p is a matrix of D x D, so that no residual of C
    dimensions is made. Products of weights are made at each call, since weights may be written to unseen.

    Returns:
        the results, or None where the client's loop has to run: with gradients, in half precision, or where a
        projection is more than a convolution of width 1.
    """
    chosen = list(stages)[: len(stages) if number is None else number]
    if not chosen or torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.float64):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    weights = [_weights(stage) for stage in chosen]
    if any(one is None or one[0].dtype != x.dtype for one in weights):
        return None
    w_in, b_in, w_out, b_out = zip(*(one for one in weights if one is not None), strict=True)
    into, back = torch.cat(w_in), torch.cat(w_out, 1)  # (sum of D, C), (C, sum of D)
    taken = (into.double() @ back.double()).to(x.dtype)
    shift = (into.double() @ torch.stack(b_out, 1).double()).to(x.dtype)  # (sum of D, stages)
    latents = into @ x + torch.cat(b_in)[:, None]
    codes, indices, start = torch.empty_like(latents), [], 0
    for place, stage in enumerate(chosen):
        end = start + w_in[place].shape[0]
        indices.append(_nearest_direction(latents[:, start:end], stage.codebook.weight))
        codes[:, start:end] = F.embedding(indices[-1], stage.codebook.weight).transpose(1, 2)
        if end < latents.shape[1]:
            latents[:, end:] -= taken[end:, start:end] @ codes[:, start:end] + shift[end:, place, None]
        start = end
    quantized = back @ codes + torch.stack(b_out).sum(0)[:, None]
    return _Found(quantized, indices, latents, codes, [len(one) for one in w_in])


def _weights(stage: Any) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return W (D, C), b (D,), O (C, D), c (C,) of a stage, or None if a projection is something else."""
    codebook = stage.codebook
    if type(codebook) is not nn.Embedding or codebook._forward_hooks or vars(codebook).keys() & {"forward", _OFFLOADED}:
        return None
    into, back = _matrix(stage.in_proj), _matrix(stage.out_proj)
    return None if into is None or back is None else (*into, *back)


def _matrix(conv: Any) -> tuple[Tensor, Tensor] | None:
    """Return the weight and the bias of a convolution of width 1, or None if its output depends on anything else."""
    if not isinstance(conv, nn.Conv1d) or conv.bias is None or conv._forward_hooks or "forward" in vars(conv):
        return None
    if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1,), (1,), (0,), 1):
        return None
    hooks = [type(hook).__name__ for hook in conv._forward_pre_hooks.values()]
    if hooks == ["WeightNorm"]:  # of torch.nn.utils.weight_norm: the attribute `weight` may be an old one
        v = conv.weight_v
        weight = v * (conv.weight_g / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))
    elif hooks or type(conv).__name__ not in ("Conv1d", "ParametrizedConv1d"):
        return None
    else:
        weight = conv.weight
    return None if weight.is_meta else (weight[..., 0], conv.bias)


def _stage_trial(module: Any) -> list[Call]:
    rows = near(module.codebook.weight)
    return [Call("decode_latents", rows.T[None], training=training) for training in (False, True)]


def _stages_trial(module: Any) -> list[Call]:
    x = noise(module, 2, module.quantizers[0].in_proj.in_channels, 8)
    return [Call("forward", x), Call("forward", x, training=True)]


def _refuse(module: Any) -> str:
    return "" if all(map(is_accelerated, module.quantizers)) else "has stages that are unknown"


ADAPTERS = (
    ClientAdapter(
        TRANSFORMERS,
        ("DacVectorQuantize",),
        ("in_proj", "out_proj", "codebook"),
        _TransformersCosineStage,
        _stage_trial,
    ),
    ClientAdapter(
        f"{DESCRIPT}, snac 1.2.1",
        ("VectorQuantize",),
        ("in_proj", "out_proj", "codebook", "decode_code"),
        _CosineStage,
        _stage_trial,
    ),
    ClientAdapter(
        TRANSFORMERS,
        ("DacResidualVectorQuantizer",),
        ("quantizers", "n_codebooks", "quantizer_dropout"),
        _TransformersStages,
        _stages_trial,
        _refuse,
    ),
    ClientAdapter(
        DESCRIPT,
        ("ResidualVectorQuantize",),
        ("quantizers", "n_codebooks", "quantizer_dropout"),
        _Stages,
        _stages_trial,
        _refuse,
    ),
    ClientAdapter(
        "descript-audio-codec 3e877db",
        ("ResidualVectorQuantize",),
        ("quantizers", "n_codebooks", "quantizer_dropout"),
        _NamedStages,
        _stages_trial,
        _refuse,
    ),
)
