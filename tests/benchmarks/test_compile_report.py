"""The compile report: its reading of machine code, its model on small cases, and the report on every kernel."""

import copy
import json
import os
import subprocess
import sys

import pytest

from benchmarks import budgets, calibrate, compile_report, model, sass

# A loop with a guard inside, one within another, code after the last exit that jumps back, the end's padding.
HOPPER = """
        Function : forward
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000ff00000000800 */
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0050*/              @!P0 BRA 0x80 ;
        /*0060*/                   FFMA R4, R5, UR4, -R6 ;
        /*0070*/                   SHFL.BFLY PT, R7, R4, 0x1, 0x1f ;
        /*0080*/                   MUFU.EX2 R8, R4 ;
        /*0090*/               @P1 STL [R1+0x4], R8 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   NOP ;
        /*00c0*/              @!P2 BRA 0x20 ;
        /*00d0*/               @P3 BRA `(.L_x_1) ;
        /*00e0*/                   BRA 0x10 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0110*/                   BRA 0x20 ;
        /*0120*/                   BRA 0x120;
"""
CDNA = """
forward:
; %bb.0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_1:                                ; %loop
	v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
	v_exp_f32_e32 v20, v20
	v_add_f32_dpp v1, v1, v1 row_shr:1 row_mask:0xf bank_mask:0xf
	ds_bpermute_b32 v2, v3, v4
	scratch_store_dword off, v5, s32 offset:4
	s_waitcnt lgkmcnt(0)
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	.section	.AMDGPU.csdata
	v_exp_f32_e32 v20, v20
"""


def test_hopper_loops_and_classes():
    instructions = sass.parse_nvidia(HOPPER)
    outer, inner = sass.loops(instructions)
    assert (outer.first, outer.last, outer.innermost, outer.depth) == (0x10, 0xE0, False, 0)
    assert (inner.first, inner.last, inner.innermost, inner.depth) == (0x20, 0xC0, True, 1)
    expected = {"tensor": 2, "mufu": 1, "fma": 1, "shuffle": 1, "local": 1, "memory": 0, "other": 4}
    assert inner.counts == expected  # other: ARRIVE, DEPBAR and two branches; NOP is not work
    assert outer.counts == dict.fromkeys(expected, 0) | {"fma": 1, "other": 2}
    assert inner.macs_per_warp == 2 * 64 * 128 * 16 // 4
    assert [i.opcode for i in sass.outside(instructions, [outer])] == [
        "LDC",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT",
        "BRA",
        "BRA",
    ]


def test_cdna_loops_and_classes():
    (loop,) = sass.loops(sass.parse_amd(CDNA))
    assert loop.counts == {"tensor": 1, "mufu": 1, "fma": 1, "shuffle": 2, "local": 1, "memory": 0, "other": 2}
    assert sass.operations(loop.body, "fma") == 2  # packed
    assert loop.macs_per_warp == 32 * 32 * 8


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "tensor"), ("UTCHMMA.2CTA", "tensor"), ("LDSM.16.M88.4", "memory"),
        ("LDGSTS.E.BYPASS.128", "memory"), ("LDL.64", "local"), ("FFMA2", "fma"), ("FMNMX", "other"),
        ("global_load_dwordx4", "memory"), ("v_fmac_f32_e32", "fma"), ("v_max_f32_e32", "other"), ("s_nop", None),
    ],
)  # fmt: skip
def test_class_of_an_instruction(opcode, kind):
    assert sass.kind_of(opcode) == kind


@pytest.mark.parametrize(
    ("opcode", "forbidden"),
    [
        ("HMMA.1688.F32.TF32", True), ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU", True), ("RED.E.ADD.STRONG.GPU", True),
        ("global_atomic_add_f32", True), ("v_mfma_f32_32x32x4_xf32", True), ("REDUX.SUM", False), ("ATOMS.CAS", False),
        ("ATOMG.E.EXCH.STRONG.GPU", False),
    ],
)  # fmt: skip
def test_forbidden_instructions(opcode, forbidden):
    assert sass.forbidden(sass.Instruction(0, opcode, "")) == forbidden


def test_serialised_matmuls():
    def loop(*opcodes):
        body = tuple(sass.Instruction(16 * i, opcode, "") for i, opcode in enumerate(opcodes))
        return sass.Loop(0, 16 * len(body), body, True, 0)

    matmul, wait = "HGMMA.64x64x16.F32", "WARPGROUP.DEPBAR.LE"
    assert sass.serialised(loop(*(matmul, wait) * 8))
    assert not sass.serialised(loop(*(matmul,) * 8, wait))


@pytest.mark.parametrize(("bm", "bn"), [(128, 64), (64, 128), (32, 128), (128, 128)])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (500, 500), (100, 612)])
def test_tiles_of_the_causal_triangle(bm, bn, queries, keys):
    """Counted pair by pair."""
    offset = keys - queries

    def count(rows, columns, row_tile, column_tile):  # of one block of rows or of keys: whole tiles, others
        whole = partly = 0
        for first in range(0, columns, column_tile):
            tile = [row_tile(i, j) for i in rows for j in range(first, first + column_tile)]
            whole += all(tile)
            partly += any(tile) and not all(tile)
        return whole, partly

    for block in range(-(-queries // bm)):
        rows = range(block * bm, block * bm + bm)
        expected = count(rows, keys, lambda t, s: s < keys and s <= t + offset, bn)
        assert model.forward_tiles(block, queries, keys, offset, bm, bn) == expected
    for block in range(-(-keys // bn)):
        modelled = model.column_tiles(block, queries, keys, offset, bm, bn)
        first = max(0, block * bn - offset)  # the kernel's tiles begin at the first query that sees the block
        tiles = range(first, queries, bm)
        seen = [
            all(t < queries and s <= t + offset for t in range(m, m + bm) for s in (block * bn + bn - 1,))
            for m in tiles
        ]
        assert modelled == (sum(seen), len(seen) - sum(seen))


def test_residency():
    hopper = model.CARDS["sm_90"]
    assert model.resident(255, 100 * 1024, 8, hopper) == 1  # registers
    assert model.resident(128, 100 * 1024, 4, hopper) == 2  # shared memory
    assert model.resident(32, 0, 4, hopper) == 16  # threads and registers
    assert model.resident(32, 228 * 1024, 4, hopper) == 0
    assert model.resident(128, 100 * 1024, 4, model.CARDS["sm_89"]) == 0
    assert model.resident(128, 80 * 1024, 4, model.CARDS["gfx942"]) == 0


def test_every_target_has_its_card():
    aot = pytest.importorskip("benchmarks.aot")
    assert set(aot.TARGETS) <= set(model.CARDS)


def test_every_cuda_target_has_an_assembler_with_a_version():
    aot = pytest.importorskip("benchmarks.aot")
    text = aot.assemblers()
    named = [word.rstrip(",") for word in text.split() if word.startswith("sm_")]
    assert sorted(named) == sorted(name for name in aot.TARGETS if name.startswith("sm_"))
    assert all(part.split(" for ")[0].count(".") == 2 for part in text.split(", "))


def test_clocks_with_matmuls_are_longer():
    idle, busy = model.seconds(1000, 0), model.seconds(1000, 1000 * 2048)
    assert idle == 1000 / 1.83e9
    assert busy / idle == pytest.approx(989 / 716, rel=1e-3)
    assert model.seconds(1000, 500 * 2048) == pytest.approx((idle + busy) / 2)
    assert model.seconds(1000, 2000 * 2048) == busy  # a matmul that is left to other code


def test_time_of_waves_and_memory():
    assert model.makespan([3, 3, 2, 1], 2) == 5
    one = model.model([1.0] * 132, 1, 0, 0)
    more = model.model([1.0] * 133, 1, 0, 0)
    assert (round(one.total, 6), one.bound) == (1, "multiprocessors")
    assert (round(more.total, 6), more.bound) == (2, "waves")
    assert model.model([0.0], 1, 6e12, 0)[4:] == (2, "HBM")


def test_what_fails_a_run():
    def budget(status, value):
        return {"name": "b", "limit": 1, "value": value, "status": status}

    def document(status, value, instructions=10.0):
        loops = [{"role": "main", "per_element": instructions}]
        return {
            "versions": {"triton": "3"},
            "budgets": [budget(status, value)],
            "binaries": {"case": [{"loops": loops}]},
        }

    complaints = compile_report.complaints
    assert not complaints(document("met", 1), None)
    assert complaints(document("missed", 2), None)
    assert not complaints(document("missed, known", 2), None)
    assert not complaints(document("missed, known", 2.01), document("missed, known", 2))
    assert complaints(document("missed, known", 2.1), document("missed, known", 2))
    assert complaints(document("missed, known", 2), document("met", 1))
    assert complaints(document("met", 1, 10.5), document("met", 1))
    other = copy.deepcopy(document("met", 1)) | {"versions": {"triton": "4"}}
    assert not complaints(document("missed, known", 2, 10.5), other)


def test_known_misses_say_what_was_tried():
    assert all(budget.tried for budget in budgets.BUDGETS if budget.bound)


def test_committed_report_has_every_budget_and_case():
    by_version = json.loads((compile_report.RESULTS / "compile.json").read_text())
    for version, committed in by_version.items():
        assert committed["versions"]["triton"] == version
        assert [b["name"] for b in committed["budgets"]] == [b.name for b in budgets.BUDGETS]
        assert list(committed["binaries"]) == [case.name for case in compile_report.CASES]
        assert not [b for b in committed["budgets"] if b["status"] == "missed"]


def test_report_of_two_versions():
    def document(triton, spilled, status):
        budget = {"name": "spilled bytes", "limit": 0, "source": "binary", "value": spilled, "status": status}
        loop = {"role": "main", "instructions": dict.fromkeys(sass.CLASSES, 1), "per_element": 2.0, "matmul": ["HGMMA"]}
        loops = [loop | {"cycles": 2165, "busiest": "tensor 49%"}, loop | {"matmul": ["UTCHMMA"]}]  # played, and not
        record = {"kernel": "forward", "config": [128, 64, 8, 3], "registers": 211, "spilled_bytes": spilled}
        record |= {"shared_bytes": 131072, "shape": {}, "resident": 1, "loops": loops}
        band = f"{budgets.BAND} / band / T 8192"
        times = dict.fromkeys(("processors", "quantised", "hbm", "l2"), 1.0) | {"total": 45.65, "bound": "HBM"}
        versions = {"triton": triton, "ptxas": "1.2"}
        return {"versions": versions, "shapes": "", "budgets": [budget], "binaries": {"case": [record]}} | {
            "modelled": {band: times}
        }

    text = compile_report.markdown([document("3.6.0", 16, "missed, known"), document("3.9.0", 0, "met")])
    assert "| budget | limit | from | Triton 3.6.0 | Triton 3.9.0 |" in text
    assert "| spilled bytes | 0 | binary | 16, missed, known | 0, met |" in text
    assert "| HGMMA | 2165 | tensor 49% |" in text
    assert "| UTCHMMA |  |  |" in text
    assert text.count("| 8192 | 45.6 | 913 | 5.0% |") == 2
    assert calibrate.error() in text


# Every case of the target that the budgets are for, and on every target and head size the one that takes most
# registers; the whole report, four minutes on two cores, is a command.
@pytest.mark.slow
@pytest.mark.parametrize("only", ["sm_90 D128 bfloat16", "causal: attention + WAAD + FAI"])
def test_compiled_kernels_keep_their_budgets(only):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--workers", "2", "--only", only]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Sm90:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Sm90())
from attnstats import *
from attnstats.core.arguments import resolve
from attnstats.core.options import Options
from attnstats.triton import backend
from attnstats.triton.launch import launching_with

def warm_up(launch, arguments):
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    launch.kernel.run(grid=(launch.programs,), warmup=True, **arguments, **launch.constants, **options)
    print(launch.kernel.__name__)

statistics = (WAAD(10), FAI(10, 100), Received(), Entropy())
query = torch.empty(1, 8, 512, 128, dtype=torch.bfloat16)
geometry = resolve(query, query, query, Options(statistics=statistics))
with launching_with(warm_up):
    backend.attend(query, query, query, geometry)
    backend.from_lse(query, query, torch.zeros(1, 8, 512), geometry)
"""


def test_tritons_launcher_takes_the_arguments(monkeypatch):
    """Up to the launch itself: binding, specialisation and cache key of groups and of tuples of functions."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["forward", "column", "band", "forward", "column"], run.stderr[-1500:]
