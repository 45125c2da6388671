"""`fastvq export`: a run's model as ONNX files."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write a run's model as ONNX files: signals to indices, and back"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.description = (
        "Writes a run's model as two ONNX files: OUT-encode.onnx, signals to indices, and OUT-decode.onnx, indices to"
        " signals. Both are compared with the model in onnxruntime, if that is installed."
    )
    parser.add_argument("run_folder", type=Path, metavar="DIR", help="folder of the run, or of one of its checkpoints")
    parser.add_argument("out", metavar="OUT.onnx", help="name of the files")


def run(options: argparse.Namespace) -> int:
    """Write the files."""
    from fastvq.runs.export import export_run

    print("\n".join(export_run(options.run_folder, options.out)))
    return 0
