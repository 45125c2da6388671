"""Train a VQ-VAE with Lightning, on one or several processes, and log the use of the codebook over all of them.

    pip install lightning
    python examples/train_lightning.py [--steps 300] [--devices 2]

fastvq synchronizes codebooks itself: each process learns from the vectors of all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastvq
from fastvq.data import load_fashion_mnist
from fastvq.data.examples import to_float
from fastvq.models import VQVAE, Decoder, Encoder


class LitVQVAE(lightning.LightningModule):
    """VQ-VAE whose loss is the squared error over the variance of the data, plus the commitment loss."""

    def __init__(self, codebook_size: int = 512, dim: int = 64, width: int = 96) -> None:
        super().__init__()
        self.save_hyperparameters()
        quantizer = fastvq.VectorQuantize(
            dim=dim, codebook_size=codebook_size, decay=0.99, commitment_weight=0.25, threshold_ema_dead_code=1.0
        )
        self.model = VQVAE(Encoder(1, dim, width=width), quantizer, Decoder(dim, 1, width=width))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = to_float(batch[0])
        reconstruction, _, vq_loss = self.model(x)
        loss = (reconstruction - x).square().mean() / 0.08 + vq_loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x = to_float(batch[0])
        error = (self.model.reconstruct(x) - x).square().mean()
        self.log("validation_error", error, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class CodebookUse(lightning.Callback):
    """Log perplexity and usage of the codebook over all processes, every `every` steps."""

    def __init__(self, every: int = 50) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: Any, module: Any, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            quantizer = module.model.bottleneck
            report = quantizer.health(together=True)  # all processes call this, which sums their counts
            module.log_dict({"perplexity": report.perplexity.item(), "usage": report.usage.item()}, prog_bar=True)
            quantizer.reset_health()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--devices", type=int, default=1, help="processes, or GPUs")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args()

    lightning.seed_everything(0)
    data = load_fashion_mnist()
    train = DataLoader(TensorDataset(data.train), batch_size=32, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(data.test), batch_size=250)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        callbacks=[CodebookUse(every=min(50, options.steps))],
        default_root_dir=options.out,
        val_check_interval=options.steps,
        check_val_every_n_epoch=None,
        logger=False,
    )
    trainer.fit(LitVQVAE(), train, test)
    measured = {name: f"{float(value):.4f}" for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        print(f"after {trainer.global_step} steps: {measured}")


if __name__ == "__main__":
    main()
