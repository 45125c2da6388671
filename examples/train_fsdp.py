"""Train a VQ-VAE whose parameters are sharded over processes by torch's `fully_shard` (FSDP2).

    torchrun --nproc-per-node 2 examples/train_fsdp.py [--steps 100] [--learnable]

A codebook of moving averages is a buffer, whole and equal in each process; a learnable one is sharded like
every parameter.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import fastvq
from fastvq.data import load_fashion_mnist
from fastvq.data.examples import to_float
from fastvq.models import VQVAE, Decoder, Encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learnable", action="store_true", help="learn the codebook by gradients")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)
    quantizer = fastvq.VectorQuantize(
        dim=64, codebook_size=512, learnable_codebook=options.learnable, ema_update=not options.learnable
    )
    model = VQVAE(Encoder(1, 64, width=96), quantizer, Decoder(64, 1, width=96)).to(device)
    for part in (model.encoder, quantizer, model.decoder):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "reconstruct")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    data = load_fashion_mnist()
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(options.steps):
        x = to_float(data.train[torch.randint(len(data.train), (32,), generator=generator)]).to(device)
        reconstruction, _, vq_loss = model(x)
        loss = (reconstruction - x).square().mean() / 0.08 + vq_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = quantizer.health(together=True)
    if dist.get_rank() == 0:
        print(f"after {options.steps} steps: loss {loss:.3f}, perplexity {report.perplexity:.0f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
