"""The commands behind `fastvq bench`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from fastvq.backends import devices
from fastvq.errors import BenchError, WrongResultError
from fastvq.files import write_whole

from . import model
from .data import DATA, Shape, from_file
from .gpu import report as gpu_report
from .measure import measure_search
from .report import DOCUMENT, SEARCH_HEADERS, search_rows, table, write_report
from .suite import ceilings, machine, run_suite

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bench_shape(
    sizes: tuple[int, int, int],
    *,
    dtype: str = "float32",
    data: str = "clustered",
    device: str = "cpu",
    threads: int | None = None,
    json_path: Path | None = None,
) -> list[str]:
    """Time the search of N vectors among K codes of D dimensions, and return the lines to print.

    Raises:
        BenchError: an invalid argument, by name; or fastvq itself returns a wrong index.
    """
    shape = _shape(sizes, dtype)
    if threads is not None and threads < 1:
        raise BenchError(f"threads: must be at least 1, got {threads}")
    place = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    x, codebook = _vectors(data, shape)
    x, codebook = x.to(place, DTYPES[dtype]), codebook.to(place, DTYPES[dtype])
    try:
        contestants = measure_search(shape, x, codebook)
    except WrongResultError as error:
        raise BenchError(str(error)) from error
    record = {**shape._asdict(), "data": data, "dtype": dtype, "contestants": contestants}
    if json_path is not None:
        document = {"machine": machine(_command()), "ceilings": ceilings(torch.get_num_threads()), "search": [record]}
        _write_json(json_path, document)
    title = f"{shape} {dtype} {data}, {torch.get_num_threads()} threads"
    result = [title if place.type == "cpu" else f"{title}, {place}", "", table(search_rows(record), SEARCH_HEADERS)]
    if place.type == "cuda":
        result += model.beside_measured(torch.cuda.get_device_name(place), shape, contestants, DTYPES[dtype].itemsize)
    return result


def model_shape(
    name: str,
    sizes: tuple[int, int, int],
    *,
    dtype: str = "float32",
    uncertified_share: float = model.UNCERTIFIED_SHARE,
    json_path: Path | None = None,
) -> list[str]:
    """Predict the time of the same search on a GPU, which need not be present, and return the lines to print.

    Raises:
        BenchError: an invalid argument, by name; or no counts to predict from.
    """
    shape = _shape(sizes, dtype)
    predicted = model.predict(name, shape, uncertified_share=uncertified_share, element=DTYPES[dtype].itemsize)
    if json_path is not None:
        _write_json(json_path, predicted)
    return model.lines(predicted)


def _shape(sizes: tuple[int, int, int], dtype: str) -> Shape:
    for name, size in zip("nkd", sizes, strict=True):
        if size < 1:
            raise BenchError(f"{name}: must be at least 1, got {size}")
    if dtype not in DTYPES:
        raise BenchError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return Shape(*sizes)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_whole(path, json.dumps(document, indent=1) + "\n")


def _vectors(data: str, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    if data in DATA:
        return DATA[data](shape)
    if not data.endswith(".npy"):
        raise BenchError(f"data: must be {', '.join(DATA)} or the path of an .npy file, got {data!r}")
    return from_file(Path(data), shape)


def _device(name: str) -> torch.device:
    try:
        return devices.usable_device(name)
    except ValueError as error:
        raise BenchError(str(error)) from None


def write_suite(folder: Path, readme: Path | None) -> list[str]:
    """Run the suite and write its results and report to `folder`.

    Raises:
        BenchError: fastvq returns a wrong index.
    """
    try:
        document = run_suite(command=_command())
    except WrongResultError as error:
        raise BenchError(str(error)) from error
    return [f"written: {path}" for path in write_report(document, folder, readme)]


def render(folder: Path, readme: Path | None) -> list[str]:
    """Write the reports in `folder` again: that of the suite, and that of a run on a GPU, from the results of each.

    Raises:
        BenchError: nothing to render, or the run on a GPU was a rehearsal.
    """
    suite, gpu = folder / DOCUMENT, folder / gpu_report.SOURCE
    if not suite.exists() and not gpu.exists():
        out = shlex.quote(str(folder))
        raise BenchError(
            f"render: {suite} doesn't exist; fastvq bench --suite --out {out} makes it. Nor does {gpu}, by make gpu"
        )
    written = write_report(json.loads(suite.read_text()), folder, readme) if suite.exists() else []
    if gpu.exists():
        document = json.loads(gpu.read_text())
        if document["rehearsal"]:
            raise BenchError(f"render: {gpu} is a rehearsal on a CPU, which has no figure of a GPU")
        target = folder / gpu_report.TARGET
        write_whole(target, gpu_report.page(document))
        written.append(target)
    return [f"written: {path}" for path in written]


def _command() -> str:
    return shlex.join(["fastvq", *sys.argv[1:]])
