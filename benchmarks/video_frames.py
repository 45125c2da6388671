"""Compare a run of video with a model of images that codes its frames one by one, at an equal number of bits.

python benchmarks/video_frames.py runs/clips [--out runs/frames] [--indices 16]

The images are the frames of the run's clips. Their model sees as many frames a step in as many steps, has the channels
of the run, and as many codes as give a clip the bits of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from fastvq.data import Examples
from fastvq.errors import FastvqError
from fastvq.modalities import ImageConfig, VideoConfig
from fastvq.modalities.video import frames_of
from fastvq.runs.load import load_model, run_examples
from fastvq.training import Trainer
from fastvq.training.checkpoint import checkpoint_folders


def frames_as_images(clips: Examples) -> Examples:
    """Return the frames of clips as images, split as the clips are."""
    frames = clips.train.shape[2]
    names = tuple(f"{name}/{number}" for name in clips.test_names for number in range(frames))
    return Examples(f"frames of {clips.name}", frames_of(clips.train), frames_of(clips.test), names)


def image_config(config: VideoConfig, bits: float, indices: int) -> ImageConfig:
    """Return settings of images for the frames of a run whose clips take `bits`, `indices` of them a frame."""
    shared = {field.name for field in dataclasses.fields(ImageConfig)} - {"data", "downsamples", "codebook_size"}
    own = {name: value for name, value in dataclasses.asdict(config).items() if name in shared}
    halvings = round(math.log2(config.frame_size**2 / indices) / 2)
    return ImageConfig(
        **own | {"batch_size": config.batch_size * config.frames},
        data="frames",
        image_size=config.frame_size,
        downsamples=halvings,
        codebook_size=round(2 ** (bits / config.frames / indices)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/frames"))
    parser.add_argument("--indices", type=int, default=16, help="of a frame: a square of a power of two")
    options = parser.parse_args()

    model, config = load_model(options.run)
    if not isinstance(config, VideoConfig) or not isinstance(model.codebook_size, int):
        sys.exit(f"{options.run} must be a run of video with one codebook")
    indices = math.prod(config.feature_grid)
    bits = indices * math.log2(model.codebook_size)
    print(f"{options.run}: {indices} indices and {bits:.0f} bits a clip", flush=True)
    own = image_config(config, bits, options.indices)
    clips = run_examples(options.run)
    trainer = Trainer(own, frames_as_images(clips), options.out, resume=bool(checkpoint_folders(options.out)))
    result = trainer.fit()
    if result is None:
        sys.exit("stopped, saved; the same command continues")
    taken = config.frames * options.indices * math.log2(own.codebook_size)
    print(f"{options.out}: {options.indices} of {own.codebook_size} codes a frame, {taken:.0f} bits a clip")
    print(f"held-out frames: {result.value:.2f} dB, perplexity {result.perplexity:.0f}, {trainer.seconds:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except FastvqError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
