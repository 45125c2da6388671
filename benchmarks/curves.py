"""Training curves of fastvq's layers and vector_quantize_pytorch's, from equal states, seeds and data.

    python benchmarks/curves.py            # all layers, about five minutes on two cores; writes docs/curves.md

Each layer sits in a small convolutional autoencoder on Fashion-MNIST. Both start from one state, after the peer's layer
has seen the first batch (its k-means), and see the same batches.
"""

from __future__ import annotations

import argparse
import copy
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastvq
from fastvq import models
from fastvq.data import load_fashion_mnist
from fastvq.runs import figures

DIM = 16
BATCH = 64
STEPS = 300
SMOOTHED = 25
"""Steps that a value of a drawn curve is the mean of."""
VARIANCE = 0.08
"""Variance of the images: a reconstruction loss of 1 is that of their mean."""
ROOT = Path(__file__).parent.parent

LAYERS: dict[str, Callable[[ModuleType], nn.Module]] = {
    "VectorQuantize": lambda m: m.VectorQuantize(DIM, 256, decay=0.99, kmeans_init=True, rotation_trick=False),
    "ResidualVQ": lambda m: m.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=64, decay=0.99, kmeans_init=True),
    "FSQ": lambda m: m.FSQ([8, 5, 5, 5], dim=DIM),
    "LFQ": lambda m: m.LFQ(
        dim=DIM, codebook_size=256, num_codebooks=2, entropy_loss_weight=0.02, commitment_loss_weight=0.25
    ),
    "SimVQ": lambda m: m.SimVQ(DIM, 256),
}


class Autoencoder(nn.Module):
    """Images (B, 1, 28, 28) to 7 x 7 vectors and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = models.Encoder(1, DIM, width=32, residual_width=16, residual_blocks=1)
        self.decoder = models.Decoder(DIM, 1, width=32, residual_width=16, residual_blocks=1)

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """(reconstruction, the layer's own loss)."""
        quantized, _, *loss = layer(self.features(images))
        codes = quantized.transpose(1, 2).unflatten(2, (7, 7))
        return self.decoder(codes), loss[0].sum() if loss else quantized.new_zeros(())


def batches(images: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield images[torch.randint(len(images), (BATCH,), generator=generator)].float() / 255


def curve(model: Autoencoder, layer: nn.Module, data: Iterator[Tensor]) -> list[float]:
    """Return the reconstruction loss of each training step, in units of the images' variance."""
    optimizer = torch.optim.AdamW([*model.parameters(), *layer.parameters()], lr=2e-3)
    losses = []
    for images in data:
        reconstruction, loss = model(images, layer)
        error = (reconstruction - images).square().mean() / VARIANCE
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
        losses.append(error.item())
    return losses


class Curves(NamedTuple):
    """Return the losses of each step, and the share of equal indices at the start."""

    fastvq: list[float]
    peer: list[float]
    agreement: float

    @property
    def gap(self) -> float:
        """The largest relative distance between the smoothed curves."""
        pairs = zip(smoothed(self.fastvq), smoothed(self.peer), strict=True)
        return max(abs(ours / theirs - 1) for ours, theirs in pairs)

    def apart(self, tolerance: float = 1e-3) -> int | None:
        """Return the first step whose losses differ by more than a relative tolerance."""
        pairs = zip(self.fastvq, self.peer, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if abs(a / b - 1) > tolerance), None)


def compare(name: str, steps: int = STEPS, seed: int = 0) -> Curves:
    """Return the curves of `LAYERS[name]` of both libraries."""
    import vector_quantize_pytorch as peer

    torch.manual_seed(seed)
    images = load_fashion_mnist().train
    model = Autoencoder()
    first = model.features(next(batches(images, 1, seed))).detach()
    theirs = LAYERS[name](peer).train()
    theirs(first)
    ours = LAYERS[name](fastvq).train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    agreement = (copy.deepcopy(ours).eval()(first)[1] == copy.deepcopy(theirs).eval()(first)[1]).float().mean().item()
    losses = []
    for layer in (ours, theirs):
        torch.manual_seed(seed)
        losses.append(curve(copy.deepcopy(model), layer, batches(images, steps, seed)))
    return Curves(*losses, agreement)


def smoothed(losses: list[float]) -> list[float]:
    width = min(SMOOTHED, len(losses))
    return torch.tensor(losses, dtype=torch.float64).unfold(0, width, 1).mean(1).tolist()


def draw(name: str, curves: Curves, path: Path) -> None:
    caption = (
        f"Reconstruction loss over the variance of the images, mean of {SMOOTHED} steps, of a small autoencoder on"
        f" Fashion-MNIST. Both layers start from the same state and see the same batches. {verdict(curves)}"
    )
    figure, axes = figures.figure_with(7, 4.2, f"{name}: training with fastvq and vector_quantize_pytorch", caption)
    for label, losses, style, width, color in (
        ("fastvq", curves.fastvq, "-", 3.0, figures.SERIES[0]),
        ("vector_quantize_pytorch", curves.peer, "--", 1.4, figures.SERIES[1]),
    ):
        values = smoothed(losses)
        axes.plot(range(len(losses) - len(values), len(losses)), values, style, lw=width, color=color, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="upper right")
    figures.save_figure(figure, path)


def verdict(curves: Curves) -> str:
    apart = curves.apart()
    since = "no step's loss differs by 0.1 %" if apart is None else f"the first step to differ by 0.1 % is {apart}"
    return f"The curves differ by {curves.gap:.1%} at most; {since}."


def report(results: dict[str, Curves], steps: int) -> str:
    text = f"""
        `python benchmarks/curves.py` trains a small autoencoder on Fashion-MNIST with each layer of fastvq and
        with the same layer of vector_quantize_pytorch 1.32.0, for {steps} steps from the same state, with the
        same seeds and batches. The loss is the reconstruction error over the variance of the images; "final" is
        the mean of the last {SMOOTHED} steps. The gap is the largest relative difference of the curves, each
        value the mean of {SMOOTHED} steps. Two runs that round their sums in different orders drift apart, slowly
        at first: the column before the last is the first step whose loss differs by 0.1 %. An unstable training
        would prove little: LFQ with 256 codes and without commitment loss stalls here, and amplified a
        difference in the last digit to a gap of 36 %."""
    lines = [
        "# Training curves beside vector_quantize_pytorch",
        "",
        textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False),
        "",
        "| layer | equal indices at the start | fastvq, final | peer, final | differs by 0.1 % at step | largest gap |",
        "|---|---|---|---|---|---|",
    ]
    for name, curves in results.items():
        apart = curves.apart()
        lines.append(
            f"| {name} | {curves.agreement:.2%} | {smoothed(curves.fastvq)[-1]:.4f} | {smoothed(curves.peer)[-1]:.4f}"
            f" | {'never' if apart is None else apart} | {curves.gap:.2%} |"
        )
    lines += ["", *(f"![{name}](images/curves_{name}.png)\n" for name in results)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    (arguments.out / "images").mkdir(parents=True, exist_ok=True)
    results = {}
    for name in arguments.layers:
        results[name] = compare(name, arguments.steps)
        draw(name, results[name], arguments.out / "images" / f"curves_{name}.png")
        print(f"{name}: {verdict(results[name])}", flush=True)
    (arguments.out / "curves.md").write_text(report(results, arguments.steps))


if __name__ == "__main__":
    main()
