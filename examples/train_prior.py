"""Train a small VQ-VAE and the prior over its indices on the images that ship with fastvq, and sample new images.

python examples/train_prior.py [--steps 1000] [--prior-steps 500] [--run runs/example]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from fastvq.errors import FastvqError
from fastvq.modalities import ImageConfig
from fastvq.runs.sample_pictures import picture_completions, picture_samples
from fastvq.runs.train_prior import train_prior
from fastvq.training import PriorConfig, Trainer, load_examples
from fastvq.training.checkpoint import checkpoint_folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prior-steps", type=int, default=500)
    parser.add_argument("--run", type=Path, default=Path("runs/example"))
    options = parser.parse_args()

    config = ImageConfig(steps=options.steps)
    examples = load_examples(config)
    # A run or prior that is there already is continued: a finished one is only loaded.
    trainer = Trainer(config, examples, options.run, resume=bool(checkpoint_folders(options.run)))
    if trainer.fit() is None:
        sys.exit("stopped, saved; the same command continues")
    model = trainer.model.eval()

    trained = train_prior(options.run, PriorConfig(steps=options.prior_steps), resume=True)
    if trained is None:
        sys.exit("stopped, saved; the same command continues")
    prior, uniform = trained.prior, math.log2(config.codebook_size)
    print(f"held-out images: {trained.bits_per_index:.2f} bits per index; a uniform prior has {uniform:.2f}")

    # Three new trousers, as indices and as pixels.
    indices = prior.sample(3, torch.full((3,), 1), temperature=0.9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = model.decode(indices)
    print(f"indices {tuple(indices.shape)} become images {tuple(pixels.shape)}")

    picture_samples(options.run / "samples.png", prior, model, config, examples, temperature=0.9)
    picture_completions(options.run / "completions.png", prior, model, config, examples, temperature=0.9)
    print(f"pictures: {options.run / 'samples.png'}, {options.run / 'completions.png'}")


if __name__ == "__main__":
    try:
        main()
    except FastvqError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
