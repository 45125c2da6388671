"""Codebooks and residual stacks in the manner of EnCodec: its own, and those of projects that took its code.

EnCodec, WavTokenizer, SpeechTokenizer, moshi, and in transformers EnCodec, Mimi, X-Codec, WavTokenizer, Higgs Audio.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Call, ClientAdapter, is_accelerated, near, noise
from .nearest import nearest, nearest_while_learning, residual_nearest, statistics

TRANSFORMERS = "transformers 5.24.0"
ENCODEC = "encodec 0.1.1"
MOSHI = "moshi 0.2.13"
SPEECH_TOKENIZER = "speechtokenizer 1.0.1"


class _TransformersCodebook(nn.Module):
    embed: Tensor

    def quantize(self, hidden_states: Tensor) -> Tensor:
        return nearest(hidden_states, self.embed)


class _MimiStages(nn.Module):
    layers: Any
    input_proj: nn.Module | None
    num_quantizers: int

    def encode(self, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:
        if self.input_proj is not None:
            embeddings = self.input_proj(embeddings)
        number = self.num_quantizers if num_quantizers is None else num_quantizers
        return residual_nearest(embeddings, [layer.codebook.embed for layer in self.layers[:number]])


class _EncodecStages(nn.Module):
    layers: Any
    get_num_quantizers_for_bandwidth: Any

    def encode(self, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
        number = self.get_num_quantizers_for_bandwidth(bandwidth)
        return residual_nearest(embeddings, [layer.codebook.embed for layer in self.layers[:number]])


class _XcodecStages(nn.Module):
    quantizers: Any
    get_num_quantizers_for_bandwidth: Any

    def encode(self, embeddings: Tensor, bandwidth: Any = None) -> Tensor:
        number = self.get_num_quantizers_for_bandwidth(bandwidth)
        return residual_nearest(embeddings, [layer.codebook.embed for layer in self.quantizers[:number]])


class _Codebook(nn.Module):
    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    codebook_size: int
    decay: float
    epsilon: float
    preprocess: Any
    init_embed_: Any
    postprocess_emb: Any
    dequantize: Any
    expire_codes_: Any

    def quantize(self, x: Tensor) -> Tensor:
        return nearest(x, self.embed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        rows = self.preprocess(x)
        self.init_embed_(rows)
        found = nearest_while_learning(rows, self.embed) if self.training else self.quantize(rows)
        indices = self.postprocess_emb(found, shape)
        quantized = self.dequantize(indices)
        if self.training:
            self.expire_codes_(rows)
            with torch.no_grad():
                _learn(self, rows.detach(), found)
        return quantized, indices


def _learn(codebook: _Codebook, rows: Tensor, indices: Tensor) -> None:
    """Take the step of EnCodec's moving averages of sizes and sums; the sizes are smoothed."""
    counts, sums = statistics(rows, indices, codebook.codebook_size)
    codebook.cluster_size.data.mul_(codebook.decay).add_(counts.to(codebook.cluster_size), alpha=1 - codebook.decay)
    codebook.embed_avg.data.mul_(codebook.decay).add_(sums.to(codebook.embed_avg), alpha=1 - codebook.decay)
    total = codebook.cluster_size.sum()
    eps = codebook.epsilon
    sizes = (codebook.cluster_size + eps) / (total + codebook.codebook_size * eps) * total
    codebook.embed.data.copy_(codebook.embed_avg / sizes[:, None])


class _Stages(nn.Module):
    layers: Any

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        number = n_q or len(self.layers)
        return residual_nearest(x, [layer._codebook.embed for layer in self.layers[:number]])


class _SpeechTokenizerStages(nn.Module):
    layers: Any

    def encode(self, x: Tensor, n_q: int | None = None, st: int | None = None) -> Tensor:
        number = n_q or len(self.layers)
        return residual_nearest(x, [layer._codebook.embed for layer in self.layers[st or 0 : number]])


class _MoshiCodebook(nn.Module):
    embedding: Tensor

    def _quantize(self, x: Tensor) -> Tensor:
        return nearest(x, self.embedding)


class _MoshiStages(nn.Module):
    layers: Any

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        number = n_q or len(self.layers)
        return residual_nearest(x, [layer._codebook.embedding for layer in self.layers[:number]])


def _encode_trial(module: Any, dim: int) -> list[Call]:
    return [Call("encode", noise(module, 2, dim, 8))]


def _transformers_trial(module: Any) -> list[Call]:
    module._embed = None  # Mimi's cache
    return [Call("quantize", near(module.embed))]


def _mimi_trial(module: Any) -> list[Call]:
    for layer in module.layers:
        layer.codebook._embed = None
    project = module.input_proj
    return _encode_trial(module, module.layers[0].codebook.embed.shape[1] if project is None else project.in_channels)


def _codebook_trial(module: Any) -> list[Call]:
    module.inited.fill_(1)
    rows = near(module.embed)[None]
    return [Call("quantize", rows[0]), Call("forward", rows), Call("forward", rows, training=True)]


def _moshi_trial(module: Any) -> list[Call]:
    module._initialized.fill_(1)
    module.register_buffer("_embedding", None, persistent=False)
    return [Call("_quantize", near(module.embedding))]


def _moshi_stages_trial(module: Any) -> list[Call]:
    for layer in module.layers:
        _moshi_trial(layer._codebook)
    return _encode_trial(module, module.layers[0]._codebook.embedding.shape[1])


def _refuse_stages(layers: Any, codebook: str) -> str:
    """Return why stages cannot be searched in one pass: a stage does more than to look up its codebook."""
    if not len(layers):
        return "has no stages"
    for layer in layers:
        if not is_accelerated(getattr(layer, codebook, None)):
            return "has stages with unknown codebooks"
        projections = [getattr(layer, name, None) for name in ("project_in", "project_out")]
        if any(type(projection) not in (type(None), nn.Identity) for projection in projections):
            return "has stages with projections; their codebooks are accelerated one by one"
    return ""


def _of_layers(module: Any) -> str:
    return _refuse_stages(module.layers, "codebook")


def _of_quantizers(module: Any) -> str:
    return _refuse_stages(module.quantizers, "codebook")


def _of_codebooks(module: Any) -> str:
    return _refuse_stages(module.layers, "_codebook")


ADAPTERS = (
    ClientAdapter(
        TRANSFORMERS,
        (
            *("EncodecEuclideanCodebook", "MimiEuclideanCodebook", "XcodecEuclideanCodebook"),
            *("WavTokenizerEuclideanCodebook", "HiggsAudioV2TokenizerEuclideanCodebook"),
        ),
        ("embed",),
        _TransformersCodebook,
        _transformers_trial,
    ),
    ClientAdapter(
        TRANSFORMERS,
        ("MimiResidualVectorQuantizer",),
        ("layers", "input_proj", "num_quantizers"),
        _MimiStages,
        _mimi_trial,
        _of_layers,
    ),
    ClientAdapter(
        TRANSFORMERS,
        ("EncodecResidualVectorQuantizer",),
        ("layers", "get_num_quantizers_for_bandwidth"),
        _EncodecStages,
        lambda module: _encode_trial(module, module.layers[0].codebook.embed.shape[1]),
        _of_layers,
    ),
    ClientAdapter(
        TRANSFORMERS,
        ("XcodecResidualVectorQuantization",),
        ("quantizers", "get_num_quantizers_for_bandwidth"),
        _XcodecStages,
        lambda module: _encode_trial(module, module.quantizers[0].codebook.embed.shape[1]),
        _of_quantizers,
    ),
    ClientAdapter(
        ENCODEC,
        ("EuclideanCodebook",),
        (
            *("embed", "embed_avg", "cluster_size", "inited", "codebook_size", "decay", "epsilon", "preprocess"),
            *("init_embed_", "postprocess_emb", "dequantize", "expire_codes_"),
        ),
        _Codebook,
        _codebook_trial,
    ),
    ClientAdapter(
        MOSHI,
        ("EuclideanCodebook",),
        ("embedding", "embedding_sum", "cluster_usage", "_initialized"),
        _MoshiCodebook,
        _moshi_trial,
    ),
    ClientAdapter(
        MOSHI,
        ("ResidualVectorQuantization",),
        ("layers", "codebook_offset"),
        _MoshiStages,
        _moshi_stages_trial,
        _of_codebooks,
    ),
    ClientAdapter(
        SPEECH_TOKENIZER,
        ("ResidualVectorQuantization",),
        ("layers",),
        _SpeechTokenizerStages,
        lambda module: _encode_trial(module, module.layers[0]._codebook.embed.shape[1]),
        _of_codebooks,
    ),
    ClientAdapter(
        ENCODEC,
        ("ResidualVectorQuantization",),
        ("layers",),
        _Stages,
        lambda module: _encode_trial(module, module.layers[0]._codebook.embed.shape[1]),
        _of_codebooks,
    ),
)
