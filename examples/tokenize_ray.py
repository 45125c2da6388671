"""Tokenize images on a cluster with Ray Data: each worker loads the model once and turns batches into indices.

    pip install "ray[data]"
    python examples/tokenize_ray.py --run runs/mine --out indices FOLDER

On one machine or several processes of torchrun, `fastvq tokenize` does the same without Ray, and resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

import fastvq
from fastvq.data.image_io import IMAGES
from fastvq.data.source import data_files


class Tokenizer:
    """Paths of images to their indices; Ray makes one of these in each worker."""

    def __init__(self, run: str, device: str) -> None:
        self.model = fastvq.load(run, device=device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        format = self.model.config.example_format
        pixels = torch.cat([IMAGES.read(path, format, None) for path in batch["path"]])
        return {"path": batch["path"], "indices": self.model.encode(pixels).cpu().numpy().astype(np.int32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for Parquet files, one row an image")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker")
    options = parser.parse_args()

    paths = [str(path.resolve()) for path in data_files(options.folder, IMAGES)]
    indices = ray.data.from_items([{"path": path} for path in paths]).map_batches(
        Tokenizer,
        fn_constructor_args=(str(options.run.resolve()), "cuda" if options.gpus else "cpu"),
        batch_size=64,
        concurrency=options.workers,
        num_gpus=options.gpus,
    )
    indices.write_parquet(str(options.out.resolve()))
    print(f"{len(paths)} images: {options.out}")


if __name__ == "__main__":
    main()
