"""A run's model as ONNX files: signals to indices, and indices to signals."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvq.errors import ConfigError, first_line
from fastvq.extras import require
from fastvq.files import StrPath
from fastvq.models import VQVAE

from .outputs import check_ending
from .trained import TrainedModel, load

_CHECKED = 4
"""Signals that the files are checked with."""


class _Encode(nn.Module):
    """Signals, float32, to indices."""

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.vqvae = vqvae

    def forward(self, images: Tensor) -> Tensor:
        return self.vqvae.encode(images)


class _Decode(nn.Module):
    """Indices to signals, float32 in their range."""

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.vqvae = vqvae

    def forward(self, indices: Tensor) -> Tensor:
        return self.vqvae.restore(indices)


def export_run(run: StrPath, out: StrPath) -> list[str]:
    """Write a run's model as two ONNX files, check them in onnxruntime if it is installed, and return lines to print.

    Args:
        run: folder of a run, or of a checkpoint.
        out: a name that ends in .onnx. NAME-encode.onnx takes signals (B, C, *size), float32, such as images
            (B, C, H, W) in [0, 1], of the size that the model learned from, and returns indices; NAME-decode.onnx takes
            these and returns signals. B is free.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
        ConfigError: another ending of `out`; the run has no bottleneck, or one that has no ONNX form.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    check_ending(out, [".onnx"])
    onnx = require("fastvq.onnx", "onnx")
    model = load(run)
    if model.config.without_indices:
        raise ConfigError(f"{run} {model.config.without_indices}, between two halves of a network")
    out = Path(out)
    paths = [out.with_name(f"{out.stem}-{part}.onnx") for part in ("encode", "decode")]
    generator = torch.Generator().manual_seed(0)
    shape = model.config.example_format.shape
    low, high = model.vqvae.value_range
    x = low + (high - low) * torch.rand(_CHECKED, *shape, generator=generator)
    many = model.modality.noun[1]
    indices = model.encode(x)
    parts: list[tuple[nn.Module, Tensor, str, str]] = [
        (_Encode(model.vqvae), x[:2], many.split()[-1], "indices"),
        (_Decode(model.vqvae), indices[:2], "indices", many.split()[-1]),
    ]
    for path, (module, example, given, returned) in zip(paths, parts, strict=True):
        try:
            with _torch_is_silent():
                onnx.export(module.eval(), example, path, input_names=[given], output_names=[returned])
        except torch.onnx.OnnxExporterError as error:
            kind = type(model.vqvae.bottleneck).__name__
            raise ConfigError(f"{run}, whose quantizer is {kind}, has no ONNX form: {_cause(error)}") from error
    lines = [
        f"{paths[0]}: {many} (B, {', '.join(map(str, shape))}), float32 in [{low:g}, {high:g}] -> indices"
        f" ({', '.join(map(str, ('B', *indices.shape[1:])))})",
        f"{paths[1]}: indices -> {many}",
    ]
    return [*lines, _checked(model, paths, x, indices)]


def _cause(error: Exception) -> str:
    """Return the first line of what made the exporter fail: its own message says no more than that it did."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _torch_is_silent() -> Iterator[None]:
    """Keep torch's exporter from warning about packages that no run needs, and about torch itself."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _checked(model: TrainedModel, paths: list[Path], x: Tensor, indices: Tensor) -> str:
    """Return a line on how the files' results compare with those of the model."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "not checked: onnxruntime is missing"
    found = torch.from_numpy(_run(paths[0], x.numpy()))
    decoded = torch.from_numpy(_run(paths[1], indices.numpy()))
    equal = (found == indices).double().mean().item()
    difference = (decoded - model.decode(indices)).abs().max().item()
    return (
        f"checked in onnxruntime on {len(x)} {model.modality.noun[1]} of noise: {equal:.1%} of the indices are equal,"
        f" decoded ones differ by at most {difference:.1e}"
    )


def _run(path: Path, given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = require("onnxruntime", "onnx").InferenceSession(str(path))
    (result,) = session.run(None, {session.get_inputs()[0].name: given})
    return np.asarray(result)
