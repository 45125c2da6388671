"""Effect of the encoder network's rounding on the indices of a run's held-out images.

    python benchmarks/encoder_rounding.py runs/demo

The search is exact: equal latents give equal indices. But the order of sums in a convolution depends on the batch size,
the number of threads and the memory format, and a latent that lies between two indices may then get the other index.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from fastvq.data.examples import to_float
from fastvq.runs.load import load_model
from fastvq.training import load_examples

FIRST, LAST = torch.contiguous_format, torch.channels_last
WAYS = [
    *((batch, threads, LAST, torch.float32) for batch, threads in ((100, 1), (100, 2), (1, 1), (1, 2), (7, 1))),
    *((batch, threads, LAST, torch.float32) for batch, threads in ((1000, 1), (1000, 2))),
    *((batch, threads, FIRST, torch.float32) for batch, threads in ((100, 1), (100, 2), (1, 1), (1000, 2))),
    (100, 2, LAST, torch.float64),
    (100, 2, LAST, torch.bfloat16),
]
"""Batch, threads, memory format and the encoder's dtype. float64 represents the rounding of another machine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    model, config = load_model(options.run)
    images = to_float(load_examples(config).test)
    reference: list[torch.Tensor] = []
    print("| batch | threads | memory format | dtype | indices that change | largest relative difference of latents |")
    print("|---|---|---|---|---|---|")
    for batch, threads, layout, dtype in WAYS:
        torch.set_num_threads(threads)
        encoder = copy.deepcopy(model.encoder).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
        with torch.no_grad():
            parts = images.to(dtype).contiguous(memory_format=layout).split(batch)
            latents = torch.cat([encoder(part) for part in parts]).float()
            _, indices, _ = model.bottleneck(latents.flatten(2).transpose(1, 2))
        if not reference:
            reference = [latents, indices]
        changed = int((indices != reference[1]).sum())
        difference = float((latents - reference[0]).abs().max() / reference[0].square().mean().sqrt())
        name = "channels last" if layout == LAST else "channels first"
        print(
            f"| {batch} | {threads} | {name} | {str(dtype).removeprefix('torch.')} | {changed} of {indices.numel()} |"
            f" {difference:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
