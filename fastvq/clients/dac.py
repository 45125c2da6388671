"""Factorized quantizers: DAC's own and that of transformers, and SNAC.

Each stage projects the residual to a few dimensions, compares unit vectors there, and projects the code back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.parts.factorized import FactorizedStage, factorized_output, factorized_search, nearest_direction

from .adapter import Call, ClientAdapter, is_accelerated, near, noise

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
    indices = nearest_direction(latents, codebook.weight, missing=0)
    return codebook(indices).transpose(1, 2), indices


class _Stages(nn.Module):
    quantizers: Any

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, ...]:
        found = None if self.training else _all_stages(self.quantizers, z, n_quantizers)
        if found is None:
            result: tuple[Tensor, ...] = super().forward(z, n_quantizers)
            return result
        return *found, found.loss.clone()


class _NamedStages(nn.Module):
    """The same with a dictionary of results, as in the repository after version 1.0.0."""

    quantizers: Any

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> dict[str, Tensor]:
        found = None if self.training else _all_stages(self.quantizers, z, n_quantizers)
        if found is None:
            result: dict[str, Tensor] = super().forward(z, n_quantizers)
            return result
        return {
            "z": found.quantized,
            "codes": found.indices,
            "latents": found.latents,
            "vq/commitment_loss": found.loss,
            "vq/codebook_loss": found.loss.clone(),
        }


class _TransformersStages(nn.Module):
    quantizers: Any

    def forward(self, hidden_state: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, ...]:
        found = None if self.training else _all_stages(self.quantizers, hidden_state, n_quantizers)
        if found is None:
            result: tuple[Tensor, ...] = super().forward(hidden_state, n_quantizers)
            return result
        loss = found.loss.expand(len(hidden_state)).clone()  # the client repeats it for each item of the batch
        return *found[:3], loss, loss.clone()


class _Found(NamedTuple):
    """The results of all stages for vectors (B, C, T)."""

    quantized: Tensor  # (B, C, T)
    indices: Tensor  # (B, stages, T)
    latents: Tensor  # (B, sum of D, T)
    loss: Tensor  # (), the value of both losses: the sum over the stages of the mean squared error


def _all_stages(stages: Any, x: Tensor, number: int | None) -> _Found | None:
    """Quantize x (B, C, T) by the first stages, all projections of the residuals in one product.

    Products of weights are made at each call, since weights may be written to unseen.

    Returns:
        the results, or None where the client's loop has to run: with gradients, in half precision, on meta, or where a
        projection is more than a convolution of width 1.
    """
    chosen = [stage for place, stage in enumerate(stages) if number is None or place < number]
    if not chosen or torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.float64):
        return None
    if x.is_meta or torch.is_autocast_enabled(x.device.type):
        return None
    weights = [one for one in map(_weights, chosen) if one is not None]
    if len(weights) < len(chosen) or any(one.into.dtype != x.dtype for one in weights):
        return None
    found = factorized_search(x, weights, missing=0)
    losses = [F.mse_loss(*pair) for pair in zip(found.latents, found.codes, strict=True)]
    return _Found(
        factorized_output(weights, found.indices, found.codes),
        torch.stack(found.indices, 1),
        torch.cat(found.latents, 1),
        torch.stack(losses).sum(),
    )


def _weights(stage: Any) -> FactorizedStage | None:
    """Return the weights of a stage, or None if a projection is something else, or a hook waits for a call."""
    codebook = stage.codebook
    if _is_hooked(stage) or _is_hooked(codebook) or type(codebook) is not nn.Embedding or _OFFLOADED in vars(codebook):
        return None
    into, back = _matrix(stage.in_proj), _matrix(stage.out_proj)
    return None if into is None or back is None else FactorizedStage(*into, *back, codebook.weight)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a call of a module runs hooks, or a forward that was assigned to it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


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
