"""The clients that are tested: how to make one, and what to call.

Those of packages that are not installed are skipped. To run them all, without what their packages require:

    pip install transformers==5.24.0 diffusers==0.42.1
    pip install --no-deps encodec==0.1.1 speechtokenizer==1.0.1 moshi==0.2.13 snac==1.2.1 descript-audio-codec==1.0.0
    pip install --no-deps vocos==0.1.0

descript-audio-codec also installs a package `tests`, which hides this one from `python -m tests...`: delete it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from . import installed
from .stand_ins import jukebox, lc_rec, llamagen, rosinality, rq_vae, taming, var, wavtokenizer


@dataclass(frozen=True)
class Client:
    """A module of another project.

    Args:
        build: makes the module; skips the test where the package is absent.
        shape: of the input.
        encode: calls the module in eval and returns what it returns.
        train: calls it in training mode; None if the project does not train with it.
        replaced: number of modules that are accelerated.
        fills: whether to fill the codebooks, which are zero until weights are loaded.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    encode: Callable[[Any, Tensor], Any]
    replaced: int
    train: Callable[[Any, Tensor], Any] | None = None
    fills: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """Return the module in eval, always with the same weights."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            module = self.build().eval()
        if self.fills:
            for name, tensor in module.named_buffers():
                if tensor.dim() == 2:
                    stage = int("".join(filter(str.isdigit, name)) or 0)
                    tensor.normal_().mul_(0.7**stage)
        return module

    def input(self, seed: int = 1) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))


def transformers(model: str, kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pytest.importorskip("transformers", reason="transformers isn't installed")
        home = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        owner = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
        return getattr(home, kind)(getattr(owner, config)(**settings))

    return build


def package(name: str, kind: str, *arguments: Any, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(installed.module(name), kind)(*arguments, **settings)


def call(module: Any, x: Tensor) -> Any:
    return module(x)


def encode(module: Any, x: Tensor) -> Any:
    return module.encode(x)


def vocos() -> nn.Module:
    """Return the features that vocos takes from an encodec model, here from a small one with random weights."""
    encodec = installed.module("encodec")
    features = installed.module("vocos.feature_extractors")
    seanet, vq = encodec.modules.SEANetEncoder, encodec.quantization.ResidualVectorQuantizer
    encoder = seanet(dimension=8, n_filters=2, ratios=[2, 2], norm="none", lstm=0)
    quantizer = vq(dimension=8, n_q=3, bins=32)
    for stage, layer in enumerate(quantizer.vq.layers):
        layer._codebook.embed.normal_().mul_(0.7**stage)
    model = encodec.EncodecModel(encoder, nn.Identity(), quantizer, [15.0], 4000, 1)
    with mock.patch.object(features.EncodecModel, "encodec_model_24khz", return_value=model):
        return features.EncodecFeatures(bandwidths=[15.0])


STACK = {"num_quantizers": 3, "dim": 8, "codebook_size": 32, "decay": 0.9, "kmeans_init": True, "kmeans_iters": 2}
MIMI = {"codebook_size": 32, "num_quantizers": 4, "codebook_dim": 8}

CLIENTS = {
    "transformers Mimi": Client(
        transformers(
            *("mimi", "MimiSplitResidualVectorQuantizer", "MimiConfig"),
            **MIMI,
            vector_quantization_hidden_dimension=8,
            hidden_size=16,
        ),
        (2, 16, 20),
        encode,
        6,
        fills=True,
    ),
    "transformers EnCodec": Client(
        transformers(
            *("encodec", "EncodecResidualVectorQuantizer", "EncodecConfig"),
            codebook_size=32,
            codebook_dim=8,
            target_bandwidths=[1.5],
        ),
        (2, 8, 20),
        lambda module, x: (module.encode(x[..., :10]), module.encode(x, 1.5)),
        5,
        fills=True,
    ),
    "transformers X-Codec": Client(
        transformers(
            *("xcodec", "XcodecResidualVectorQuantization", "XcodecConfig"),
            codebook_size=32,
            codebook_dim=8,
            target_bandwidths=[0.5, 1.0],
        ),
        (2, 8, 20),
        encode,
        5,
        fills=True,
    ),
    "transformers DAC": Client(
        transformers(
            *("dac", "DacResidualVectorQuantizer", "DacConfig"),
            codebook_size=32,
            codebook_dim=4,
            n_codebooks=3,
            hidden_size=16,
            quantizer_dropout=0.5,
        ),
        (2, 16, 20),
        lambda module, x: (module(x), module(x, n_quantizers=2)),
        4,
        train=call,
    ),
    "transformers Emu3": Client(
        transformers("emu3", "Emu3VQVAEVectorQuantizer", "Emu3VQVAEConfig", codebook_size=32, embed_dim=4),
        (2, 2, 4, 3, 3),
        call,
        1,
    ),
    "transformers Janus": Client(
        transformers("janus", "JanusVQVAEVectorQuantizer", "JanusVQVAEConfig", num_embeddings=32, embed_dim=4),
        (2, 4, 3, 3),
        call,
        1,
        train=call,
    ),
    "encodec": Client(
        package("encodec.quantization.core_vq", "ResidualVectorQuantization", **STACK),
        (2, 8, 30),
        encode,
        4,
        train=call,
    ),
    "encodec with projections": Client(
        package("encodec.quantization.core_vq", "ResidualVectorQuantization", **STACK, codebook_dim=4),
        (2, 8, 30),
        encode,
        3,
        train=call,
    ),
    "vocos": Client(
        vocos,
        (2, 80),
        lambda module, x: (module(x, bandwidth_id=0), module.get_encodec_codes(x)),
        4,
    ),
    "speechtokenizer": Client(
        package("speechtokenizer.quantization.core_vq", "ResidualVectorQuantization", **STACK),
        (2, 8, 30),
        lambda module, x: (module.encode(x), module.encode(x, n_q=3, st=1)),
        4,
        train=call,
    ),
    "moshi": Client(
        package(
            *("moshi.quantization.core_vq", "ResidualVectorQuantization"),
            num_quantizers=3,
            codebook_offset=0,
            dim=8,
            codebook_size=32,
            decay=0.9,
        ),
        (2, 8, 30),
        encode,
        4,
        train=call,
        fills=True,
    ),
    "snac": Client(
        package("snac.vq", "ResidualVectorQuantize", 16, 32, 4, [4, 2, 1]), (2, 16, 24), call, 3, train=call
    ),
    "descript-audio-codec": Client(
        package("dac.nn.quantize", "ResidualVectorQuantize", 16, 3, 32, 4, 0.5),
        (2, 16, 20),
        lambda module, x: (module(x), module(x, 2), module.from_latents(x[:, :8])),
        4,
        train=call,
    ),
    "diffusers": Client(
        package("diffusers.models.autoencoders.vae", "VectorQuantizer", 32, 4, 0.25, sane_index_shape=True),
        (2, 4, 5, 5),
        call,
        1,
        train=call,
    ),
    "vector_quantize_pytorch": Client(
        package("vector_quantize_pytorch.residual_vq", "ResidualVQ", dim=8, codebook_size=32, num_quantizers=3),
        (2, 30, 8),
        call,
        6,
        train=call,
    ),
    "taming": Client(lambda: taming.VectorQuantizer2(32, 4, 0.25), (2, 4, 5, 5), call, 1, train=call),
    "taming, remapped": Client(
        lambda: taming.VectorQuantizer2(8, 4, 0.25, remap=[1, 2, 3, 5, 7], sane_index_shape=True, legacy=False),
        (2, 4, 5, 5),
        call,
        1,
        train=call,
    ),
    "taming, one-hot": Client(lambda: taming.VectorQuantizer(32, 4, 0.25), (2, 4, 5, 5), call, 1, train=call),
    "LlamaGen": Client(
        lambda: llamagen.VectorQuantizer(32, 4, 0.25, 0.1, True, True), (2, 4, 5, 5), call, 1, train=call
    ),
    "LlamaGen, plain": Client(
        lambda: llamagen.VectorQuantizer(32, 4, 0.25, 0.0, False, False), (2, 4, 5, 5), call, 1, train=call
    ),
    "VAR": Client(
        lambda: var.VectorQuantizer2(32, 4, False, (1, 2, 5)),
        (2, 4, 5, 5),
        lambda module, x: [module.f_to_idxBl_or_fhat(x, to_fhat) for to_fhat in (False, True)],
        1,
    ),
    "VAR, normalized": Client(
        lambda: var.VectorQuantizer2(32, 4, True, (1, 3, 5)),
        (2, 4, 5, 5),
        lambda module, x: module.f_to_idxBl_or_fhat(x, False, [1, 2, 5]),
        1,
    ),
    "WavTokenizer": Client(
        lambda: wavtokenizer.ResidualVectorQuantization(num_quantizers=3, dim=8, codebook_size=32),
        (2, 8, 30),
        encode,
        4,
        train=call,
    ),
    "rosinality": Client(lambda: rosinality.Quantize(8, 32, decay=0.9), (2, 30, 8), call, 1, train=call),
    "jukebox": Client(
        lambda: jukebox.BottleneckBlock(32, 8, 0.9),
        (2, 8, 30),
        lambda module, x: module(x, update_k=False),
        1,
        train=lambda module, x: module(x)[:3],
    ),
    "RQ-VAE": Client(
        lambda: rq_vae.Quantize(8, 32, rq_vae.QuantizeForwardMode.STE),
        (60, 8),
        lambda module, x: module(x, 0.5),
        1,
        train=lambda module, x: module(x, 0.5),
    ),
    "RQ-VAE, sampled": Client(
        lambda: rq_vae.Quantize(8, 32, rq_vae.QuantizeForwardMode.GUMBEL_SOFTMAX),
        (60, 8),
        lambda module, x: module(x, 0.5),
        1,
        train=lambda module, x: module(x, 0.5),
    ),
    "LC-Rec": Client(lambda: lc_rec.VectorQuantizer(32, 8), (60, 8), call, 1, train=call),
    "LC-Rec, balanced": Client(lambda: lc_rec.VectorQuantizer(32, 8, sk_epsilon=0.1), (60, 8), call, 1, train=call),
}
