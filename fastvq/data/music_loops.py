"""Short pieces of music and single sounds, in the package.

130 of the samples of Sonic Pi, all in the public domain by CC0 1.0 (see music_loops.LICENSE), 247 seconds in all. From
Debian's package sonic-pi-samples 3.2.2 those files were taken whose license its copyright file states by name. They
were mixed down to mono, resampled to 16 kHz by soxr in its best quality, rounded to 14 bits, so that the two lowest of
16 bits are zero, and stored as FLAC files of level 8 in one archive without further compression.

A class is what stands before the first underscore of a name, such as drum or bass.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from fastvq.files import StrPath

from .audio_format import AudioFormat
from .audio_io import SOUNDS, read_audio
from .examples import Examples
from .registry import LOOPS, LOOPS_SETTINGS

SHIPPED = Path(__file__).with_name("music_loops.zip")
_EACH, _HELD_OUT = 8, 3
"""Divisor and remainder: the files of a class whose number by name leaves this remainder are held out."""
CLASSES = {
    "ambi": "ambience",
    "bass": "bass",
    "bd": "bass drum",
    "drum": "drum",
    "elec": "electric",
    "guit": "guitar",
    "loop": "loop",
    "misc": "other",
    "perc": "percussion",
    "sn": "snare",
    "tabla": "tabla",
    "vinyl": "vinyl",
}
"""Names of the classes by the beginning of the names of files."""


def load_music_loops(path: StrPath = SHIPPED) -> Examples:
    """Return all files as clips (N, 1, 20480), int16 at 16 kHz; an eighth of the files of each class is held out.

    Raises:
        MissingExtraError: soundfile is not installed.
    """
    target = AudioFormat(LOOPS_SETTINGS["sample_rate"], LOOPS_SETTINGS["channels"], LOOPS_SETTINGS["clip_length"])
    with zipfile.ZipFile(path) as archive:
        clips = {name: read_audio(name, target, archive.read(name)) for name in sorted(archive.namelist())}
    files: dict[str, list[str]] = {}
    for name in clips:
        files.setdefault(name.partition("_")[0], []).append(name)
    test = [name for own in files.values() for name in own[_HELD_OUT::_EACH]]
    train = [name for name in clips if name not in test]
    numbers = {beginning: number for number, beginning in enumerate(CLASSES)}
    labels = {
        name: torch.full((len(own),), numbers[name.partition("_")[0]], dtype=torch.int64) for name, own in clips.items()
    }
    return Examples(
        name=LOOPS,
        train=torch.cat([clips[name] for name in train]),
        test=torch.cat([clips[name] for name in test]),
        test_names=tuple(name.removesuffix(".flac") for name in test for _ in clips[name]),
        train_labels=torch.cat([labels[name] for name in train]),
        test_labels=torch.cat([labels[name] for name in test]),
        class_names=tuple(CLASSES.values()),
        noun=SOUNDS.noun,
    )
