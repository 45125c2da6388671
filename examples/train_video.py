"""Train a VQ-VAE of video and the prior over its indices on the clips that ship with fastvq, and sample new clips.

python examples/train_video.py [--steps 600] [--prior-steps 400] [--run runs/video]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import fastvq
from fastvq.errors import FastvqError
from fastvq.modalities import VideoConfig, modality_of
from fastvq.runs.train_prior import train_prior
from fastvq.training import PriorConfig, Trainer, load_examples
from fastvq.training.checkpoint import checkpoint_folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prior-steps", type=int, default=400)
    parser.add_argument("--run", type=Path, default=Path("runs/video"))
    options = parser.parse_args()

    config = VideoConfig(steps=options.steps)
    clips = load_examples(config)
    # A run or prior that is there already is continued: a finished one is only loaded.
    trainer = Trainer(config, clips, options.run, resume=bool(checkpoint_folders(options.run)))
    evaluation = trainer.fit()
    if evaluation is None:
        sys.exit("stopped, saved; the same command continues")
    print(f"held-out clips: {evaluation.value:.2f} dB")

    trained = train_prior(options.run, PriorConfig(steps=options.prior_steps, batch_size=16), resume=True)
    if trained is None:
        sys.exit("stopped, saved; the same command continues")
    uniform = math.log2(config.codebook_size)
    print(f"held-out clips: {trained.bits_per_index:.2f} bits per index; a uniform prior has {uniform:.2f}")

    model = fastvq.load(options.run)
    # The first frame alone is a still image, and has the indices that it has within the clip.
    indices, first = model.encode(clips.test), model.encode(clips.test[:, :, :1])
    print(f"clips {tuple(clips.test.shape)} become indices {tuple(indices.shape)}")
    print(f"equal indices of first frames: {(indices[:, :1] == first).float().mean():.1%}")

    video = modality_of("video")
    signals = {"original": clips.test / 255, "decoded": model.decode(indices)}
    video.play(options.run / "decoded.webp", signals, config, "webp")
    video.play(options.run / "samples.gif", {"sampled": model.sample(12, seed=0, temperature=0.9)}, config, "gif")
    print(f"in motion: {options.run / 'decoded.webp'}, {options.run / 'samples.gif'}")


if __name__ == "__main__":
    try:
        main()
    except FastvqError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
