"""The commands behind `fastvq bench`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from fastvq.backends import devices
from fastvq.errors import BenchError, WrongResultError
from fastvq.files import StrPath, write_whole

from . import model
from .data import DATA, Shape, from_file
from .gpu import report as gpu_report
from .measure import measure_search
from .report import DOCUMENT, SEARCH_HEADERS, search_rows, table, write_report
from .suite import ceilings, machine, run_suite

DEFAULT_SHAPE = Shape(16384, 1024, 64)
"""N, K and D of a benchmark that gives none."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bench_shape(
    n: int | None = None,
    k: int | None = None,
    d: int | None = None,
    *,
    dtype: str = "float32",
    data: StrPath = "clustered",
    device: str = "cpu",
    threads: int | None = None,
    json_path: StrPath | None = None,
) -> list[str]:
    """Time the search of N vectors among K codes of D dimensions, and return the lines to print.

    Args:
        n, k, d: the sizes, by default `DEFAULT_SHAPE`'s, or those of the vectors in a file: see `from_file`.
        dtype: dtype of vectors and codes.
        data: a name in `DATA`, or the path of an .npy file of vectors.
        device, threads: where the search runs, and the threads of every contestant.
        json_path: a .json file that the measurements are also written to.

    Raises:
        BenchError: an invalid argument, by name; or fastvq itself returns a wrong index.
    """
    _check(n, k, d, dtype, json_path)
    if threads is not None and threads < 1:
        raise BenchError(f"threads: must be at least 1, got {threads}")
    place = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    data = os.fspath(data)
    if data in DATA:
        x, codebook = DATA[data](_shape(n, k, d))
    elif Path(data).exists() or Path(data).suffix:
        x, codebook = from_file(data, n, k, d)
    else:
        raise BenchError(f"data: must be {', '.join(DATA)} or the path of an .npy file, got {data!r}")
    shape = Shape(len(x), *codebook.shape)
    x, codebook = x.to(place, DTYPES[dtype]), codebook.to(place, DTYPES[dtype])
    if not (x.isfinite().all() and codebook.isfinite().all()):
        raise BenchError(f"dtype: {data} holds values beyond the range of {dtype}")
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
    n: int | None = None,
    k: int | None = None,
    d: int | None = None,
    *,
    dtype: str = "float32",
    uncertified_share: float = model.UNCERTIFIED_SHARE,
    json_path: StrPath | None = None,
) -> list[str]:
    """Predict the time of the same search on a GPU, which need not be present, and return the lines to print.

    Raises:
        BenchError: an invalid argument, by name; or no counts to predict from.
    """
    _check(n, k, d, dtype, json_path)
    shape = _shape(n, k, d)
    predicted = model.predict(name, shape, uncertified_share=uncertified_share, element=DTYPES[dtype].itemsize)
    if json_path is not None:
        _write_json(json_path, predicted)
    return model.lines(predicted)


def _check(n: int | None, k: int | None, d: int | None, dtype: str, json_path: StrPath | None) -> None:
    for name, size in (("n", n), ("k", k), ("d", d)):
        if size is not None and size < 1:
            raise BenchError(f"{name}: must be at least 1, got {size}")
    if dtype not in DTYPES:
        raise BenchError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if json_path is not None and Path(json_path).suffix != ".json":
        raise BenchError(f"json_path: must end in .json, got {json_path}")


def _shape(n: int | None, k: int | None, d: int | None) -> Shape:
    return Shape(*(default if size is None else size for size, default in zip((n, k, d), DEFAULT_SHAPE, strict=True)))


def _write_json(path: StrPath, document: dict[str, Any]) -> None:
    write_whole(path, json.dumps(document, indent=1) + "\n")


def _device(name: str) -> torch.device:
    try:
        return devices.usable_device(name)
    except ValueError as error:
        raise BenchError(str(error)) from None


def write_suite(folder: StrPath, readme: StrPath | None = None) -> list[str]:
    """Run the suite and write its results and report to `folder`.

    Raises:
        BenchError: fastvq returns a wrong index.
    """
    try:
        document = run_suite(command=_command())
    except WrongResultError as error:
        raise BenchError(str(error)) from error
    return [f"written: {path}" for path in write_report(document, folder, readme)]


def render(folder: StrPath, readme: StrPath | None = None) -> list[str]:
    """Write the reports in `folder` again: that of the suite, and that of a run on a GPU, from the results of each.

    Raises:
        BenchError: nothing to render, or the run on a GPU was a rehearsal.
    """
    folder = Path(folder)
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
