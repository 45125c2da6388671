"""Demos on the data sets that ship with the package: train, measure and show the results on one page.

images.py       VQ-VAE, prior, samples and small files of the shipped images
ladder.py       PCA, autoencoder, VAE, VQ-VAE and Gumbel dVAE of the shipped images
video.py        the same of the shipped clips
text.py         emoji from their captions
audio.py        a codec of the shipped loops, its prior, samples, continuations, and rates.py, beside Opus and Codec2
sizes.py        held-out images or clips as files of every format
page.py         index.html                folder.py  where a demo writes, and what it replaces
parts.py        announcements, and settings with fewer steps

A demo NAME is a module of this name with `run_demo(folder, *, resume, overwrite, **steps)`, which returns the content
of its metrics.json, or None if it was interrupted, and a line in `DEMOS`. `steps` are numbers of steps, by name.
"""

from __future__ import annotations

DEMOS: dict[str, str] = {
    "images": "a VQ-VAE of Fashion-MNIST, its prior, samples and small files; 7 minutes on 2 cores",
    "ladder": "from PCA to the VQ-VAE: five models of Fashion-MNIST; 7 minutes on 2 cores",
    "text": "emoji from their captions: a VQ-VAE, a prior of text and a contrastive model; 10 minutes on 2 cores",
    "audio": "a codec of music loops, its prior, samples, and quality beside Opus; 5 minutes on 2 cores",
    "video": "a VQ-VAE of animated emoji, its prior, samples in motion and small files; 7 minutes on 2 cores",
}
"""The demos by name, with what each does; importing this imports no torch."""
