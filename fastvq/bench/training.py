"""Training steps of the layers (forward, backward, codebook update) beside vector_quantize_pytorch's."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastvq

from .data import Shape, clustered
from .measure import extra_bytes, interleave

STEPS = [Shape(16384, 512, 64), Shape(16384, 8192, 64), Shape(16384, 1024, 8)]
RESIDUAL_STEP, STAGES = Shape(4096, 1024, 128), 8
PEER = "vector_quantize_pytorch"
LEAST_AGREEMENT = 0.999
SEARCH = "search alone"


def layers(shape: Shape, stages: int = 0) -> dict[str, nn.Module] | str:
    """Return fastvq's layer and the peer's with equal codebooks; or the reason why they are missing.

    They are residual if `stages` is positive.
    """
    if importlib.util.find_spec(PEER) is None:
        return f"{PEER} isn't installed"
    import vector_quantize_pytorch

    modules = {"fastvq": fastvq, PEER: vector_quantize_pytorch}
    if not stages:
        made = {name: m.VectorQuantize(dim=shape.d, codebook_size=shape.k, decay=0.99) for name, m in modules.items()}
        _, codebook = clustered(shape)
        with torch.no_grad():
            for layer in made.values():
                layer.codebook = codebook
        return made
    if not hasattr(fastvq, "ResidualVQ"):
        return "this version of fastvq has no ResidualVQ"
    made = {
        name: m.ResidualVQ(dim=shape.d, codebook_size=shape.k, num_quantizers=stages, decay=0.99)
        for name, m in modules.items()
    }
    made["fastvq"].load_state_dict(made[PEER].state_dict())
    return made


def step_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a training step: forward with codebook update, and backward to x."""

    def step() -> None:
        quantized, _, loss = layer(x)
        x.grad = None
        (quantized.sum() + loss.sum()).backward()

    return step


def agreement(made: dict[str, nn.Module], x: Tensor) -> float:
    """Return the share of indices on which both layers agree before training; it may be below 1 because peers round."""
    chosen = []
    for layer in made.values():
        layer.eval()
        with torch.no_grad():
            chosen.append(layer(x)[1])
        layer.train()
    return (chosen[0] == chosen[1]).float().mean().item()


def measure_step(shape: Shape, stages: int = 0, *, budget: float = 20.0) -> dict[str, Any]:
    """Return the median seconds of fastvq's training step and the peer's on clustered data, and their agreement before.

    Raises:
        RuntimeError: they choose different indices, so that their times are not comparable.
    """
    record: dict[str, Any] = {**shape._asdict(), "stages": stages}
    made = layers(shape, stages)
    if isinstance(made, str):
        return record | {"not_run": made}
    x = clustered(shape)[0][None].requires_grad_()
    record["agreement"] = agreement(made, x)
    if record["agreement"] < LEAST_AGREEMENT:
        raise RuntimeError(f"fastvq and {PEER} agree on {record['agreement']:.2%} of the indices only: {shape}")
    calls: dict[str, Callable[[], Any]] = {name: step_of(layer, x) for name, layer in made.items()}
    rows, codebooks = x.detach()[0], _codebooks(made["fastvq"])
    calls[SEARCH] = lambda: fastvq.residual_search(rows, codebooks) if stages else fastvq.search(rows, codebooks[0])
    times = {name: statistics.median(taken) for name, taken in interleave(calls, budget=budget).items()}
    record["search_seconds"] = times.pop(SEARCH)
    record["seconds"] = times
    record["ratio"] = record["seconds"][PEER] / record["seconds"]["fastvq"]
    return record


def _codebooks(layer: nn.Module) -> Tensor:
    """Return copies of the codebooks of a layer, one a stage (Q, K, D)."""
    stages: Any = layer.layers if isinstance(layer, fastvq.ResidualVQ) else [layer]
    return torch.stack([stage.codebook.detach().clone() for stage in stages])


def step_memory(name: str, shape: Shape) -> int:
    """Return the extra bytes of a layer's first training step, after one on eight vectors loaded its libraries."""
    made = layers(shape)
    if isinstance(made, str):
        raise RuntimeError(made)
    layer = made[name]
    step_of(layer, torch.randn(1, 8, shape.d, requires_grad=True))()
    return extra_bytes(step_of(layer, clustered(shape)[0][None].requires_grad_()))
