"""Compare a VQ-VAE-2 with one grid of indices at equal bits of an image, and draw samples and common mistakes.

python examples/train_vqvae2.py [--steps 800] [--prior-steps 400] [--run DIR]                     # emoji, 32x32
python examples/train_vqvae2.py --data FOLDER [--held-out FOLDER] --image-size 64 --codes 256 ... # images of a folder

Two grids have priors of 3 blocks each, one grid has a prior of 6. A wider network with one grid tells the effect of the
grids from that of the parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.data import DATA_SETS, Examples
from fastvq.data.examples import to_float
from fastvq.errors import FastvqError
from fastvq.modalities import ImageConfig
from fastvq.modalities.image import psnr_db
from fastvq.models import VQVAE, GridsBottleneck, Prior, discretized_logistic, elbo_bits_per_dimension
from fastvq.runs.plots import save_grid
from fastvq.runs.train_prior import train_prior
from fastvq.training import PriorConfig, Trainer, load_examples
from fastvq.training.checkpoint import checkpoint_folders

SHOWN = 9
FITTED = 200
"""Training images that the scale of the likelihood is fitted to."""
TWO = ImageConfig(
    data="noto-emoji",
    image_size=32,
    grayscale=False,
    grids=2,
    dim=32,
    width=56,
    residual_width=24,
    batch_size=16,
    learning_rate=2e-3,
)
NETWORKS: dict[str, dict[str, Any]] = {
    "one": {"grids": 1},
    "one-wide": {"grids": 1, "width": 82, "residual_width": 35},
    "two": {},
}
"""Settings by which the networks differ. The wide one has as many parameters as that of two grids."""
ONE_GRID = PriorConfig(dim=64, depth=6, batch_size=32)
PRIORS = {
    "one": ONE_GRID,
    "one-wide": ONE_GRID,
    "two": PriorConfig(kind="hierarchical", dim=64, depth=3, batch_size=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="noto-emoji", help="a data set of the package, or a folder of images")
    parser.add_argument("--held-out", type=Path, help="a folder of images to measure, instead of a part of the data")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--codes", type=int, default=64, help="codes of each of the two grids")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--prior-steps", type=int, default=400, help="0: no priors, and no picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=Path("runs/vqvae2"))
    options = parser.parse_args()
    data = options.data if options.data in DATA_SETS else str(Path(options.data).resolve())
    changed = {"data": data, "image_size": options.image_size, "steps": options.steps, "seed": options.seed}
    config = dataclasses.replace(TWO, **changed)
    # The coarse grid has a quarter of the indices of the fine one: alone it needs 5/4 of the bits for an index.
    codes = {"one": round(options.codes**1.25), "one-wide": round(options.codes**1.25), "two": options.codes}

    held_out = None
    if options.held_out is not None:
        measured = dataclasses.replace(config, data=str(options.held_out.resolve()), test_fraction=1e-9)
        held_out = load_examples(measured).train
    for name, settings in NETWORKS.items():
        folder = options.run / name
        model, examples = trained(dataclasses.replace(config, codebook_size=codes[name], **settings), folder)
        images = examples.test if held_out is None else held_out
        print(f"{name}: {described(model, codes[name], images)}")
        if name == "two":
            print(f"two: coarse codes leave {left_by_coarse(model, images):.1%} of the variance of the fine features")
        if options.prior_steps:
            prior = learned(folder, dataclasses.replace(PRIORS[name], steps=options.prior_steps))
            labels = examples.test_labels if prior.classes and held_out is None else None
            print(f"{name}: {bits_described(prior, model, examples.train[:FITTED], images, labels)}")
            if name == "two":
                picture_mistakes(options.run / "mistakes.png", prior, model, examples)
                print(f"picture: {options.run / 'mistakes.png'}")


def trained(config: ImageConfig, folder: Path) -> tuple[VQVAE, Examples]:
    """Train a VQ-VAE, or continue its training, and return it in eval mode with its data."""
    examples = load_examples(config)
    trainer = Trainer(config, examples, folder, resume=bool(checkpoint_folders(folder)))
    if trainer.fit() is None:
        sys.exit("stopped, saved; the same command continues")
    return trainer.model.eval(), examples


def learned(folder: Path, config: PriorConfig) -> Prior:
    """Train a prior on the indices of a run, or continue its training, and return it."""
    found = train_prior(folder, config, resume=True)
    if found is None:
        sys.exit("stopped, saved; the same command continues")
    return found.prior


def described(model: VQVAE, codes: int, images: Tensor) -> str:
    """Return the cost and the quality of a model on stored images."""
    count = len(model.encode(to_float(images[:1])).flatten())
    weights = sum(parameter.numel() for parameter in model.parameters())
    error = float((reconstructed(model, images) - to_float(images)).square().mean())
    return (
        f"{count} indices of {codes} codes, {count * math.log2(codes):.0f} bits an image; {weights:,} parameters;"
        f" {psnr_db(error):.2f} dB"
    )


@torch.no_grad()
def left_by_coarse(model: VQVAE, images: Tensor) -> float:
    """Return the share of the variance of the fine features that their prediction from the coarse codes leaves."""
    grids = model.bottleneck
    assert isinstance(grids, GridsBottleneck)
    features, left = [], []
    for part in images.split(100):
        x = to_float(part)
        coarse = grids.adapters[0].codes(grids.split(model.encode(x))[0], 2)
        features.append(model.encoder(x))
        left.append(features[-1] - grids.decoders[0](coarse))
    variance = torch.cat(features).var((0, 2, 3), correction=0).mean()
    return float(torch.cat(left).square().mean() / variance)


def bits_described(prior: Prior, model: VQVAE, fitted: Tensor, images: Tensor, labels: Tensor | None) -> str:
    """Return the bits of stored images under a prior, and the negative evidence lower bound of their pixels."""
    x, mean = to_float(fitted), reconstructed(model, fitted)
    scales = torch.linspace(-6, -1, 51).tolist()
    likeliest = min(scales, key=lambda scale: float(discretized_logistic(x, mean, scale).mean()))
    bits = bits_of(prior, model, images, labels)
    nats = discretized_logistic(to_float(images), reconstructed(model, images), likeliest)
    bound = float(elbo_bits_per_dimension(nats, bits.float() * math.log(2)).mean())
    weights = sum(parameter.numel() for parameter in prior.parameters())
    return (
        f"{float(bits.mean()):.0f} bits an image under a prior of {weights:,} parameters; negative ELBO {bound:.3f}"
        " bits per dimension"
    )


@torch.no_grad()
def bits_of(prior: Prior, model: VQVAE, images: Tensor, labels: Tensor | None) -> Tensor:
    """Return -log2 p of the indices of each image."""
    found = []
    for rows in torch.arange(len(images)).split(50):
        own = None if labels is None else labels[rows]
        found.append(prior.bits(model.encode(to_float(images[rows])), own))
    return torch.cat(found)


def reconstructed(model: VQVAE, images: Tensor) -> Tensor:
    """Return stored images as they are restored from their indices."""
    return torch.cat([model.reconstruct(to_float(part)) for part in images.split(100)])


@torch.no_grad()
def picture_mistakes(path: Path, prior: Prior, model: VQVAE, examples: Examples) -> None:
    """Draw held-out images, samples of the prior, and what becomes of both by mistakes in the indices."""
    rows = torch.linspace(0, len(examples.test) - 1, SHOWN).long()
    originals = to_float(examples.test[rows])
    indices = model.encode(originals)
    scales = model.adapter.scales
    assert scales is not None
    coarse = math.prod(scales[0])
    labels = examples.test_labels[rows] if prior.classes and examples.test_labels is not None else None
    generator = torch.Generator().manual_seed(0)

    def sampled(given: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        return prior.sample(SHOWN, labels, given=given, temperature=temperature, generator=generator)

    above = indices.clone()
    above[:, coarse:] = -1
    exchanged = torch.cat([indices[:, :coarse].roll(1, 0), indices[:, coarse:]], 1)
    turned = torch.cat([indices[:, :coarse], indices[:, coarse:].unflatten(1, scales[1]).mT.flatten(1)], 1)
    shown = {
        "original": originals,
        "decoded": model.restore(indices),
        "fine sampled": model.restore(sampled(above)),
        "all sampled": model.restore(sampled()),
        "likeliest": model.restore(sampled(temperature=0)),
        "coarse of another": model.restore(exchanged),
        "fine transposed": model.restore(turned),
        "no prior": model.restore(torch.randint(0, model.adapter.stage_sizes()[0], indices.shape, generator=generator)),
    }
    save_grid(
        path,
        [images.float() for images in shown.values()],
        list(shown),
        [""] * SHOWN,
        title=f"{examples.name}: samples of a VQ-VAE-2, and mistakes",
        caption="Samples of the fine grid under the coarse indices of the image above, samples of both grids, and the"
        " likeliest indices; then indices that do not belong together, in a wrong order, and drawn uniformly.",
    )


if __name__ == "__main__":
    try:
        main()
    except FastvqError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
