"""Train a small VQ-VAE and the prior over its indices, then compress held-out images to one file and back.

python examples/compress.py [--steps 1000] [--prior-steps 500] [--run runs/example] [--out images.fvq]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastvq import coding
from fastvq.errors import FastvqError
from fastvq.modalities import ImageConfig
from fastvq.runs.train_prior import train_prior
from fastvq.training import PriorConfig, Trainer, load_examples
from fastvq.training.checkpoint import checkpoint_folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prior-steps", type=int, default=500)
    parser.add_argument("--run", type=Path, default=Path("runs/example"))
    parser.add_argument("--out", type=Path, default=Path("images.fvq"))
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
    prior = trained.prior

    pixels = examples.test / 255
    indices = model.encode(pixels)  # (1000, 7, 7), int64
    for name, size in coding.measure(indices, config.codebook_size).items():
        print(f"{name}: {size['bits_per_index']:.2f} bits per index, {size['bytes']:.0f} bytes")

    # A file carries the fingerprints of the model that decodes its indices and of the prior that it is coded with.
    fingerprint = coding.fingerprint(model)
    data = coding.encode(
        indices, config.codebook_size, model="prior", prior=prior, labels=examples.test_labels, fingerprint=fingerprint
    )
    coding.save(options.out, data)
    print(f"prior: {8 * len(data) / indices.numel():.2f} bits per index, {len(data)} bytes with the labels")
    print(f"{options.out}: {options.out.stat().st_size} bytes for {pixels.numel()} pixels")

    decoded = coding.decode(coding.load(options.out), prior=prior, fingerprint=fingerprint)
    assert torch.equal(decoded, indices)
    with torch.no_grad():
        restored = model.restore(decoded)
    error = (restored - pixels).square().mean()
    print(f"decoded again: {-10 * error.log10():.2f} dB")


if __name__ == "__main__":
    try:
        main()
    except FastvqError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
