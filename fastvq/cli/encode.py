"""`fastvq encode`: images, or an array of indices, to a small file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.errors import CodingError

SUMMARY = "write the indices of images, or of an array, to a small file"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Writes the indices of images, or of an array, to a small file. Images are scaled and cropped to the square"
        " that the run's model was trained on; the file keeps their order, not their names."
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="IN",
        help="an image, a folder of images, held-out (the run's held-out images), or an .npy file of indices",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        dest="run_folder",
        help="the run whose model encodes the images, or that the indices in an .npy file belong to",
    )
    parser.add_argument(
        "--model",
        default="adaptive",
        help="probability model of the indices: adaptive, static, or prior, the run's own (default: %(default)s)",
    )
    parser.add_argument(
        "--codebook-size", type=int, help="K for an .npy file (default: the run's, or the largest index + 1)"
    )


def run(options: argparse.Namespace) -> int:
    """Encode images or an array."""
    from fastvq.runs.encode import encode_array, encode_images

    if options.source.suffix == ".npy":
        lines = encode_array(
            options.source, options.out, options.codebook_size, model=options.model, run=options.run_folder
        )
    elif options.run_folder is None:
        raise CodingError("--run: needed to encode images, by the model of that run")
    else:
        lines = encode_images(options.run_folder, options.source, options.out, model=options.model)
    print("\n".join(lines))
    return 0
