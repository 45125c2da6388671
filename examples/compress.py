"""Train a small VQ-VAE on the images that ship with fastvq, learn the prior of its codes, and compress images that
neither of them ever saw to one file and back.

python examples/compress.py [--steps 1000] [--prior-steps 500] [--run runs/example] [--out images.fvq]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastvq import coding
from fastvq.training import TrainConfig, Trainer, load_images
from fastvq.training.prior import PriorConfig, train_prior


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prior-steps", type=int, default=500)
    parser.add_argument("--run", type=Path, default=Path("runs/example"))
    parser.add_argument("--out", type=Path, default=Path("images.fvq"))
    options = parser.parse_args()

    config = TrainConfig(steps=options.steps, evaluate_every=options.steps)
    images = load_images(config)
    trainer = Trainer(config, images, options.run)
    trainer.fit()
    model = trainer.model.eval()

    learned = train_prior(options.run, PriorConfig(steps=options.prior_steps))
    assert learned is not None, "interrupted"
    prior, _ = learned

    pixels = images.test / 255
    codes = model.encode(pixels)  # (1000, 7, 7) integers
    for name, size in coding.measure(codes, config.codebook_size).items():
        print(f"{name}: {size['bits_per_index']:.2f} bits a code, {size['bytes']:.0f} bytes")

    # Files are tied to the model, without which codes mean nothing, and to the prior that they are coded with.
    own = coding.fingerprint(model)
    data = coding.encode(
        codes, config.codebook_size, model="prior", prior=prior, labels=images.test_labels, fingerprint=own
    )
    coding.save(options.out, data)
    print(f"prior: {8 * len(data) / codes.numel():.2f} bits a code, {len(data)} bytes with the labels")
    print(f"{options.out}: {options.out.stat().st_size} bytes for {pixels.numel()} pixels")

    decoded = coding.decode(coding.load(options.out), prior=prior, fingerprint=own)
    assert torch.equal(decoded, codes)
    with torch.no_grad():
        restored = model.decode(decoded).clamp(0, 1)
    error = (restored - pixels).square().mean()
    print(f"decoded again: {-10 * error.log10():.2f} dB")


if __name__ == "__main__":
    main()
