"""Small batches: residual stacks that encode and decode a few vectors at a time, as streaming codecs do."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvq
from fastvq.errors import WrongResultError, first_line

from .exact import nearest
from .measure import interleave


class Stack(NamedTuple):
    """Q stages of K codes of D dimensions."""

    k: int
    d: int
    stages: int

    def __str__(self) -> str:
        return f"K={self.k} D={self.d} Q={self.stages}"


ROWS = (1, 4, 16, 75)
"""Numbers of vectors: a frame, a few, and a second of 75 Hz."""
STACKS = [Stack(1024, 128, 1), Stack(2048, 256, 32), Stack(1024, 128, 8), Stack(1024, 8, 9)]
OP, PACKED, LAYER = "fastvq residual_search", "fastvq PackedCodebook", "fastvq ResidualVQ"
_POOL = 4
_Call = Callable[[], Any]


@functools.cache
def codebooks_of(stack: Stack) -> Tensor:
    """Return codebooks (Q, K, D) of Gaussian codes, as long as those of the best quantizers of Gaussian vectors.

    The best quantizer leaves the share K^(-2 / D) of the squares to the next stage, by the rate-distortion function.
    Stages that learn from a small sample would hold many copies of a few codes, which no search reads.
    """
    g = torch.Generator().manual_seed(0)
    left = stack.k ** (-2 / stack.d)
    scales = ((1 - left) * left ** torch.arange(stack.stages)).sqrt()
    return torch.randn(stack.stages, stack.k, stack.d, generator=g) * scales[:, None, None]


def rows_of(stack: Stack, rows: int) -> Tensor:
    """Return Gaussian vectors (N, D) that the codebooks have not learned from."""
    return torch.randn(rows, stack.d, generator=torch.Generator().manual_seed(1))


def expected_indices(x: Tensor, codebooks: Tensor) -> Tensor:
    """Return the indices (N, Q) of the definition."""
    indices, residual = [], x
    for codebook in codebooks:
        indices.append(nearest(residual, codebook))
        residual = residual - codebook[indices[-1]]
    return torch.stack(indices, -1)


def layer_of(codebooks: Tensor) -> fastvq.ResidualVQ:
    """Return a layer in eval with these codebooks."""
    stages, size, dim = codebooks.shape
    layer = fastvq.ResidualVQ(dim=dim, num_quantizers=stages, codebook_size=size).eval()
    with torch.no_grad():
        for stage, codebook in zip(layer._stages, codebooks, strict=True):
            stage.codebook = codebook
    return layer


def _addmm(codebooks: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the encoding of a careful user, |e|^2 - 2 <x, e> with norms computed once."""
    stages = [(codebook, codebook.T, codebook.square().sum(1)) for codebook in codebooks]

    def encode(x: Tensor) -> Tensor:
        residual, indices = x, []
        for place, (codebook, transposed, norms) in enumerate(stages):
            indices.append(torch.addmm(norms, residual, transposed, alpha=-2).argmin(1))
            if place + 1 < len(stages):
                residual = residual - F.embedding(indices[-1], codebook)
        return torch.stack(indices, -1)

    return encode


def _transformers(name: str, codebooks: Tensor) -> nn.Module:
    """Return the residual quantizer of a codec of transformers with these codebooks."""
    stages, size, dim = codebooks.shape
    sizes = {"codebook_size": size, "codebook_dim": dim}
    package: Any = importlib.import_module(f"transformers.models.{name.lower()}")
    layer: Any
    if name == "DAC":
        config = package.DacConfig(hidden_size=dim, n_codebooks=stages, **sizes)
        layer = package.modeling_dac.DacResidualVectorQuantizer(config)
        for stage, codebook in zip(layer.quantizers, codebooks, strict=True):
            stage.codebook.weight.data.copy_(codebook)
            for projection in (stage.in_proj, stage.out_proj):
                projection.weight.data.copy_(torch.eye(dim)[..., None])
                projection.bias.data.zero_()
    elif name == "Mimi":
        # A whole model needs two quantizers.
        wide = {"vector_quantization_hidden_dimension": dim, "hidden_size": dim, "num_quantizers": max(2, stages)}
        layer = package.modeling_mimi.MimiResidualVectorQuantizer(package.MimiConfig(**sizes, **wide), stages)
        for stage, codebook in zip(layer.layers, codebooks, strict=True):
            stage.codebook.embed_sum.copy_(codebook)
    else:
        config, modeling = package.EncodecConfig(**sizes), package.modeling_encodec
        layer = modeling.EncodecResidualVectorQuantizer(config)
        layer.layers = nn.ModuleList([modeling.EncodecVectorQuantization(config) for _ in codebooks])
        layer.num_quantizers = stages
        for stage, codebook in zip(layer.layers, codebooks, strict=True):
            stage.codebook.embed.copy_(codebook)
    return layer.eval()


def _absent() -> str:
    return "" if importlib.util.find_spec("transformers") else "transformers isn't installed"


def _encoders(codebooks: Tensor, x: Tensor) -> dict[str, tuple[str, Callable[[], _Call]]]:
    """Return, by name, why a contestant cannot run, or an empty string, and a function that makes its timed call."""
    frames = x.T[None].contiguous()  # (1, D, N), as the codecs have them
    absent = _absent()

    def codec(name: str) -> Callable[[], _Call]:
        def make() -> _Call:
            layer: Any = _transformers(name, codebooks)
            if name == "DAC":
                return lambda: layer(frames)[1][0].T
            return lambda: layer.encode(frames)[:, 0].T

        return make

    def layer() -> _Call:
        return functools.partial(layer_of(codebooks).encode, x)

    contestants: dict[str, tuple[str, Callable[[], _Call]]] = {
        OP: ("", lambda: lambda: fastvq.residual_search(x, codebooks)),
        PACKED: ("", lambda: functools.partial(fastvq.residual_search, x, fastvq.PackedCodebook(codebooks))),
        LAYER: ("", layer),
        "addmm + argmin": ("", lambda: functools.partial(_addmm(codebooks), x)),
    }
    for name in ("Mimi", "EnCodec", "DAC"):
        contestants[f"{name} of transformers"] = (absent, codec(name))
    return contestants


def _decoders(codebooks: Tensor, indices: Tensor) -> dict[str, tuple[str, Callable[[], _Call]]]:
    """Return the same for decoding indices (N, Q) to vectors (N, D)."""
    absent = _absent()
    stages, size, dim = codebooks.shape
    table = codebooks.reshape(-1, dim)
    offset = torch.arange(stages) * size

    def codec(name: str) -> Callable[[], _Call]:
        def make() -> _Call:
            layer: Any = _transformers(name, codebooks)
            if name == "DAC":
                codes = indices.T[None].contiguous()
                return lambda: layer.from_codes(codes)[0][0].T
            codes = indices.T[:, None].contiguous()
            codes = codes.transpose(0, 1).contiguous() if name == "Mimi" else codes
            return lambda: layer.decode(codes)[0].T

        return make

    def layer() -> _Call:
        return functools.partial(layer_of(codebooks).get_output_from_indices, indices)

    contestants: dict[str, tuple[str, Callable[[], _Call]]] = {
        LAYER: ("", layer),
        "embedding_bag": ("", lambda: lambda: F.embedding_bag(indices + offset, table, mode="sum")),
    }
    for name in ("Mimi", "EnCodec", "DAC"):
        contestants[f"{name} of transformers"] = (absent, codec(name))
    return contestants


def measure_small(stack: Stack, rows: int, *, budget: float = 1.0) -> list[dict[str, Any]]:
    """Return the records of encoding and of decoding: sizes, and each contestant's median seconds and wrong rows.

    DAC searches for unit vectors, so that its indices are those of another quantizer and are not compared.

    Raises:
        WrongResultError: fastvq is wrong.
    """
    codebooks, x = codebooks_of(stack), rows_of(stack, rows)
    indices = expected_indices(x, codebooks)
    output = torch.stack([codebook[one] for codebook, one in zip(codebooks, indices.T, strict=True)]).double().sum(0)
    records = []
    for what, made in (("encode", _encoders(codebooks, x)), ("decode", _decoders(codebooks, indices))):
        calls: dict[str, _Call] = {}
        found: list[dict[str, Any]] = []
        for name, (reason, make) in made.items():
            record: dict[str, Any] = {"name": name}
            found.append(record)
            if reason:
                record["not_run"] = reason
                continue
            try:
                with torch.no_grad():
                    call = make()
                    result = call()
            except Exception as error:
                if name.startswith("fastvq"):
                    raise
                record["not_run"] = f"fails: {first_line(error)}"
                continue
            calls[name] = torch.no_grad()(call)
            if what == "decode":
                record["wrong"] = int(((result - output).abs() > 1e-4).any(-1).sum())
            elif not name.startswith("DAC"):
                record["wrong"] = int((result != indices).any(-1).sum())
            if record.get("wrong") and name.startswith("fastvq"):
                raise WrongResultError(f"{name} is wrong in {record['wrong']} of {rows} rows: N={rows} {stack} {what}")
        times = interleave(calls, budget=budget)
        for record in found:
            if record["name"] in times:
                record["seconds"] = statistics.median(times[record["name"]])
        records.append({"what": what, "n": rows, **stack._asdict(), "contestants": found})
    return records
