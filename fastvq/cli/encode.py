"""`fastvq encode`: images or other data, or an array of indices, to a small file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.errors import CodingError

from .options import add_data, add_skip_unreadable, check_sources, refuse_without_effect

SUMMARY = "write the indices of images or other data, or of an array, to a small file"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Writes the indices of images, audio or video, or of an array, to a small file. They are brought to the form"
        " that the run's model was trained on; the file keeps their order, not their names."
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="IN",
        help="files and folders of files, or one .npy file of indices; none with --held-out",
    )
    parser.add_argument("out", metavar="OUT.fvq", help="file to write")
    parser.add_argument("--held-out", action="store_true", help="encode the run's held-out examples")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        dest="run_folder",
        help="the run whose model encodes the files, or that the indices in an .npy file belong to",
    )
    parser.add_argument(
        "--model",
        default="adaptive",
        help="probability model of the indices: adaptive, static, or prior, the run's own (default: %(default)s)",
    )
    parser.add_argument(
        "--codebook-size", type=int, help="K for an .npy file (default: the run's, or the largest index + 1)"
    )
    parser.add_argument(
        "--stages",
        type=int,
        metavar="N",
        help="write the indices of the first N stages of a residual quantizer alone: less space, a coarser signal",
    )
    add_data(parser)
    add_skip_unreadable(parser)


def run(options: argparse.Namespace) -> int:
    """Encode files or an array."""
    from fastvq.runs.encode import encode_array, encode_files, encode_held_out

    sources, model, skip = options.sources, options.model, options.skip_unreadable
    arrays = [source for source in sources if Path(source).suffix.lower() == ".npy"]
    check_sources(sources, held_out=options.held_out, data=options.data)
    if not options.held_out and not sources:
        raise CodingError("IN: give files, folders, an .npy file of indices, or --held-out")
    if arrays and len(sources) > 1:
        raise CodingError(f"IN: an .npy file is encoded alone, got {', '.join(sources)}")
    if not arrays and options.codebook_size is not None:
        raise CodingError("codebook_size: only for an .npy file of indices; files have the run's")
    if arrays or options.held_out:
        refuse_without_effect(options, ("skip_unreadable",), "with --held-out or an .npy file")
    if arrays and options.stages is not None:
        raise CodingError("stages: only for files that a run encodes, not for an .npy file of indices")
    if arrays:
        lines = encode_array(sources[0], options.out, options.codebook_size, model=model, run=options.run_folder)
    elif options.run_folder is None:
        raise CodingError("--run: needed to encode files, by the model of that run")
    elif options.held_out:
        lines = encode_held_out(options.run_folder, options.out, model=model, data=options.data, stages=options.stages)
    else:
        lines = encode_files(
            options.run_folder, sources, options.out, model=model, skip_unreadable=skip, stages=options.stages
        )
    print("\n".join(lines))
    return 0
