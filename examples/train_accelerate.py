"""Train a VQ-VAE with Hugging Face Accelerate, on one or several processes, and log the use of the codebook over all.

    pip install accelerate
    python examples/train_accelerate.py [--steps 300]
    accelerate launch --num_processes 2 examples/train_accelerate.py

fastvq synchronizes codebooks itself: each process learns from the vectors of all.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import fastvq
from fastvq.data import load_fashion_mnist
from fastvq.data.examples import to_float
from fastvq.models import VQVAE, Decoder, Encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU where there is a GPU")
    options = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(cpu=options.cpu)
    data = load_fashion_mnist()
    quantizer = fastvq.VectorQuantize(dim=64, codebook_size=512, decay=0.99, threshold_ema_dead_code=1.0)
    model = VQVAE(Encoder(1, 64, width=96), quantizer, Decoder(64, 1, width=96))
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        DataLoader(TensorDataset(data.train), batch_size=32, shuffle=True, drop_last=True),
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, (stored,) in enumerate(itertools.islice(batches, options.steps), 1):
        x = to_float(stored)
        reconstruction, _, vq_loss = model(x)
        error = (reconstruction - x).square().mean()
        optimizer.zero_grad()
        accelerator.backward(error / 0.08 + vq_loss)
        optimizer.step()
        if step % options.log_every == 0 or step == options.steps:
            report = quantizer.health(together=True)  # all processes call this, which sums their counts
            error = accelerator.reduce(error.detach(), "mean")
            use = f"perplexity {report.perplexity:.0f}, usage {report.usage:.0%}"
            accelerator.print(f"step {step}: {-10 * error.log10():.2f} dB, {use}")
            quantizer.reset_health()


if __name__ == "__main__":
    main()
