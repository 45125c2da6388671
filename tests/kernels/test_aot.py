"""The compile gate reads machine code correctly, and each of its checks fails where it should.

Records are made up for it, and kernels are compiled in processes of their own, since this one may be interpreting.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from fastvq.kernels import aot, assembly

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton isn't installed")

USAGE = """Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:16
 Function _scan:
  REG:198 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# A loop over tiles (0020 to 0120) that waits out of line (0170): two matrix instructions, three ALU instructions of
# which two at half rate, one move from the stack.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                            /* 0x000fc40008011410 */
        /*0010*/                   STL [R1], R4 ;                            /* 0x0000000401007387 */
        /*0020*/                   HGMMA.64x128x16.F32 R24, R104, gdesc[UR20], RZ, !UPT ;  /* 0x01e0 */
        /*0030*/              @!P0 BRA 0x170 ;                               /* 0x0000004000b08947 */
        /*0040*/                   HGMMA.64x128x16.F32 R24, R108, gdesc[UR20], R24, gsb0 ;  /* 0x01e0 */
        /*0050*/                   FMNMX R5, R24, R25, !PT ;                 /* 0x0000001918057209 */
        /*0060*/                   LDL R4, [R1] ;                            /* 0x0000000001047983 */
        /*0070*/              @!P1 FMNMX.FTZ R6, R26, R27, !PT ;             /* 0x0000001918057209 */
        /*0080*/                   FFMA R7, R5, R6, R7 ;                     /* 0x0000001918057209 */
        /*0120*/               @P2 BRA 0x20 ;                                /* 0xfffffff000340947 */
        /*0130*/                   DFMA R2, R4, R6, R2 ;                     /* 0x0000000604027229 */
        /*0140*/                   EXIT ;                                    /* 0x000000000000794d */
        /*0150*/                   NOP ;                                     /* 0x0000000000007918 */
        /*0170*/              @!P0 BRA 0x170 ;                               /* 0xfffffffc00f88947 */
        /*0180*/                   BRA 0x40 ;                                /* 0xffffffbc00447947 */
        /*0190*/                   BRA 0x190;                                /* 0xfffffffc00fc7947 */
"""

AMD = """
	.globl	_scan
_scan:                                  ; @_scan
	s_branch .LBB0_1
.LBB0_1:
	v_mov_b32_e32 v1, 0
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_f16 v[2:17], v[80:81], v[34:35], 0
	v_mfma_f32_32x32x8_f16 v[2:17], v[82:83], v[38:39], v[2:17]
	v_max_f32_e32 v1, v2, v3
	scratch_load_dword v4, off, s32
	ds_read_b64 v[80:81], v5
	s_waitcnt lgkmcnt(0)
	v_pk_max_f16 v1, v1, v4
	s_cbranch_scc1 .LBB0_2
; %bb.3:
	v_fma_f64 v[0:1], v[2:3], v[4:5], v[0:1]
	s_endpgm
.Lfunc_end0:
	v_not_in_the_program v0
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 1
    .vgpr_count:     250
    .vgpr_spill_count: 2
"""


def record(**other):
    """Return the record of a sound scan on sm_90."""
    config = {
        "BLOCK_N": 128,
        "BLOCK_K": 64,
        "BLOCK_D": 32,
        "TERMS": 1,
        "CHUNKS": 1,
        "num_warps": 4,
        "types": "fp32 i32",
    }
    return {
        "kernel": "_scan", "config": config, "target": "sm_90", "hot": True, "matrix": True, "exact": False,
        "threads": 128, "registers": 128, "shared": 50_000, "stack": 0, "spills": 0, "declared": 0, "fused": 0,
        "matrix_instructions": {"HGMMA.64x64x16.F32": 4}, "alu": 2.5, "half_rate": 2.25, "columns": 32.0,
        "loop_spills": 0,
    } | other  # fmt: skip


class TestReading:
    def test_a_kernel_of_nvidia(self):
        config = {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 32, "num_warps": 4}
        found = assembly.measure_sass(USAGE, SASS, record(config=config))
        assert (found["registers"], found["stack"], found["spills"], found["fused"]) == (198, 8, 2, 1)
        assert found["matrix_instructions"] == {"HGMMA.64x128x16.F32": 2}
        # 64 x 128 distances by 128 lanes: 64 each; two products of 16 columns each.
        assert (found["alu"], found["half_rate"], found["columns"]) == (round(3 / 64, 3), round(2 / 64, 3), 32.0)
        assert found["loop_spills"] == 1

    def test_a_kernel_of_amd(self):
        config = {"BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_D": 16, "num_warps": 1}
        found = assembly.measure_amd(AMD, record(config=config, target="gfx942"))
        assert (found["registers"], found["stack"], found["spills"], found["fused"]) == (250, 12, 2, 1)
        assert found["matrix_instructions"] == {"v_mfma_f32_32x32x8_f16": 2}
        assert (found["alu"], found["columns"], found["loop_spills"]) == (round(2 / 16, 3), 16.0, 1)
        assert "half_rate" not in found
        assert "v_not_in_the_program" not in [i.name for i in assembly.read_amd(AMD)]

    def test_what_stands_out_of_line_belongs_to_the_loop_and_a_jump_back_into_its_middle_makes_none(self):
        program = assembly.read_sass(SASS)
        loops = sorted(assembly.natural_loops(program), key=len)
        waits, scan = loops
        assert [program[p].name for p in waits] == ["BRA"]
        assert waits < scan
        assert {"EXIT", "DFMA", "STL"}.isdisjoint(program[p].name for p in scan)
        assert len(scan) == 10

    @pytest.mark.parametrize(
        ("line", "jump", "falls_through"),
        [
            ("@P0 BRA 0x10", 0, True),
            ("BRA.U !UP0, 0x10", 0, True),
            ("BRA P1, 0x10", 0, True),
            ("BRA 0x10", 0, False),
            ("@!P1 EXIT", None, True),
            ("EXIT", None, False),
            ("RET.REL.NODEC R2 0x0", None, False),
            ("CALL.REL.NOINC 0x10", None, True),
        ],
    )
    def test_which_instruction_comes_next(self, line, jump, falls_through):
        _, instruction = assembly.read_sass(f"/*0010*/  FADD R1, R1, R1 ; /* 0x0 */\n/*0020*/  {line} ; /* 0x0 */")
        assert (instruction.jump, instruction.falls_through) == (jump, falls_through)

    def test_a_guarded_call_over_an_instruction_leaves_a_loop(self):
        lines = ["FADD R1, R1, R1", "@P2 CALL.REL.NOINC 0x30", "BRA 0x0", "CALL.REL.NOINC 0x50", "EXIT", "RET R2 0x0"]
        sass = "\n".join(f"/*{16 * i:04x}*/   {line} ; /* 0x0 */" for i, line in enumerate(lines))
        assert [i.jump for i in assembly.read_sass(sass)] == [None, None, 0, None, None, None]
        leaving = assembly.read_sass(sass, calls_leave=True)
        assert [i.jump for i in leaving] == [None, 3, 0, None, None, None]
        assert assembly.natural_loops(leaving) == [frozenset({0, 1, 2})]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("HMMA.16816.F32", 16 * 8 * 16),
            ("HMMA.1688.F32.TF32", 16 * 8 * 8),
            ("HGMMA.64x64x16.F32", 64 * 64 * 16 / 4),
            ("UTCHMMA", 128 * 64 * 16 / 4),
            ("v_mfma_f32_32x32x8_f16", 32 * 32 * 8),
            ("v_wmma_f32_16x16x16_f16", 16**3),
        ],
    )
    def test_products_of_a_matrix_instruction(self, name, expected):
        assert assembly.products(name, record()["config"]) == expected

    def test_chunks_count_as_often_as_they_are_taken(self):
        """A loop of one chunk in a loop over tiles: 4 chunks of 16 columns, one of them peeled off."""
        lines = ["FADD R1, R1, R1", "HMMA.16816.F32 R0, R1, R2, R0", "FMUL R2, R2, R2", "HMMA.16816.F32 R0, R1, R2, R0"]
        lines += ["@P0 BRA 0x20", "FMNMX R5, R0, R1, !PT", "@P1 BRA 0x0", "EXIT"]
        sass = "\n".join(f"/*{16 * i:04x}*/   {line} ; /* 0x0 */" for i, line in enumerate(lines))
        config = {"BLOCK_N": 16, "BLOCK_K": 8, "BLOCK_D": 16, "CHUNKS": 4, "TERMS": 1, "num_warps": 1}
        found = assembly.scan_counts(assembly.read_sass(sass), record(config=config, target="sm_80"))
        assert found["columns"] == 64
        assert found["alu"] == (1 + 3 * 1 + 1) / 4

    def test_what_a_module_launches(self):
        text = "def f(x):\n    _a[(1, 2)](x, K=1)\n    b[0]\n    _c[grid](x)\n    d['k'] = g(x)\n    e.h[1](x)"
        assert aot.launched(text) == {"_a", "_c"}


class TestOccupancy:
    @pytest.mark.parametrize(
        ("other", "blocks"),
        [
            ({}, 4),
            ({"registers": 255}, 2),
            ({"shared": 1_000, "registers": 32}, 16),
            ({"shared": 0, "registers": 16}, 16),
            ({"shared": 0, "registers": 16, "threads": 32}, 32),
            ({"shared": 100_000}, 2),
            ({"target": "sm_100", "tensor_memory": 256}, 2),
            ({"target": "gfx942", "threads": 256, "registers": 128, "shared": 1_000}, 4),
            ({"target": "gfx942", "threads": 256, "registers": 129, "shared": 1_000}, 3),
            ({"target": "gfx942", "threads": 256, "registers": 40, "shared": 40_000}, 1),
            ({"target": "gfx1100", "threads": 128, "registers": 256, "shared": 1_000}, 5),
            ({"registers": 255, "threads": 512}, 0),
        ],
    )
    def test_blocks_of_a_unit(self, other, blocks):
        made = record(**other)
        assert assembly.occupancy(made) == (blocks, blocks * made["threads"] // assembly.TARGETS[made["target"]].lanes)


class TestFaults:
    def test_a_sound_kernel_has_none(self):
        assert aot.faults(record()) == []

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"spills": 6, "stack": 24, "loop_spills": 2}, "spills: 6 moves, 2 of them in the loop, 24 bytes of stack"),
            ({"stack": 8, "declared": 2}, "8 bytes of stack, 2 declared by the code"),
            ({"shared": 240_000}, "takes 240000 bytes of shared memory, a block has 232448"),
            ({"matrix_instructions": {}}, "has no matrix instruction (HGMMA)"),
            ({"exact": True, "fused": 3}, "has 3 fused float64 operations"),
            ({"registers": 255, "threads": 512}, "255 registers for 512 threads: no block fits"),
            ({"error": "ValueError: no"}, "doesn't compile: ValueError: no"),
        ],
    )
    def test_each_check_fails_by_name(self, other, message):
        (fault,) = aot.faults(record(**other))
        assert message in fault
        assert fault.startswith("sm_90: _scan BLOCK_N=128 ")

    def test_a_scan_whose_loop_has_no_matrix_instruction(self):
        made = record()
        del made["alu"]
        assert "has no loop with a matrix instruction" in aot.faults(made)[0]

    def test_a_kernel_that_is_not_hot_may_spill(self):
        assert aot.faults(record(hot=False, spills=6, stack=24)) == []


class TestStoredCounts:
    def test_what_is_written_is_what_is_read(self):
        records = [record(), record(target="sm_80", alu=2.75), record(kernel="_other", hot=False, spills=3)]
        text = aot.dump(records, "3.9.0")
        stored = json.loads(text)
        assert aot.differences(stored["records"], records, stored["triton"]) == []
        assert aot.dump(records, "3.9.0") == text
        assert len(text.splitlines()) == len(records) + 2

    @pytest.mark.parametrize("what", ["alu", "half_rate", "registers", "shared", "columns"])
    def test_a_tenth_more_is_let_through_and_an_eighth_is_not(self, what):
        old = record()
        assert aot.differences([old], [record(**{what: old[what] * 1.09})], "3.9.0") == []
        for factor in (0.875, 1.125):
            (found,) = aot.differences([old], [record(**{what: old[what] * factor})], "3.9.0")
            assert f"{what} is {old[what] * factor}, but {old[what]} in counts.json, stored with triton 3.9.0" in found

    def test_a_first_spill_is_a_change(self):
        assert "spills is 2, but 0" in aot.differences([record()], [record(spills=2)], "3.9.0")[0]

    def test_records_that_are_missing_or_superfluous(self):
        other = record(kernel="_other")
        assert "_other BLOCK_N=128" in (found := aot.differences([record()], [record(), other], "3.9.0")[0])
        assert "isn't in counts.json" in found
        assert "is only in counts.json" in aot.differences([record(), other], [record()], "3.9.0")[0]


CASES = """
import os
import triton
import triton.language as tl

@triton.jit
def sound(a, b, out, COLUMNS: tl.constexpr):
    i, d = tl.arange(0, 64), tl.arange(0, COLUMNS)
    product = tl.dot(tl.load(a + i[:, None] * COLUMNS + d[None, :]), tl.load(b + i[None, :] * COLUMNS + d[:, None]))
    tl.store(out + i, tl.max(product, 1))

@triton.jit
def spilling(a, b, out, n):
    i, d = tl.arange(0, 256), tl.arange(0, 64)
    of_column = tl.full([256, 256], float("-inf"), tl.float32)
    for _ in range(n):
        product = tl.dot(tl.load(a + i[:, None] * 64 + d[None, :]), tl.load(b + i[None, :] * 64 + d[:, None]))
        of_column = tl.maximum(of_column, product * n)
        b += 256 * 64
    tl.store(out + i[:, None] * 256 + i[None, :], of_column)

@triton.jit
def summing(x, out):
    i = tl.arange(0, 128)
    total = tl.load(out + i)
    for j in range(8):
        value = tl.load(x + 128 * j + i)
        total = total + value * value
    tl.store(out + i, total)

@triton.jit
def wrong(x):
    tl.store(x, tl.load(x).to(tl.int32, bitcast=True))

def never_runs(x):
    forgotten[(1,)](x)
    sound[(1,)](x)

class Fatal:
    __name__ = "fatal"
    arg_names = property(lambda self: os._exit(1))

def aot_cases():
    dot = dict(a="*fp16", b="*fp16", out="*fp32")
    return [
        (sound, dot, dict(COLUMNS=64), dict(num_warps=4, hot=True, matrix=True)),
        (Fatal(), {}, {}, {}),
        (sound, dot, dict(COLUMNS=64), dict(num_warps=4, hot=True, matrix=True)),
        (spilling, dot | dict(n="i32"), {}, dict(num_warps=4, hot=True, matrix=True)),
        (summing, dict(x="*fp64", out="*fp64"), {}, dict(exact=True, hot=True)),
        (summing, dict(x="*fp64", out="*fp64"), {}, dict(exact=True, enable_fp_fusion=False, arch=["sm_90"])),
        (summing, dict(x="*fp32", out="*fp32"), {}, dict(matrix=True)),
        (sound, dot, dict(COLUMNS=32), dict(num_warps=4, matrix=True, arch=["gfx942"])),
        (wrong, dict(x="*fp64"), {}, dict(arch=["sm_90", "sm_91"])),
    ]
"""


def run(*arguments):
    command = [sys.executable, "-m", "fastvq.kernels.aot", *map(str, arguments)]
    # As in the process of the tests: the compiler mustn't be taken in.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@needs_triton
class TestCompiling:
    def test_real_kernels_fail_for_what_is_wrong_with_them(self, tmp_path):
        path = tmp_path / "some_cases.py"
        path.write_text(CASES)
        done = run("--cases", path, "--target=sm_90", "--target=gfx942")
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        assert done.returncode == 1, done.stderr
        assert "TRITON_INTERPRET=1 is ignored here" in done.stderr

        def failed(*parts):
            return sum(all(part in line for part in parts) for line in failures)

        assert failed("sm_90: spilling", "spills:") == 1
        assert failed("gfx942: spilling", "spills:") == 1
        assert failed("sm_90: summing types=fp64", "fused float64") == 1
        assert failed("gfx942: summing types=fp64", "fused float64") == 1
        assert failed("sm_90: summing types=fp32", "has no matrix instruction (HGMMA)") == 1
        assert failed("sm_90: wrong", "doesn't compile", "Cannot bitcast data-type of size 64") == 1
        assert failed("case 1 of", "the compiler crashed") == 2
        assert failed("forgotten is launched, but no aot_cases() have a case of it") == 1
        assert failed("no target is named 'sm_91'") == 1
        assert failed("sound") == failed("enable_fp_fusion=0") == 0
        assert "13 compilations" in done.stdout
        assert "15 compilations by 2 workers" in done.stderr

    def test_a_module_without_cases_is_an_error(self, tmp_path):
        path = tmp_path / "no_cases.py"
        path.write_text("kernels = 0\n")
        done = run("--cases", path)
        assert done.returncode == 1
        assert f"FAILED {path}: has no aot_cases()" in done.stdout

    def test_a_part_is_never_written(self):
        done = run("--write", "--target=sm_90")
        assert done.returncode == 2
        assert "--write stores the counts of all cases on all targets" in done.stderr


def test_every_module_with_kernels_is_asked():
    names = {name.rsplit(".", 1)[1] for name in aot.modules()}
    assert names >= {"frame", "search", "residual_search", "quantize", "accumulate", "ema_update"}
    assert names.isdisjoint(aot.NO_KERNELS)
