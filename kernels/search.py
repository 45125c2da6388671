"""Certified search on matrix units.

    scan        scores of all codes for a block of rows, one float16 product or three; best, second best, bound
    certify     write rows whose two are further apart than twice the bound; list the others for the next scan
    define      search the remaining rows by the definition

The scan itself is in scan.py, the bound in rows.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .certify import certify
from .define import _define
from .frame import FOLD_COLUMNS, MAXIMA, SCALARS, USABLE, Frame, columns_of, prepare
from .numbers import split
from .rows import _rows, listed_rows, measure, scaled_rows
from .scan import best_two
from .signatures import ONES, Case, case

MOST_ROWS = 2**30
"""Largest number of rows in one launch, because row numbers are int32; more rows take several launches."""
LARGEST = 2**31 - 2**26
"""Largest number of codes, because their numbers and those of the padding are int32."""
MOST_HEADS = 2**16 - 1
"""Largest number of heads in one launch: the limit of the last axis of a grid."""
SCRATCH = 2**28
"""Bytes for rows in float16 that are written for a scan; more rows are taken in turn."""


@triton.jit
def _scan(
    x, row_high, row_low, measured, codebook, listed, listed_count, center, scalars, norms, maxima, high, low, half,
    folded, out, work, count, partial, partial_index, n, size, dim, root, padded, tiles_a_split,
    LISTED: tl.constexpr, TERMS: tl.constexpr, BESIDE: tl.constexpr, L2: tl.constexpr, WIDE: tl.constexpr,
    SPLIT: tl.constexpr, PREPARED: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the codes.

    x (H, n, dim), or where PREPARED what `_rows` wrote; listed (H, n) the rows to take, where LISTED, of which
    listed_count (H,) are there. Where SPLIT, partial (H, splits, 2, n) float32 takes best and second best,
    partial_index (H, splits, n) int32 the code and measured (H, 3, n) the bound; else rows are certified here.
    """
    split_id, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place, rows, there, any_there = listed_rows(listed, listed_count, head, n, LISTED, BLOCK_N)
    if any_there == 0:
        return
    scalars += head * SCALARS
    columns: tl.constexpr = CHUNKS * BLOCK_D
    inner = tl.arange(0, BLOCK_D)
    measured += head * 3 * n + place
    at = (head * n + rows) * dim
    if PREPARED:
        bound = tl.load(measured, there, other=0.0)
        far_floor = tl.load(measured + n, there, other=0.0)
        shrink = tl.load(measured + 2 * n, there, other=1.0)
        row_at = (head * n + place)[:, None] * columns + inner[None, :]
        y_high, y_low = row_high + row_at, row_low + row_at
        if CHUNKS == 1:
            y_high = tl.load(y_high, there[:, None], other=0.0)
            y_low = y_high
            if TERMS == 3:
                y_low = tl.load(row_low + row_at, there[:, None], other=0.0)
    else:
        scale, shrink, bound, far_floor = measure(
            x, at, there, center + head * dim, scalars, maxima + head * MAXIMA, dim, root, TERMS, WIDE, BLOCK_N
        )
        y = scaled_rows(x, at, there, center + head * dim, inner, dim, scale)
        if TERMS == 1 and not BESIDE:
            y = tl.where(((inner >= dim) & (inner < dim + FOLD_COLUMNS))[None, :], -shrink[:, None], y)
        y_high, y_low, _, _ = split(y)
    first_tile = split_id * tiles_a_split
    last_tile = tl.minimum(first_tile + tiles_a_split, padded // BLOCK_K)
    place_of_codes = head * padded
    best, second, index = best_two(
        y_high, y_low, shrink, there, high + place_of_codes * columns, low + place_of_codes * columns,
        half + place_of_codes, folded + place_of_codes * 16, first_tile, last_tile,
        TERMS, BESIDE, PREPARED and CHUNKS > 1, PAIRED, BLOCK_N, BLOCK_K, BLOCK_D, CHUNKS, STAGES,
    )  # fmt: skip

    if SPLIT:
        slot = (head * tl.num_programs(1) + split_id) * n + place
        tl.store(partial + 2 * (head * tl.num_programs(1) + split_id) * n + place, best, there)
        tl.store(partial + (2 * (head * tl.num_programs(1) + split_id) + 1) * n + place, second, there)
        tl.store(partial_index + slot, index, there)
        if split_id == 0:
            tl.store(measured, bound, there)
            tl.store(measured + n, far_floor, there)
    else:
        usable = tl.load(scalars + USABLE).to(tl.int32) + tl.zeros([BLOCK_N], tl.int32)
        certify(
            best, second, index, bound, far_floor, there, rows, at, x, codebook + head * size * dim,
            norms + head * 2 * size, size, dim, usable, out + head * n, work + head * n, count + head,
            PAIRED, L2, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _merge(
    x, codebook, listed, listed_count, scalars, norms, partial, partial_index, measured, out, work, count,
    n, size, dim, splits,
    LISTED: tl.constexpr, L2: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Certifies rows whose codes were split among programs."""
    head = tl.program_id(1).to(tl.int64)
    place, rows, there, any_there = listed_rows(listed, listed_count, head, n, LISTED, BLOCK_N)
    if any_there == 0:
        return
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second = best
    index = tl.zeros([BLOCK_N], tl.int32)
    for s in range(splits):
        slot = head * splits + s
        value = tl.load(partial + 2 * slot * n + place, there, other=float("-inf"))
        runner_up = tl.load(partial + (2 * slot + 1) * n + place, there, other=float("-inf"))
        code = tl.load(partial_index + slot * n + place, there, other=0)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, value))
        index = tl.where(value > best, code, index)
        best = tl.maximum(best, value)
    bound = tl.load(measured + head * 3 * n + place, there, other=0.0)
    far_floor = tl.load(measured + (head * 3 + 1) * n + place, there, other=0.0)
    usable = tl.load(scalars + head * SCALARS + USABLE).to(tl.int32) + tl.zeros([BLOCK_N], tl.int32)
    certify(
        best, second, index, bound, far_floor, there, rows, (head * n + rows) * dim, x, codebook + head * size * dim,
        norms + head * 2 * size, size, dim, usable, out + head * n, work + head * n, count + head, PAIRED, L2, BLOCK_N,
    )  # fmt: skip


def search(x: Tensor, codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Implement `fastvq.search`. Nothing here waits for the device."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    most = _most_rows(x.shape[0] if x.dim() == 3 else 1, x.shape[-1])
    if x.shape[-2] > most:
        parts = [search(part, codebook, metric=metric) for part in x.split(most, dim=-2)]
        return torch.cat(parts, dim=-1)
    if x.dim() == 3 and x.shape[0] > MOST_HEADS:
        heads = zip(x.split(MOST_HEADS), codebook.split(MOST_HEADS), strict=True)
        return torch.cat([search(*part, metric=metric) for part in heads])
    rows = x.contiguous().view(-1, *x.shape[-2:])
    codes = codebook.contiguous().view(-1, *codebook.shape[-2:])
    with torch.cuda.device_of(x):
        _search(rows, codes, indices.view(rows.shape[:2]), metric)
    return indices


def _most_rows(heads: int, dim: int) -> int:
    columns = columns_of(dim)
    if columns <= LONGEST_IN_REGISTERS:
        return MOST_ROWS
    # Both scans, the second with two parts.
    return max(LEAST_ROWS, SCRATCH // (6 * columns * heads))


def _search(x: Tensor, codebook: Tensor, out: Tensor, metric: str) -> None:
    heads, n, dim = x.shape
    size = codebook.shape[1]
    if size > LARGEST:
        raise ValueError(f"codebook: the Triton kernels take up to {LARGEST} codes, got {size}")
    l2, wide = metric == "l2", torch.float64 in (x.dtype, codebook.dtype)
    columns = columns_of(dim)
    first, second = (launch.scan(x.device, columns, terms) for terms in (1, 3))
    tuning = launch.autotuning(x.device)
    frame = prepare(codebook, metric=metric, wide=wide, block_codes=TUNED_PADDING if tuning else first.block_k)
    if tuning:
        key = f"{launch.architecture(x.device)} {_name(x.device)} N=2^{n.bit_length()} K=2^{size.bit_length()} D={dim}"
        first = launch.tuned(
            f"{key} H={heads} {metric} {x.dtype} {codebook.dtype}",
            first,
            lambda config: _seconds(x, codebook, frame, config, l2, wide),
        )
    open_rows = _work_list(x)
    _tier(x, codebook, frame, out, None, open_rows, 1, first, l2, wide)
    left = _work_list(x)
    _tier(x, codebook, frame, out, open_rows, left, 3, second, l2, wide)
    define = launch.DEFINE
    _define[(min(n, define.programs), heads)](
        x, codebook, frame.norms, *left, out, n, size, dim, L2=l2, WIDE=wide, BLOCK_K=define.block_k,
        BLOCK_D=define.block_d, num_warps=define.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


TUNED_PADDING = 256
"""Codes are padded to a multiple of that where several tile sizes are tried."""


def _name(device: torch.device) -> str:
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _seconds(x: Tensor, codebook: Tensor, frame: Frame, config: launch.Scan, l2: bool, wide: bool) -> float:
    out = x.new_empty(x.shape[:2], dtype=torch.int64)

    def scan() -> None:
        _tier(x, codebook, frame, out, None, _work_list(x), 1, config, l2, wide)

    return triton.testing.do_bench(scan, warmup=5, rep=20, return_mode="median")


Listed = tuple[Tensor, Tensor]
"""Rows (H, n), of which the first (H,) count."""


def _work_list(x: Tensor) -> Listed:
    heads, n, _ = x.shape
    rows = x.new_empty(heads, n, dtype=torch.int32)
    return rows, x.new_zeros(heads, dtype=torch.int32)


def _tier(
    x: Tensor, codebook: Tensor, frame: Frame, out: Tensor, listed: Listed | None, work: Listed, terms: int,
    tier: launch.Scan, l2: bool, wide: bool,
) -> None:  # fmt: skip
    """Scan all rows, or the listed ones, and append the uncertified ones to `work`."""
    heads, n, dim = x.shape
    size = codebook.shape[1]
    padded, columns = frame.high.shape[1:]
    tiles, rest = divmod(padded, tier.block_k)
    assert rest == 0, f"codes are padded to {padded}, no multiple of {tier}"
    blocks = triton.cdiv(n, tier.block_n)
    # Of a list's length the host knows nothing. It is short, mostly, and then few programs would do all the work.
    splits = launch.splits(x.device, heads * triton.cdiv(blocks, 1 if listed is None else LISTED_SHARE), tiles)
    rows, row_count = listed or work
    prepared = columns > min(tier.block_d, LONGEST_IN_REGISTERS)
    split_n = n if splits > 1 else 0
    measured = x.new_empty(heads, 3, n if prepared else split_n, dtype=torch.float32)
    row_high = x.new_empty(heads, n if prepared else 0, columns, dtype=torch.float16)
    row_low = x.new_empty(heads, n if prepared and terms == 3 else 0, columns, dtype=torch.float16)
    options = {"LISTED": listed is not None, "TERMS": terms, "WIDE": wide}
    # Two codes are told apart in float32, which holds no float64 vector.
    paired = tier.paired and not wide
    root = launch.root_of(dim)
    if prepared:
        _rows[(triton.cdiv(n, 32), heads)](
            x, rows, row_count, frame.center, frame.scalars, frame.maxima, row_high, row_low, measured, n, dim, root,
            **options, BLOCK_N=32, BLOCK_D=tier.block_d, CHUNKS=columns // tier.block_d, num_warps=4,
        )  # fmt: skip
    partial = x.new_empty(heads, splits, 2, split_n, dtype=torch.float32)
    partial_index = x.new_empty(heads, splits, split_n, dtype=torch.int32)
    _scan[(blocks, splits, heads)](
        x, row_high, row_low, measured, codebook, rows, row_count, frame.center, frame.scalars, frame.norms,
        frame.maxima, frame.high, frame.low, frame.half, frame.folded, out, *work, partial, partial_index, n, size, dim,
        root, padded, triton.cdiv(tiles, splits), **options, BESIDE=frame.beside, L2=l2, SPLIT=splits > 1,
        PREPARED=prepared, PAIRED=paired, BLOCK_N=tier.block_n, BLOCK_K=tier.block_k, BLOCK_D=tier.block_d,
        CHUNKS=columns // tier.block_d, STAGES=tier.num_stages, num_warps=tier.num_warps,
    )  # fmt: skip
    if splits > 1:
        _merge[(triton.cdiv(n, 128), heads)](
            x, codebook, rows, row_count, frame.scalars, frame.norms, partial, partial_index, measured, out, *work,
            n, size, dim, splits, LISTED=listed is not None, L2=l2, PAIRED=paired, BLOCK_N=128, num_warps=4,
        )  # fmt: skip


LONGEST_IN_REGISTERS = 128
"""Most columns of rows that a scan scales and splits itself; another kernel first writes longer ones in float16."""
LEAST_ROWS = 4096
"""Smallest number of rows in one launch, however long the rows are."""
LISTED_SHARE = 32
"""One row in this number is expected in a work list; the number of programs follows from it."""


def aot_cases() -> list[Case]:
    """For `kernels/aot.py`: every configuration of `launch.SCANS`, where it is shipped."""
    cases = []
    for architecture, scans in launch.SCANS.items():
        if architecture != "interpreter":
            for (terms, most), config in scans.items():
                columns = min(most, 512)
                cases.append(_case(architecture, terms, columns, config, "float32", split=False))
                if columns == 64:
                    cases.append(_case(architecture, terms, columns, config, "bfloat16", split=True))
    merge = {"LISTED": False, "L2": True, "PAIRED": True, "BLOCK_N": 128}
    smallest = _case("sm_80", 1, 16, launch.SCANS["sm_80"][1, 16], "float32", split=True)
    constants = {**smallest[2], "n": 1, "size": 1, "dim": 1, "tiles_a_split": 1}
    options = {"num_warps": 4}
    return [
        *cases,
        case(_scan, constants, {"num_warps": 8} | ONES),
        case(_merge, merge, options),
        case(_merge, {**merge, "n": 1, "size": 1, "dim": 1}, options | ONES),
    ]


def _case(architecture: str, terms: int, columns: int, config: launch.Scan, dtype: str, *, split: bool) -> Case:
    constants = {
        "LISTED": terms == 3, "TERMS": terms, "BESIDE": columns > 32, "L2": True, "WIDE": False, "SPLIT": split,
        "PREPARED": columns > min(config.block_d, LONGEST_IN_REGISTERS), "PAIRED": config.paired,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_D": config.block_d,
        "CHUNKS": columns // config.block_d, "STAGES": config.num_stages,
    }  # fmt: skip
    # Rows after the first scan are a small part of the work: their kernel may keep a little on the stack.
    options = {"num_warps": config.num_warps, "hot": terms == 1, "matrix": True, "arch": [architecture]}
    return case(_scan, constants, options, dtype=dtype)
