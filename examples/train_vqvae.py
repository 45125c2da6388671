"""Train a small VQ-VAE on the images that ship with fastvq, and draw reconstructions of held-out images.

python examples/train_vqvae.py [--steps 1000] [--out reconstructions.png]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import fastvq
from fastvq.data import load_fashion_mnist
from fastvq.models import VQVAE, Decoder, Encoder
from fastvq.runs.plots import save_reconstructions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("reconstructions.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    data = load_fashion_mnist()
    quantizer = fastvq.VectorQuantize(
        dim=64,
        codebook_size=512,
        decay=0.99,
        commitment_weight=0.25,
        kmeans_init=True,
        threshold_ema_dead_code=1.0,
        rotation_trick=False,
    )
    model = VQVAE(Encoder(1, 64, width=96), quantizer, Decoder(64, 1, width=96))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for step in range(1, options.steps + 1):
        x = data.train[torch.randint(len(data.train), (32,))] / 255
        reconstruction, _, vq_loss = model(x)
        squared_error = (reconstruction - x).square().mean()
        # Divided by about the variance of the data, so that its weight does not depend on the data's scale.
        loss = squared_error / 0.08 + vq_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps:
            perplexity = fastvq.perplexity(quantizer.code_counts).item()
            quantizer.reset_health()
            print(f"step {step}: {-10 * math.log10(squared_error.item()):.2f} dB, perplexity {perplexity:.0f}")

    model.eval()
    originals = data.test[:16] / 255
    indices = model.encode(originals)
    print(f"an image as {indices[0].numel()} indices: {indices[0].flatten().tolist()}")
    with torch.no_grad():
        restored = model.restore(indices)
    errors = (restored - originals).square().flatten(1).mean(1)
    save_reconstructions(
        options.out,
        originals,
        restored,
        data.test_names[:16],
        [f"{-10 * error.log10():.1f} dB" for error in errors],
        title=f"Held-out images after {options.steps} steps",
        caption="Below each image, its reconstruction from 49 indices.",
    )
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
