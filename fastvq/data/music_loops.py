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


def load_music_loops(
    path: StrPath = SHIPPED, *, name: str = LOOPS, length: int = LOOPS_SETTINGS["clip_length"]
) -> Examples:
    """Return all files as clips (N, 1, length), int16 at 16 kHz; an eighth of the files of each class is held out.

    Args:
        path: archive of the files.
        name: name of the data set.
        length: samples of a clip.

    Raises:
        MissingExtraError: soundfile is not installed.
    """
    target = AudioFormat(LOOPS_SETTINGS["sample_rate"], LOOPS_SETTINGS["channels"], length)
    with zipfile.ZipFile(path) as archive:
        clips = {file: read_audio(file, target, archive.read(file)) for file in sorted(archive.namelist())}
    files: dict[str, list[str]] = {}
    for file in clips:
        files.setdefault(file.partition("_")[0], []).append(file)
    test = [file for own in files.values() for file in own[_HELD_OUT::_EACH]]
    train = [file for file in clips if file not in test]
    numbers = {beginning: number for number, beginning in enumerate(CLASSES)}
    labels = {
        file: torch.full((len(own),), numbers[file.partition("_")[0]], dtype=torch.int64) for file, own in clips.items()
    }
    return Examples(
        name=name,
        train=torch.cat([clips[file] for file in train]),
        test=torch.cat([clips[file] for file in test]),
        test_names=tuple(file.removesuffix(".flac") for file in test for _ in clips[file]),
        train_labels=torch.cat([labels[file] for file in train]),
        test_labels=torch.cat([labels[file] for file in test]),
        class_names=tuple(CLASSES.values()),
        noun=SOUNDS.noun,
    )
