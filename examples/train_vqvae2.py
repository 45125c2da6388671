"""Train a VQ-VAE with one grid of indices and a VQ-VAE-2 with two, with the same networks and equal bits, and a prior.

python examples/train_vqvae2.py [--data noto-emoji] [--image-size 32] [--steps 800] [--prior-steps 400] [--run DIR]

The picture shows samples of the prior, and what they become by common mistakes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastvq.data import DATA_SETS, Examples
from fastvq.data.examples import to_float
from fastvq.errors import FastvqError
from fastvq.modalities import ImageConfig
from fastvq.models import VQVAE, Prior
from fastvq.runs.plots import save_grid
from fastvq.runs.train_prior import train_prior
from fastvq.training import PriorConfig, Trainer, load_examples
from fastvq.training.checkpoint import checkpoint_folders

SHOWN = 9
TWO = ImageConfig(
    data="noto-emoji",
    image_size=32,
    grayscale=False,
    grids=2,
    codebook_size=64,
    dim=32,
    width=56,
    residual_width=24,
    batch_size=16,
    learning_rate=2e-3,
)
# Fine indices alone, each of log2 181 = 7.5 bits, take as many bits as fine and coarse ones of 6 bits each.
ONE = dataclasses.replace(TWO, grids=1, codebook_size=181)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="noto-emoji", help="a data set of the package, or a folder of images")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--prior-steps", type=int, default=400)
    parser.add_argument("--run", type=Path, default=Path("runs/vqvae2"))
    options = parser.parse_args()
    data = options.data if options.data in DATA_SETS else str(Path(options.data).resolve())
    changed = {"data": data, "image_size": options.image_size, "steps": options.steps}

    trained(dataclasses.replace(ONE, **changed), options.run / "one")
    model, examples = trained(dataclasses.replace(TWO, **changed), options.run / "two")
    learned = train_prior(
        options.run / "two",
        PriorConfig(kind="hierarchical", dim=64, depth=3, batch_size=32, steps=options.prior_steps),
        resume=True,
    )
    if learned is None:
        sys.exit("stopped, saved; the same command continues")
    print(f"two grids: {learned.bits_per_index:.2f} bits per held-out index under the prior, of {math.log2(64):.2f}")
    picture_mistakes(options.run / "mistakes.png", learned.prior, model, examples)
    print(f"picture: {options.run / 'mistakes.png'}")


def trained(config: ImageConfig, folder: Path) -> tuple[VQVAE, Examples]:
    """Train a VQ-VAE, or continue its training, and print what it costs and gives."""
    examples = load_examples(config)
    trainer = Trainer(config, examples, folder, resume=bool(checkpoint_folders(folder)))
    evaluation = trainer.fit()
    if evaluation is None:
        sys.exit("stopped, saved; the same command continues")
    model = trainer.model.eval()
    count = math.prod(model.adapter.index_shape(config.feature_grid))
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{folder.name}: {count} indices of {config.codebook_size} codes, {count * math.log2(config.codebook_size):.0f}"
        f" bits an image; {weights:,} parameters; {evaluation.psnr_db:.2f} dB"
    )
    return model, examples


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
