"""Encodes and decodes a file in chunks of 80 ms, as a call would be sent, and compares with the whole file at once.

    fastvq train --out runs/loops --data music-loops
    python examples/stream_audio.py runs/loops music.wav --stages 4 --out streamed.wav

Needs soundfile and soxr: pip install "fastvq-torch[audio]".
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import fastvq
from fastvq.data.audio_io import read_signal, write_audio
from fastvq.data.examples import to_float
from fastvq.modalities import AudioConfig
from fastvq.models import StreamingDecoder, StreamingEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of audio")
    parser.add_argument("file", help="an audio file")
    parser.add_argument("--stages", type=int, help="number of residual stages to send (default: all)")
    parser.add_argument("--chunk-ms", type=float, default=80.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="streamed.wav")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    trained = fastvq.load(options.run)
    config = trained.config
    if not isinstance(config, AudioConfig):
        raise SystemExit(f"{options.run} is a run of {config.modality}, not of audio")
    signal = to_float(read_signal(options.file, config.sample_rate, config.channels))[None]
    encoder, decoder = StreamingEncoder(trained.vqvae, stages=options.stages), StreamingDecoder(trained.vqvae)

    size = round(options.chunk_ms / 1000 * config.sample_rate)
    sent, played, encoding, decoding = [], [], [], []
    for chunk in signal.split(size, -1):
        start = time.process_time()
        indices = encoder(chunk)
        middle = time.process_time()
        samples = decoder(indices)
        end = time.process_time()
        sent.append(indices)
        played.append(samples)
        encoding.append(1000 * (middle - start))
        decoding.append(1000 * (end - middle))
    last = encoder.flush()
    sent.append(last)
    played += [decoder(last), decoder.flush()]

    indices = torch.cat(sent, 1)
    whole = trained.vqvae.encode(F.pad(signal, (0, -signal.shape[-1] % encoder.stride)))
    different = int((indices != whole[..., : indices.shape[-1]]).sum())
    for name, times in (("encoder", encoding), ("decoder", decoding)):
        median = statistics.median(times)
        rate = f"{options.chunk_ms / median:.0f} x real time"
        print(f"{name}: {median:.2f} ms of processor time for {options.chunk_ms:g} ms, {rate}")
    print(f"{different} of {indices.numel()} indices differ from those of the whole file")
    write_audio(options.out, torch.cat(played, -1)[0, :, : signal.shape[-1]], config.sample_rate, "wav")
    print(f"decoded: {options.out}")


if __name__ == "__main__":
    main()
