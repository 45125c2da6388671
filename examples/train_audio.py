"""Trains a small audio codec on the shipped music loops in a loop of its own, and writes what it decodes.

    python examples/train_audio.py --steps 300 --out decoded.wav

Needs soundfile: pip install "fastvq-torch[audio]". `fastvq train --data music-loops` does more; this shows the parts.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fastvq
from fastvq.data.audio_io import write_audio
from fastvq.data.examples import to_float
from fastvq.data.music_loops import load_music_loops
from fastvq.models import VQVAE, AudioDecoder, AudioEncoder
from fastvq.models.spectral import log_mel_distance, mel_loss, stft_loss

RATE, CROP = 16000, 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="decoded.wav")
    options = parser.parse_args()

    torch.manual_seed(0)
    loops = load_music_loops()
    settings: dict[str, Any] = {"strides": (2, 4, 5, 8), "width": 16}
    quantizer = fastvq.ResidualVQ(
        dim=64,
        num_quantizers=8,
        codebook_size=256,
        kmeans_init=True,
        threshold_ema_dead_code=1,
        quantize_dropout=True,
        quantize_dropout_per_item=True,  # one model for all bit rates from 0.4 to 3.2 kbit/s
    )
    model = VQVAE(AudioEncoder(1, 64, **settings), quantizer, AudioDecoder(64, 1, **settings), value_range=(-1.0, 1.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(loops.train), (8,))
        start = int(torch.randint(loops.train.shape[-1] - CROP + 1, ()))
        x = to_float(loops.train[rows, :, start : start + CROP])
        y, _, commitment = model(x)
        loss = (y - x).abs().mean() + stft_loss(y, x) + mel_loss(y, x, RATE) + 0.25 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    model.eval()
    held_out = to_float(loops.test[::4])
    indices = model.encode(held_out)  # (8, 64, 8)
    with torch.no_grad():
        for stages in (1, 2, 4, 8):
            distance = log_mel_distance(model.restore(indices[..., :stages]), held_out, RATE).mean()
            print(f"{stages} stages, {0.4 * stages:.1f} kbit/s: log-mel distance {distance:.2f} dB")
        decoded = model.restore(indices)
    write_audio(options.out, torch.cat(list(torch.cat([held_out, decoded], -1)), -1), RATE, "wav")
    print(f"each of eight clips, then as decoded: {options.out}")


if __name__ == "__main__":
    main()
