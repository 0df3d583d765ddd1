"""The reader of the TPU compiler's schedules, on small texts; test_tuning_predict.py reads real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsurge.kernels.tuning import ScheduleError
from vsurge.kernels.tuning.loops import Execution
from vsurge.kernels.tuning.replay import Replay
from vsurge.kernels.tuning.schedule import Instruction, read_schedules
from vsurge.kernels.tuning.spills import Spill

from .schedules import UNITS, schedule_of, write_dumps

COPY = "%33 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s19_s17, /*size_in_granules=*/{}, /*vmem=*/%s31_s13, [#a]"
LOOP = "%16 = sbr.rel ({}) target bundleno = {} (0x8), region = 32"


def only(text: str) -> Instruction:
    """The instruction of a bundle that has one which the reader keeps."""
    ((instruction,),) = schedule_of(text).bundles
    return instruction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%s72_s14 = sshll.u32 %s144_s11, 7", ("sshll.u32", "%s72_s14", ("%s144_s11", "7"))),
        ("%s1_s0 = smov (!%p68_p0), 0 /* copy */", ("smov", "%s1_s0", ("0",), "!%p68_p0")),
        ("%s1_s0 = smov (%p6_p0, %s2_s0), %s3_s1", ("smov", "%s1_s0", ("%s3_s1",), "%p6_p0", "%s2_s0")),
        ("%s5_s1 = sld [smem:[#allocation3 + %s4_s2]]",
         ("sld", "%s5_s1", ("[smem:[#allocation3 + %s4_s2]]",))),
        ("%9 = sst [smem:[#a3 + $0x4]] %s4_s2", ("sst", "%9", ("[smem:[#a3 + $0x4]]", "%s4_s2"))),
        ("%60 = shalt.err (%p71_p3) /* /* nested */ { ;; } \nmore */", ("shalt.err", "%60", (), "%p71_p3")),
        ("%s3_s1 = int_to_ptr.vmem [resolvable:$true] %s30_s12",
         ("int_to_ptr.vmem", "%s3_s1", ("%s30_s12",))),
        ("%8 = vsyncpa [#allocation7], 0", ("vsyncpa", "%8", ("[#allocation7]", "0"))),
        ("%s1_s0 = inlined_call_operand.hbm [shape: f32[64,8], index: 1, kind: input]",
         ("inlined_call_operand.hbm", "%s1_s0", ("1",))),
        (LOOP.format("!%p13_p11", 8), ("sbr.rel", "%16", ("8",), "!%p13_p11")),
    ],
)  # fmt: skip
def test_instructions_are_taken_apart(text: str, expected: tuple) -> None:
    assert only(text) == Instruction(*expected)


def test_of_a_division_it_is_known_what_is_wanted() -> None:
    assert only("%s4_s1 = sdivrem.u32 %s1_s0, %s2_s2 /* kRem */").remainder
    quotient = only("%s4_s1 = sdivrem.u32 %s1_s0, %s2_s2")
    assert (quotient.operands, quotient.remainder) == (("%s1_s0", "%s2_s2"), False)


def test_vector_instructions_are_left_out_and_empty_bundles_are_counted() -> None:
    schedule = schedule_of("%9 = vst [vmem:[#a] sm:$0xff] /*source=*/%v146_v0", "", "/* a comment */")
    assert schedule.bundles == ((), (), ())
    assert schedule.empty == (False, True, True)
    assert (schedule.kernel, schedule.chip) == ("kernel", "v6e")


def test_loops_nest_and_tell_their_slots_spills_and_copies(tmp_path: Path) -> None:
    bundles = [
        "%s1_s0 = smov 0",
        "LB: > { %s2_s1 = smov 0 }",
        f" LB: > > {{ {COPY.format(128)} ;; {COPY.format('%s3_s3')} }}",
        f"  : > > {{ {LOOP.format('%p1_p1', 2)} }}",
        *["  : > > {}"] * 4,
        f"  : > {{ {LOOP.format('%p2_p2', 1)} }}",
        *["  : > {}"] * 4,
        f"PF:  {{ {COPY.format(1)} }}",
    ]
    used = [" ".join(str(unit * (at == 2) + (at == 1)) for unit in range(len(UNITS))) for at in range(14)]
    write_dumps(tmp_path, bundles, used)
    (schedule,) = read_schedules(tmp_path, "v6e")
    outer, inner = schedule.loops
    assert (outer.first, outer.last, outer.depth, outer.bundles) == (1, 12, 0, 12)
    assert (inner.first, inner.last, inner.depth, inner.bundles) == (2, 7, 1, 6)
    assert outer.copies == inner.copies == (128 * 32, None)
    assert inner.slots == {unit: at for at, unit in enumerate(UNITS)}
    assert outer.slots["VSTORE:SPILL"] == inner.slots["VSTORE:SPILL"] + 1 == 9


SPILLED = "%40 = vst [vmem:[#allocation7_spill] sm:$0xff] /*vst_source=*/%v{}"
FILLED = "%v{} = vld [vmem:[#allocation7_spill] sm:$0xff]"


def test_spills_tell_what_made_and_who_reads_the_register() -> None:
    """The same place holds one register after the other; one of them is read before it is spilled, too."""
    schedule = schedule_of(
        "%v1_v0 = vmul.f32 0.5, %v0_v1 ;; %v2_v2 = vpop.f32.mrf.mxu0",
        "%v3_v3 = vmax.f32 %v1_v0, %v0_v1",
        SPILLED.format("1_v0"),
        FILLED.format("4_v0"),
        "%v5_v4 = vsub.f32 %v4_v0, %v3_v3",
        SPILLED.format("2_v2"),
        FILLED.format("6_v5"),
        "%v7_v6 = vadd.f32 %v6_v5, %v5_v4 ;; %9 = vst [vmem:[#allocation9] sm:$0xff] /*vst_source=*/%v7_v6",
    )
    scores, product = Spill("vmul.f32", ("vmax.f32", "vsub.f32")), Spill("vpop.f32.mrf.mxu0", ("vadd.f32",))
    assert schedule.spills == ((2, scores), (5, product))
    assert (scores.is_accumulator, product.is_accumulator) == (False, True)
    assert not Spill("vpop.eup", ("vadd.f32", "vpack.c.bf16")).is_accumulator  # a weight
    assert not Spill("vmax.f32", ("vadd.f32",)).is_accumulator
    assert Spill("vmul.f32", ("vadd.f32",)).is_accumulator
    assert Spill("vadd.f32", ("vst",)).is_accumulator


def test_loops_are_counted_as_they_were_executed(tmp_path: Path) -> None:
    """An outer loop of 3 trips around an inner one of 5, 3 bundles before and after; v4 has a delay slot."""
    bundles = [
        "%s0_s0 = smov 0",
        "%s1_s1 = smov 0",
        f"%s2_s2 = smov 0 ;; {SPILLED.format('1_v0')}",
        f"%s2_s2 = sadd.s32 1, %s2_s2 ;; {COPY.format(4)}",
        "%p1_p1 = scmp.lt.s32.totalorder %s2_s2, 5",
        LOOP.format("%p1_p1", 3),
        "",
        "%s1_s1 = sadd.s32 1, %s1_s1",
        "%p2_p2 = scmp.lt.s32.totalorder %s1_s1, 3",
        LOOP.format("%p2_p2", 2),
        "",
        "%s0_s0 = smov 0",
    ]
    used = [" ".join("1" for _ in UNITS)] * len(bundles)
    write_dumps(tmp_path, bundles, used)
    (schedule,) = read_schedules(tmp_path, "v4")
    visits = {0: (1, 7), 3: (12, 4), 7: (3, 4), 2: (2, 5), 11: (1, 1)}  # as a replay makes its pieces
    execution = Execution(schedule, Replay(issued=7 + 48 + 12 + 10 + 1, visits=visits))
    inner, outer = execution.loops()
    assert (inner.loop.first, inner.loop.last, inner.trips) == (3, 6, 15)
    assert (inner.work.bundles, inner.bundles_per_trip) == (60, 4)
    assert (inner.copies, inner.copied_bytes) == (15, 15 * 4 * 512)
    assert (outer.loop.first, outer.loop.last, outer.trips) == (2, 10, 3)
    assert (outer.work.bundles, outer.bundles_per_trip) == (75, 25)
    assert execution.work().bundles == 78
    assert execution.busiest().bundles == 60
    assert inner.work.slots["VALU"] == 60
    assert inner.work.share("VALU") == 60 / (4 * 60)
    assert outer.work.spills == 2 * 75
    assert execution.spills() == {Spill("unknown", ()): 3}


def test_only_pallas_kernels_are_read_in_the_order_of_compilation(tmp_path: Path) -> None:
    for name in ("2-second.1", "1-first", "3-TLP", "4-<late-finalization>"):
        write_dumps(tmp_path, [""], name=name)
    write_dumps(tmp_path, [""], name="5-fusion.3", call="fusion")
    assert [schedule.kernel for schedule in read_schedules(tmp_path, "v5e")] == ["first", "second"]


def test_dumps_that_are_not_understood_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="a branch without a target"):
        schedule_of("%16 = sbr.rel (!%p13_p11) target region = 32")
    write_dumps(tmp_path, ["", ""], ["0 " * len(UNITS)])
    with pytest.raises(ScheduleError, match="2 bundles, but utilization of 1"):
        read_schedules(tmp_path, "v6e")
    next(tmp_path.glob("*utilization.txt")).unlink()
    with pytest.raises(ScheduleError, match=r"0 dumps are named 1-kernel\.1-\*-pre-delay"):
        read_schedules(tmp_path, "v6e")
