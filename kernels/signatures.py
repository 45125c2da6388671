"""Types of the kernels' arguments, by name, for compiling ahead of time."""

from __future__ import annotations

from typing import Any

INTEGERS = ("n", "size", "dim", "root", "padded", "splits", "parts", "part_codes", "tiles_a_split", "stages", "slots")
POINTERS = {
    "scalars": "fp64", "norms": "fp64", "hashes": "i64", "table": "i32", "maxima": "i32", "high": "fp16",
    "low": "fp16", "folded": "fp16",
    "row_high": "fp16", "row_low": "fp16", "half": "fp32", "measured": "fp32", "partial": "fp32",
    "partial_index": "i32", "residual": "fp32",
    "listed": "i32", "listed_count": "i32", "work": "i32", "count": "i32", "out": "i64",
}  # fmt: skip
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}

Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]
"""A kernel, the types of its arguments, its constants, and how it is launched and looked at: see `kernels/aot.py`."""

ONES = {"arch": ["sm_90"]}
"""For cases whose sizes are 1, which Triton takes for constants: that they compile is the same everywhere."""


def case(kernel: Any, constants: dict[str, Any], options: dict[str, Any], *, dtype: str = "float32") -> Case:
    """Return the case of a kernel of the search for x and codebook of `dtype`, with the constants that it takes."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    wide = "fp64" if dtype == "float64" else "fp32"
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in INTEGERS:
            types[name] = "i32"
        elif name in ("x", "codebook"):
            types[name] = "*" + TYPES[dtype]
        elif name in ("center", "sums"):
            types[name] = "*" + wide
        else:
            types[name] = "*" + POINTERS[name]
    return kernel, types, constants, options
