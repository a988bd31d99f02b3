"""Loops in machine code, how their units overlap, and the section made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.kernels import static_page
from benchmarks.kernels.machine_code import GPUS, Instruction, Loop, loops, simulate

HOPPER = GPUS[90].rates


def code(lines: str) -> str:
    """As nvdisasm prints it, from instructions and labels a line each."""
    printed = []
    for number, line in enumerate(lines.strip().splitlines()):
        text = line.strip()
        printed.append(text if text.endswith(":") else f"        /*{16 * number:04x}*/                   {text} ;")
    return "\n".join(printed)


WAITING = code("""
    S2R R0, SR_TID.X
    .L_x_1:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR17], R2
    @!P1 BRA `(.L_x_9)
    .L_x_2:
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    MUFU.EX2 R3, R3
    @P2 BRA `(.L_x_3)
    MUFU.EX2 R4, R4
    FFMA R4, R4, R4, R4
    .L_x_3:
    FADD R3, R3, R3
    @P0 BRA `(.L_x_1)
    EXIT
    .L_x_9:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR17], R2
    @!P1 BRA `(.L_x_9)
    BRA `(.L_x_2)
""")


def test_a_round_leaves_out_what_need_not_run() -> None:
    """A wait that succeeds at once, a branch that is not needed; the loop of the wait itself has no work."""
    [loop] = loops(WAITING)
    names = [each.name.split(".")[0] for each in loop.round]
    assert names == ["SYNCS", "BRA", "HGMMA", "WARPGROUP", "MUFU", "BRA", "FADD", "BRA"]
    assert loop.count()["exponential"] == 1 and sum(each.kind == "exponential" for each in loop.body) == 2
    assert sum(each.flops for each in loop.round) == 2 * 64 * 128 * 16


def test_of_nested_loops_the_inner_one() -> None:
    nested = code("""
        .L_x_1:
        MUFU.EX2 R1, R1
        .L_x_2:
        HMMA.16816.F32.BF16 R4, R8, R10, R4
        @P0 BRA `(.L_x_2)
        @P1 BRA `(.L_x_1)
        EXIT
    """)
    assert [[each.name for each in loop.round] for loop in loops(nested)] == [["HMMA.16816.F32.BF16", "BRA"]]


@pytest.mark.parametrize(
    ("name", "operands", "read"),
    [
        ("HGMMA.64x32x16.F32.BF16", "R88, gdesc[UR24], RZ, !UPT", 2 * 16 * (32 + 64)),
        ("HGMMA.64x128x16.F32.BF16", "R24, R132, gdesc[UR20].tnspB, R24", 2 * 16 * 128),
        ("LDSM.16.M88.4", "R4, [R0]", 512),
        ("LDGSTS.E.BYPASS.128", "[R1], desc[UR4][R2.64]", 512),
        ("LDS", "R4, [R0]", 128),
    ],
)
def test_bytes_of_shared_memory(name: str, operands: str, read: int) -> None:
    assert Instruction(name, operands, "").shared_bytes == read


def made(*names: str) -> Loop:
    operands = {"HGMMA": "R24, R132, gdesc[UR20], R24", "WARPGROUP": "gsb0, 0x0"}
    steps = tuple(Instruction(name, operands.get(name.split(".")[0], ""), "") for name in names)
    return Loop(steps, steps)


SCORES, VALUES = ["HGMMA.64x128x16.F32.BF16"] * 4, ["HGMMA.64x128x16.F32.BF16"] * 4
WAIT, SOFTMAX, BARRIER = ["WARPGROUP.DEPBAR.LE"], ["MUFU.EX2"] * 48, ["BAR.SYNC"]
ROUND = 8 * 64
"""Clocks of its products: 2 x 64 x 128 x 16 FLOP each at 4,096 a clock."""
EXPONENTIALS = 48 * 128 / 16


def test_a_group_by_itself_waits_for_each_unit_in_turn() -> None:
    alone = simulate([[made(*SCORES, *WAIT, *SOFTMAX, *VALUES, *WAIT)]], HOPPER)
    assert alone == pytest.approx(ROUND + EXPONENTIALS, rel=0.01)


def test_a_softmax_beside_the_product_before_it_hides_it() -> None:
    overlapped = simulate([[made(*SCORES, *WAIT, *VALUES, *SOFTMAX)]], HOPPER)
    assert overlapped == pytest.approx(ROUND / 2 + EXPONENTIALS, rel=0.01)


def test_two_groups_share_the_units_and_a_barrier_makes_them_wait() -> None:
    loop = made(*SCORES, *WAIT, *SOFTMAX, *VALUES, *WAIT)
    free = simulate([[loop], [loop]], HOPPER)
    held = simulate([[made(*loop_names(loop), *BARRIER)] * 2], HOPPER)
    assert 2 * ROUND <= free < held < 2 * (ROUND + EXPONENTIALS)


def loop_names(loop: Loop) -> list[str]:
    return [each.name for each in loop.round]


def test_the_page_says_how_every_committed_form_compiled() -> None:
    content = json.loads((measure.RESULTS / "ahead_of_time.json").read_text())
    page = (Path(measure.RESULTS).parents[1] / static_page.PAGE).read_text()
    assert static_page.compiled_text(content) in page
    assert {form["target"] for form in content["forms"]} == set(GPUS)
    assert not [form for form in content["forms"] if form["problem"]]
    spilling = [{**form, "problem": "spills 8 bytes"} for form in content["forms"][:1]]
    assert static_page.compiled_text({**content, "forms": spilling}).endswith("| 1 |")


def test_the_page_s_section_is_that_of_the_committed_result() -> None:
    content = json.loads((measure.RESULTS / "static_table.json").read_text())
    page = (Path(measure.RESULTS).parents[1] / static_page.PAGE).read_text()
    assert static_page.text_of(content) in page
    assert {row["target"] for row in content["rows"]} == set(GPUS)
    shipped = [row for row in content["rows"] if row["variant"] == "shipped"]
    assert shipped and all("problem" not in row and row["limit_clocks"] > 0 for row in shipped)
