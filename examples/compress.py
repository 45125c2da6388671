"""Train a small VQ-VAE on the images that ship with fastvq, and compress images it never saw to one file and back.

python examples/compress.py [--steps 1000] [--out images.fvq]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from fastvq import coding
from fastvq.training import TrainConfig, Trainer, load_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("images.fvq"))
    options = parser.parse_args()

    config = TrainConfig(steps=options.steps, evaluate_every=options.steps)
    images = load_images(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, images, Path(folder) / "run")
        trainer.fit()
    model = trainer.model.eval()

    pixels = images.test / 255
    codes = model.encode(pixels)  # (1000, 7, 7) integers
    for name, size in coding.measure(codes, config.codebook_size).items():
        print(f"{name}: {size['bits_per_code']:.2f} bits a code, {size['bytes']:.0f} bytes")

    # Files are tied to the model, without which codes mean nothing.
    fingerprint = coding.fingerprint(model)
    coding.save(options.out, coding.encode(codes, config.codebook_size, fingerprint=fingerprint))
    print(f"{options.out}: {options.out.stat().st_size} bytes for {pixels.numel()} pixels")

    decoded = coding.decode(coding.load(options.out), fingerprint=fingerprint)
    assert torch.equal(decoded, codes)
    with torch.no_grad():
        restored = model.decode(decoded).clamp(0, 1)
    error = (restored - pixels).square().mean()
    print(f"decoded again: {-10 * error.log10():.2f} dB")


if __name__ == "__main__":
    main()
