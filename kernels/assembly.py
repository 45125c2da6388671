"""Compiled kernels: registers, spills, matrix instructions, and the arithmetic of its loops."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

Record = dict[str, Any]
"""A compiled kernel: its name, target and configuration, its limits, and its counts."""


class Target(NamedTuple):
    """A GPU as the compiler and the launcher see it; sizes in bytes, `unit` is an SM or a compute unit."""

    backend: str
    arch: int | str
    lanes: int
    matrix: str
    fused: str
    block_shared: int
    unit_shared: int
    reserved_shared: int
    unit_registers: int
    register_step: int
    unit_warps: int
    unit_blocks: int
    optional: bool = False
    named_only: bool = False
    """Only the cases that name it are compiled for it."""


_TO_STACK = re.compile(r"(STL|LDL)\b|scratch_")
_NVIDIA_FUSED, _AMD_FUSED = r"DFMA", r"v_(pk_)?fmac?_f64\w*"
# Registers are a lane's in all four parts of a unit together. NVIDIA: CUDA C++ Programming Guide, technical
# specifications by compute capability; a warp gets them 256 at a time. AMD: 4 x 512 on CDNA3 (CDNA3 ISA guide); on
# RDNA3, where a unit is a work-group processor, 4 x 1536 in wave32 (LLVM, AMDGPU usage).
TARGETS = {
    "sm_80": Target("cuda", 80, 32, r"HMMA", _NVIDIA_FUSED, 163 << 10, 164 << 10, 1 << 10, 65536 // 32, 8, 64, 32),
    "sm_86": Target(
        "cuda", 86, 32, r"HMMA", _NVIDIA_FUSED, 99 << 10, 100 << 10, 1 << 10, 65536 // 32, 8, 48, 16, named_only=True
    ),
    "sm_90": Target("cuda", 90, 32, r"HGMMA", _NVIDIA_FUSED, 227 << 10, 228 << 10, 1 << 10, 65536 // 32, 8, 64, 32),
    "sm_100": Target(
        "cuda", 100, 32, r"UTC\w*MMA|HMMA", _NVIDIA_FUSED, 227 << 10, 228 << 10, 1 << 10, 65536 // 32, 8, 64, 32
    ),
    "gfx942": Target("hip", "gfx942", 64, r"v_mfma_\w+", _AMD_FUSED, 64 << 10, 64 << 10, 0, 4 * 512, 8, 32, 32),
    "gfx1100": Target(
        "hip", "gfx1100", 32, r"v_wmma_\w+", _AMD_FUSED, 64 << 10, 128 << 10, 0, 4 * 1536, 24, 64, 32, True, True
    ),
}
TENSOR_MEMORY = 512
"""Columns of an SM of sm_100; a block holds what it has allocated to its end."""

ALU = frozenset(
    "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FMNMX FMNMX3 FSETP FSET FSEL IADD IADD3 IMAD IABS IMNMX VIMNMX VIMNMX3 VIADD "  # noqa: SIM905
    "VIADDMNMX ISETP SEL LEA LOP3 PLOP3 SHF SHL SHR PRMT MOV CS2R HADD2 HMUL2 HFMA2 HMNMX2 HSETP2 HSET2 I2F I2FP F2F "
    "F2FP F2I SGXT BMSK P2R R2P".split()
)
"""Instructions of a thread's own lanes, each counted once. Memory, barriers, matrix units, the uniform path aren't."""
HALF_RATE = ALU - frozenset("FFMA FADD FMUL FFMA2 FADD2 FMUL2 IMAD MOV CS2R HADD2 HMUL2 HFMA2".split())  # noqa: SIM905
"""Instructions that an SM issues at 64 lanes a clock instead of 128: comparison, minimum, maximum, selection, integer
sums, logic and shifts. CUDA C++ Programming Guide, throughput of native arithmetic instructions."""


class Instruction(NamedTuple):
    """An instruction of a program: its name, the place that it jumps to, and whether the next one can follow it."""

    name: str
    jump: int | None
    falls_through: bool


_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_ENDS = ("EXIT", "RET", "BRX", "JMX")


def read_sass(text: str, *, calls_leave: bool = False) -> list[Instruction]:
    """Return the program that `cuobjdump -sass` shows.

    With `calls_leave`, a guarded call over one instruction is a branch, which is how ptxas leaves nvcc's loops on
    sm_80. Otherwise calls return.
    """
    found = _SASS.findall(text)
    places = {int(address, 16): place for place, (address, *_) in enumerate(found)}
    program = []
    for place, (_, guard, name, operands) in enumerate(found):
        jump = None
        if name.startswith(("BRA", "CALL")):
            addresses = re.findall(r"0x([0-9a-f]+)", operands)
            jump = places.get(int(addresses[-1], 16)) if addresses else None
            if name.startswith("CALL") and not (calls_leave and guard and jump == place + 2):
                jump = None
        # BRA.U UP0 and BRA.DIV are conditional without a guard.
        certain = not guard and not re.search(r"U?P\d|UR\d", operands)
        ends = (name.split(".")[0] in _ENDS and not guard) or (jump is not None and certain)
        program.append(Instruction(name, jump, not ends))
    return program


def read_amd(text: str) -> list[Instruction]:
    """Return the program of an AMD kernel's assembly."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.split(".Lfunc_end", 1)[0].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+|flat_\w+)\b(.*)", line):
            lines.append((found[1], found[2].split(";")[0].strip()))
    program = []
    for name, operands in lines:
        jump = labels.get(operands) if name.startswith(("s_branch", "s_cbranch")) else None
        program.append(Instruction(name, jump, name not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return program


def natural_loops(program: list[Instruction]) -> list[frozenset[int]]:
    """Return the places of each loop's instructions.

    A loop is everything that reaches a jump back to a place that dominates the jump. Compilers move rare code out of a
    loop's range of addresses and jump back into its middle, so ranges of addresses do not suffice.
    """
    starts = {0, *(i.jump for i in program if i.jump is not None)}
    starts |= {place + 1 for place, i in enumerate(program) if i.jump is not None or not i.falls_through}
    ordered = sorted(start for start in starts if start < len(program))
    ends = [*(start - 1 for start in ordered[1:]), len(program) - 1]
    block_of = {start: b for b, start in enumerate(ordered)}
    follow = [{block_of[i.jump]} if i.jump is not None else set() for i in (program[end] for end in ends)]
    for b, end in enumerate(ends[:-1]):
        if program[end].falls_through:
            follow[b].add(b + 1)
    reached = _closure({0}, follow)
    before: list[set[int]] = [set() for _ in ordered]
    for b in reached:
        for n in follow[b]:
            before[n].add(b)
    dominators = {b: set(reached) for b in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            common = set.intersection(*(dominators[p] for p in before[b])) | {b}
            changed |= common != dominators[b]
            dominators[b] = common
    bodies: dict[int, set[int]] = {}
    for b in reached:
        for head in follow[b] & dominators[b]:
            bodies.setdefault(head, {head}).update(_closure({b}, before, stop=head))
    return [frozenset(place for b in body for place in range(ordered[b], ends[b] + 1)) for body in bodies.values()]


def _closure(found: set[int], edges: list[set[int]], stop: int = -1) -> set[int]:
    seen, todo = set(found), list(found - {stop})
    while todo:
        for n in edges[todo.pop()]:
            if n not in seen:
                seen.add(n)
                if n != stop:
                    todo.append(n)
    return seen


def products(name: str, config: dict[str, Any]) -> float:
    """Multiplications of one matrix instruction, divided by the warps that take part in it."""
    if found := re.search(r"MMA\.64x(\d+)x(\d+)", name):
        return 64 * int(found[1]) * int(found[2]) / 4
    if found := re.search(r"HMMA\.(16)(8)(16|8)\b", name) or re.search(r"_(\d+)x(\d+)x(\d+)", name):
        return int(found[1]) * int(found[2]) * int(found[3])
    # The shape of a UTCHMMA is in its operands; one thread issues it for the block.
    return min(config["BLOCK_N"], 128) * min(config["BLOCK_K"], 256) * 16 / config["num_warps"]


def scan_counts(program: list[Instruction], record: Record) -> Record:
    """Return the counts per distance of the innermost loop with a matrix instruction.

    These are ALU instructions, those at half rate, columns of the product, and moves to and from the stack. Where that
    loop takes a code in chunks, they are those of the loop around it, with as many turns of the inner one as its
    product needs.
    """
    config, spec = record["config"], TARGETS[record["target"]]
    loops = sorted(natural_loops(program), key=len)
    inner = next((loop for loop in loops if any(re.match(spec.matrix, program[p].name) for p in loop)), None)
    if inner is None:
        return {}
    around = next((loop for loop in loops if loop > inner), inner)

    def count(places: Iterable[int]) -> tuple[float, float, float, float]:
        names = [program[p].name for p in places]
        stems = [name.split(".")[0] for name in names]
        matrix = sum(products(name, config) for name in names if re.match(spec.matrix, name))
        moves = sum(bool(_TO_STACK.match(name)) for name in names)
        if spec.backend == "hip":
            return sum(n.startswith("v_") and not re.match(spec.matrix, n) for n in names), 0, matrix, moves
        return sum(s in ALU for s in stems), sum(s in HALF_RATE for s in stems), matrix, moves

    per_warp = config["BLOCK_N"] * config["BLOCK_K"] / config["num_warps"]
    body, rest, turns = count(inner), (0.0, 0.0, 0.0, 0.0), 1
    if config.get("CHUNKS", 1) > 1:
        rest = count(around - inner)
        whole = per_warp * config["CHUNKS"] * config["BLOCK_D"] * config.get("TERMS", 1)
        turns = max(1, math.ceil((whole - rest[2]) / body[2] - 1e-6))
    alu, half_rate, matrix = (turns * b + r for b, r in zip(body[:3], rest[:3], strict=True))
    distances = per_warp / spec.lanes
    counts = {"alu": round(alu / distances, 3), "columns": round(matrix / per_warp, 1)}
    counts["loop_spills"] = round(body[3] + rest[3])
    return counts if spec.backend == "hip" else counts | {"half_rate": round(half_rate / distances, 3)}


def is_scan(record: Record) -> bool:
    """Return whether its loop scans codes."""
    return record["matrix"] and {"BLOCK_N", "BLOCK_K"} <= record["config"].keys()


def measure_sass(usage: str, sass: str, record: Record) -> Record:
    """Return what `cuobjdump -res-usage` and `-sass` report about a kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump shows no resource usage: {usage!r}")
    program = read_sass(sass)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": sum(bool(_TO_STACK.match(i.name)) for i in program),
        **_of_program(program, record),
    }


def measure_amd(assembly: str, record: Record) -> Record:
    """Return what an AMD kernel's assembly and its metadata report."""

    def of(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s*(\d+)", assembly, re.M)
        if found is None:
            raise ValueError(f"the assembly's metadata has no .{name}")
        return int(found[1])

    return {
        "registers": of("vgpr_count"),
        "stack": of("private_segment_fixed_size"),
        # Scalar registers spill to lanes of vector registers, not to memory.
        "spills": of("vgpr_spill_count"),
        **_of_program(read_amd(assembly), record),
    }


def _of_program(program: list[Instruction], record: Record) -> Record:
    spec = TARGETS[record["target"]]
    matrix = collections.Counter(i.name for i in program if re.match(spec.matrix, i.name))
    counts = scan_counts(program, record) if is_scan(record) else {}
    return {
        "instructions": len(program),
        "matrix_instructions": dict(sorted(matrix.items())),
        "fused": sum(bool(re.fullmatch(spec.fused, i.name.split(".")[0])) for i in program),
        **counts,
    }


def occupancy(record: Record) -> tuple[int, int]:
    """(blocks, warps) that an SM or compute unit holds at a time."""
    spec = TARGETS[record["target"]]
    warps = record["threads"] // spec.lanes
    registers = -(-record["registers"] // spec.register_step) * spec.register_step
    limits = [spec.unit_blocks, spec.unit_warps // warps]
    if registers:
        # On NVIDIA a warp's registers come from one of four parts; AMD's waves likewise live in one of four SIMDs.
        limits.append(4 * (spec.unit_registers // 4 // registers) // warps)
    if shared := record["shared"] + spec.reserved_shared:
        limits.append(spec.unit_shared // shared)
    if record.get("tensor_memory"):
        limits.append(TENSOR_MEMORY // record["tensor_memory"])
    return min(limits), min(limits) * warps
