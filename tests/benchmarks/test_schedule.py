"""The play of Hopper machine code on small listings: what waits for what, and what goes on beside it."""

import json

import pytest

from benchmarks import calibrate, sass, schedule

MATMUL = "HGMMA.64x128x16.F32.BF16"  # 64 clocks of the tensor cores
NONE = 0b000000_111_111_0_0001


def code(*lines):
    """Instructions from "opcode operands", or that and a dictionary of what the control bits say."""
    found = []
    for i, line in enumerate(lines):
        text, said = line if isinstance(line, tuple) else (line, {})
        opcode, _, operands = text.partition(" ")
        control = said.get("stall", 1) | said.get("sets", 7) << 5 | 7 << 8 | said.get("waits", 0) << 11
        found.append(sass.Instruction(16 * i, opcode, operands, said.get("target"), control=control))
    return found


def cycles(*lines, programs=1, warps=4):
    return schedule.play(code(*lines), programs, warps).cycles


def test_control_bits_of_an_encoding():
    listing = """
        /*29b0*/                   SHFL.BFLY PT, R121, R122, 0x1, 0x1f ;   /* 0x0c201f007a797f89 */
                                                                           /* 0x000e6400000e0000 */
        /*29c0*/                   MUFU.EX2 R206, R112 ;
    """
    shuffle, bare = sass.parse_nvidia(listing)
    assert (shuffle.control & 15, shuffle.control >> 5 & 7, shuffle.control >> 11 & 63) == (2, 1, 0)
    assert bare.control == NONE  # stall 1, no scoreboard


def test_stall_counts_and_scoreboards():
    assert cycles(("IADD3 R0", {"stall": 5}), ("IADD3 R0", {"stall": 7})) == 12
    waits = cycles(("LDS R0", {"sets": 0}), ("IADD3 R1", {"waits": 0b000001}))
    elsewhere = cycles(("LDS R0", {"sets": 1}), ("IADD3 R1", {"waits": 0b000001}))
    assert waits > 33 > elsewhere


def test_a_unit_is_shared_by_the_warps():
    exp2 = ["MUFU.EX2 R0"] * 4
    assert cycles(*exp2) == pytest.approx(32, rel=0.05)
    assert cycles(*exp2, warps=8) == pytest.approx(64, rel=0.05)  # of a program with twice as much work
    assert cycles(*exp2, programs=2) == pytest.approx(32, rel=0.05)  # of each
    one, two = cycles(("FADD R0", {"stall": 4}), warps=4), cycles(("FADD R0", {"stall": 4}), warps=8)
    assert one == two == 4  # the second fills the gaps of the first


def test_matmuls_overlap_what_comes_before_the_wait_alone():
    issue, wait = ["WARPGROUP.ARRIVE", f"{MATMUL} R24, gdesc[UR8], R24, gsb0"], ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    softmax = [("FMUL R0", {"stall": 10})] * 20
    after, before = cycles(*issue, *wait, *softmax), cycles(*issue, *softmax, *wait)
    assert after - before == pytest.approx(64 + schedule.MATMUL, abs=10)
    one_behind = cycles(*issue, *softmax, "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert one_behind == pytest.approx(before, abs=5)


def test_programs_side_by_side_overlap():
    """One fills the time in which the other waits for its matmul, unless both are bound by one unit."""
    loop = [f"{MATMUL} R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    loop += [("FMUL R0", {"stall": 10})] * 10
    alone, beside = cycles(*loop), cycles(*loop, programs=2)
    assert alone > 64 + schedule.MATMUL + 90
    assert alone / 2 <= beside < 0.8 * alone
    bound = [f"{MATMUL} R24, gdesc[UR8], R24, gsb0"] * 8 + ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    assert cycles(*bound, programs=4) == pytest.approx(8 * 64, rel=0.03)


def test_a_barrier_holds_the_warp_groups_of_a_program_together():
    work = [("FMUL R0", {"stall": 15})] * 10
    free, held = cycles(*work, warps=8), cycles(*work, "BAR.SYNC.DEFER_BLOCKING 0x0", warps=8)
    assert held - free == pytest.approx(schedule.BARRIER, abs=3)
    other_program = cycles(*work, "BAR.SYNC.DEFER_BLOCKING 0x0", warps=4, programs=2)
    assert other_program == pytest.approx(held / 2, abs=3)


def test_barriers_by_turns():
    """As in FlashAttention: a warp group issues its matmuls after the other, so one's softmax hides the other's."""
    matmuls = ["BAR.SYNC.DEFER_BLOCKING R8, 0x100", *[f"{MATMUL} R24, gdesc[UR8], R24, gsb0"] * 4]
    softmax = ["BAR.ARV R8, 0x100", "WARPGROUP.DEPBAR.LE gsb0, 0x0", *[("FMUL R0", {"stall": 10})] * 18]
    both = cycles(*matmuls, *softmax, warps=8)
    assert both == pytest.approx(2 * 4 * 64, rel=0.1)


def test_a_barrier_that_nobody_else_reaches_is_passed():
    assert cycles("BAR.SYNC.DEFER_BLOCKING 0x3, 0x100", ("FMUL R0", {"stall": 4})) < 40


@pytest.mark.parametrize(
    ("opcode", "operands", "read"),
    [
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], R24", 2 * 16 * (128 + 64)),
        ("HGMMA.64x128x16.F32.BF16", "R24, R120, gdesc[UR12].tnspB, R24, gsb0", 2 * 16 * 128),
        ("HGMMA.64x16x16.F32.BF16", "R24, gdesc[UR8], RZ, !UPT", 2 * 16 * (16 + 64)),
    ],
)
def test_operands_that_a_matmul_reads_from_shared_memory(opcode, operands, read):
    assert schedule.operand_bytes(sass.Instruction(0, opcode, operands)) == read


def test_a_narrow_matmul_waits_for_its_operands():
    """64 x 16 takes 8 clocks of the tensor cores, and 20 to read A and B."""
    assert cycles(*["HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24"] * 8) == pytest.approx(160, rel=0.03)
    assert cycles(*["HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR8], R24"] * 8) == pytest.approx(64, rel=0.25)
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    shared = cycles("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", wait)
    registers = cycles("HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR8], R24, gsb0", wait)
    assert shared - registers == 20 - 8


def test_shared_memory_is_one_port():
    assert (schedule.moved_bytes("LDSM.16.M88.4"), schedule.moved_bytes("STS.128")) == (512, 512)
    assert schedule.moved_bytes("LDS") == 128
    assert schedule.unit("LDSM.16.M88.4") == ("shared", 16)  # 4 clocks for each of four schedulers
    # 48 clocks of operands and 24 of LDSM: more than the matmul's 64.
    mixed = cycles(f"{MATMUL} R24, gdesc[UR8], R24", "LDSM.16.M88.4 R0", "LDSM.16.M88.2 R0")
    assert mixed == pytest.approx(72, rel=0.03)


def test_a_wait_that_succeeds_skips_its_retry():
    lines = [
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", {"sets": 0}),
        ("BRA 0x50", {"waits": 1, "target": 0x50}),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", {"sets": 0}),
        ("FMUL R0", {"waits": 1}),
        ("FMUL R1", {}),
        ("FMUL R2", {}),
    ]
    assert cycles(*lines) == cycles(*lines[:2], lines[5]) < cycles(lines[0], *lines[2:])


def test_the_warp_that_issued_last_goes_on():
    """One is then at its matmul while the other computes: little more than 80 clocks each, and 97 to 129 by turns."""
    loop = ["FMUL R0"] * 80 + [f"{MATMUL} R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    assert 80 < cycles(*loop, programs=2) < 92


def test_the_model_comes_within_20_percent_of_published_speeds():
    found = calibrate.errors(calibrate.committed())
    assert len({name for name, _, _ in found}) >= 5
    assert {compiler.split(".")[1] for _, compiler, _ in found if compiler.startswith("Triton")} == {"6", "9"}
    assert max(map(abs, found.values())) < 0.205, {name: f"{error:+.0%}" for name, error in found.items()}
    json.dumps(list(found.values()))


def test_a_kernel_without_a_published_speed_is_not_calibrated():
    rows = calibrate.table()
    column = {str(c.header): list(c.cells) for c in rows.columns}
    assert dict(zip(column["kernel"], column["error"], strict=True))["Triton tutorial 06, backward"] == "not calibrated"
