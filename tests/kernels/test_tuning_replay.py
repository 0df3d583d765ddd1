"""The replay of a kernel's control flow, against programs whose cycles are counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels.tuning import ReplayError, ScheduleError
from vsurge.kernels.tuning import replay as replay_module
from vsurge.kernels.tuning.operands import kernel_operands
from vsurge.kernels.tuning.replay import Memory, Replay, in_tiles, replay

from .schedules import schedule_of

FREE = Memory(bytes_per_cycle=1e12, latency=0.0)
SLOW = Memory(bytes_per_cycle=8.0, latency=100.0)
LENGTH = "%s1_s1 = inlined_call_operand.<no memory space> [shape: s32[1], index: 0]"
HBM = "%s2_s2 = inlined_call_operand.hbm [shape: f32[64,128], index: 1]"
COPY = "%33 = dma.hbm_to_vmem [thread:$0] %s2_s2, {}, [#vmem], [#flag]"  # of so many granules of 32 bytes
WAIT = "%138 = dma.done.wait [#flag], {} ;; %139 = vsyncadd [#flag], -{}"
BRANCH = "%16 = sbr.rel ({}) target bundleno = {} (0x8), region = 32"


def run(*bundles: str, given: tuple = (), memory: Memory = FREE, chip: str = "v6e") -> Replay:
    operands = [None if value is None else np.asarray(value, np.int32) for value in given]
    return replay(schedule_of(*bundles, chip=chip), operands, memory)


def counting_loop(chip: str, delay: int, trips: int) -> Replay:
    """Two bundles, a loop of two and its delay slots, and one at the end."""
    return run(
        f"%s0_s0 = smov 0 ;; {LENGTH}",
        "",
        "%s3_s0 = sphi %s0_s0, %s4_s0 ;; %s4_s0 = sadd.s32 1, %s3_s0",
        f"%p5_p0 = scmp.lt.s32.totalorder %s4_s0, %s1_s1 ;; {BRANCH.format('%p5_p0', 2)}",
        *[""] * delay,
        "%s6_s5 = smov 0",
        given=([trips],),
        chip=chip,
    )


@pytest.mark.parametrize(("chip", "delay"), [("v4", 1), ("v6e", 4), ("7x", 6)])
def test_a_loop_takes_its_bundles_and_its_delay_slots_each_trip(chip: str, delay: int) -> None:
    happened = counting_loop(chip, delay, 10)
    assert happened.cycles == happened.issued == 2 + 10 * (2 + delay) + 1
    assert (happened.copies, happened.busy) == (0, 0)


def test_what_stands_in_delay_slots_is_executed_even_if_the_branch_is_taken() -> None:
    bundles = [
        LENGTH,
        "%p9_p9 = scmp.gt.s32.totalorder %s1_s1, 0",
        BRANCH.format("%p9_p9", 8),
        *[""] * 3,
        "%s4_s4 = smov 1",
        "%60 = shalt.err",
        "%p7_p7 = scmp.ne.s32.totalorder %s4_s4, 1",
        "%61 = shalt.err (%p7_p7)",
    ]
    assert run(*bundles, given=([1],)).cycles == 9  # bundle 7 is jumped over
    with pytest.raises(ReplayError, match="stops with an error"):
        run(*bundles, given=([0],))


def test_a_copy_costs_its_bytes_over_the_bandwidth_and_then_the_latency() -> None:
    # started in cycle 1, 512 bytes at 8 per cycle, waited for in bundle 2
    program = (HBM, COPY.format(16), WAIT.format(16, 16), "")
    happened = run(*program, given=(None, None), memory=SLOW)
    assert happened.cycles == (1 + 512 / 8 + 100) + 2
    assert (happened.copies, happened.bytes, happened.busy, happened.issued) == (1, 512, 64, 4)
    costly = Memory(8.0, 100.0, copy_cost=30.0)
    assert run(*program, given=(None, None), memory=costly).cycles == happened.cycles + 30
    assert run(*program, given=(None, None)).cycles == pytest.approx(4)


def test_copies_are_served_one_after_another_and_their_latencies_overlap() -> None:
    two = (HBM, COPY.format(16), COPY.format(16), WAIT.format(32, 32), "")
    happened = run(*two, given=(None, None), memory=SLOW)
    assert happened.cycles == (1 + 2 * 64 + 100) + 2
    assert happened.busy == 128
    # what is computed meanwhile costs nothing more
    busy = (HBM, COPY.format(16), COPY.format(16), *[""] * 200, WAIT.format(32, 32), "")
    assert run(*busy, given=(None, None), memory=SLOW).cycles == (1 + 2 * 64 + 100) + 2
    longer = (HBM, COPY.format(16), COPY.format(16), *[""] * 300, WAIT.format(32, 32), "")
    assert run(*longer, given=(None, None), memory=SLOW).cycles == len(longer)


def test_copies_inside_the_core_move_nothing_over_the_memory_bus() -> None:
    inside = COPY.replace("hbm_to_vmem", "vmem_to_vmem")
    happened = run(HBM, inside.format(16), WAIT.format(16, 16), given=(None, None), memory=SLOW)
    assert (happened.cycles, happened.copies) == (3, 0)
    both = COPY.replace("hbm_to_vmem", "general")
    assert run(HBM, both.format(16), WAIT.format(16, 16), given=(None, None)).bytes == 2 * 512


def test_integers_reach_scalar_memory_by_copies_and_by_stores() -> None:
    """The third of the 8 integers that are copied, plus one that was stored, is the number of trips."""
    bundles = (
        "%s2_s2 = inlined_call_operand.hbm [shape: s32[8], index: 0] ;; %s0_s0 = smov 0",
        "%33 = dma.hbm_to_smem %s2_s2, 1, [#smem], [#flag]",
        "%34 = sst [smem:[#other + $0x5]] 2 ;; " + WAIT.format(1, 1),
        "%s3_s3 = sld [smem:[#smem + $0x2]] ;; %s7_s7 = sld [smem:[#other + 5]]",
        "%s8_s8 = sadd.s32 %s3_s3, %s7_s7",
        "%s4_s0 = sphi %s0_s0, %s5_s0 ;; %s5_s0 = sadd.s32 1, %s4_s0",
        f"%p5_p0 = scmp.lt.s32.totalorder %s5_s0, %s8_s8 ;; {BRANCH.format('%p5_p0', 5)}",
        *[""] * 4,
    )
    assert run(*bundles, given=(np.arange(8),)).cycles == pytest.approx(5 + 4 * 6)
    with pytest.raises(ReplayError, match="operand 0 is copied to scalar memory, but is not given"):
        run(*bundles, given=(None,))


def test_an_unknown_number_is_an_error_only_where_it_decides() -> None:
    unknown = "%s3_s3 = sld [smem:[#nobody]] ;; %p1_p1 = scmp.eq.s32.totalorder %s3_s3, 1"
    computed = "%s4_s4 = sadd.s32 %s3_s3, 1 ;; %s5_s5 = smin.s32 %s4_s4, 7 ;; %s6_s6 = smov (%p1_p1), 3"
    computed += " ;; %s7_s7 = scalar_select %p1_p1, 1, 2"
    assert run(unknown, computed).cycles == 2
    for decided in (BRANCH.format("%p1_p1", 0), "%8 = vsyncpa (%p1_p1), [#flag], 0"):
        with pytest.raises(ReplayError, match="never written decides"):
            run(unknown, computed, decided, *[""] * 4)
    with pytest.raises(ReplayError, match="operand 0 decides where the program goes, but is not given"):
        run(LENGTH, given=(None,))


def test_what_only_another_way_writes_is_read_from_its_register() -> None:
    bundles = [LENGTH, "%p9_p9 = scmp.gt.s32.totalorder %s1_s1, 0", BRANCH.format("%p9_p9", 8), *[""] * 4,
        "%s3_s3 = smov 5", "%s4_s4 = sadd.s32 %s3_s3, 1"]  # fmt: skip
    for length in (0, 1):  # value 3 is written, or is not
        assert run(*bundles, given=([length],)).cycles == 9 - length
    decides = [*bundles, "%p5_p5 = scmp.gt.s32.totalorder %s4_s4, 0", "%60 = shalt.err (%p5_p5)"]
    with pytest.raises(ReplayError, match="never written decides"):
        run(*decides, given=([1],))
    with pytest.raises(ReplayError, match="stops with an error"):
        run("%s2_s3 = smov 5", *[b.replace("= 8", "= 9") for b in decides], given=([1],))


def test_a_wait_that_nothing_arrives_for_is_an_error() -> None:
    with pytest.raises(ReplayError, match=r"stands at 16 and nothing is under way to it: waiting for 17"):
        run(HBM, COPY.format(16), WAIT.format(17, 17), given=(None, None))


def test_a_program_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "MOST_PIECES", 100)
    with pytest.raises(ReplayError, match="has not ended after 100 branches, at bundle 0"):
        run(BRANCH.replace("({}) ", "").format(0), *[""] * 4)


def test_what_the_replay_does_not_know_is_an_error() -> None:
    with pytest.raises(ReplayError, match=r"an unknown instruction: .*sfancy"):
        run("%s3_s3 = sfancy.s32 1, 2")
    with pytest.raises(ScheduleError, match="bundle 1: a branch in the delay slots of another"):
        run(BRANCH.replace("({}) ", "").format(5), BRANCH.replace("({}) ", "").format(5), *[""] * 4)


@pytest.mark.parametrize(
    ("instruction", "value"),
    [
        ("ssub.s32 3, 5", -2),
        ("smul.u32 65536, 65535", -65536),
        ("sshra.s32 -8, 1", -4),
        ("sshrl.u32 -8, 1", 2**31 - 4),
        ("sshll.u32 1, 31", -(2**31)),
        ("sdivrem.u32 17, 5", 3),
        ("sdivrem.u32 17, 5 /* kRem */", 2),
        ("smin.u32 -1, 5", 5),
        ("smin.s32 -1, 5", -1),
        ("smax.s32 -1, 5", 5),
        ("sand.u32 12, 10", 8),
        ("sor.u32 12, 10", 14),
        ("sxor.u32 12, 10", 6),
        ("sadd.s32 4294967168, 200", 72),
    ],
)
def test_arithmetic_is_that_of_32_bits(instruction: str, value: int) -> None:
    check = f"%p1_p1 = scmp.ne.s32.totalorder %s1_s1, {value}"
    run(f"%s1_s1 = {instruction}", check, "%60 = shalt.err (%p1_p1)")
    with pytest.raises(ReplayError, match="stops with an error"):
        run(f"%s1_s1 = {instruction}", check.replace(".ne.", ".eq."), "%60 = shalt.err (%p1_p1)")


def test_a_bundle_reads_what_was_there_before_it() -> None:
    """Value 2 takes the register of value 1 in the bundle that reads value 1."""
    bundles = (
        "%s1_s0 = smov 5",
        "%s2_s0 = smov 7 ;; %s3_s1 = sadd.s32 %s1_s0, 1",
        "%p1_p1 = scmp.ne.s32.totalorder %s3_s1, 6",
        "%60 = shalt.err (%p1_p1)",
    )
    assert run(*bundles).cycles == 4


def test_matrices_lie_in_memory_tile_by_tile() -> None:
    matrix = np.arange(9 * 200).reshape(9, 200)
    numbers = in_tiles(matrix).tolist()
    assert len(numbers) == 16 * 256
    assert numbers[:128] == matrix[0, :128].tolist()
    assert numbers[128:256] == matrix[1, :128].tolist()  # of the same tile
    assert numbers[8 * 128 : 8 * 128 + 73] == [*matrix[0, 128:], 0]  # the next tile
    assert numbers[2 * 8 * 128] == matrix[8, 0]
    assert in_tiles(np.arange(3)).tolist() == [0, 1, 2]
    assert in_tiles(np.ones((1, 5), np.int32)).size == 128


def test_operands_are_the_integers_that_reach_a_kernel() -> None:
    from jax.experimental import pallas as pl

    def kernel(lens: jax.Array, data: jax.Array, more: jax.Array) -> jax.Array:
        def body(a, b, c, out) -> None:
            out[...] = b[...]

        out_shape = jax.ShapeDtypeStruct(data.shape, data.dtype)
        return pl.pallas_call(body, out_shape=out_shape, name="some_kernel")(lens, data, more)

    @jax.jit
    def function(lens: jax.Array, data: jax.Array) -> jax.Array:
        return kernel(jnp.cumsum(lens) + 1, data * 2.0, jnp.sum(data.astype(jnp.int32), keepdims=True))

    lens = jnp.asarray([1, 2, 3], jnp.int32)
    traced = jax.jit(function).trace(lens, jnp.zeros((8, 128)))
    (operands,) = kernel_operands(traced.jaxpr, [np.asarray(lens), None])
    assert operands.kernel == "some_kernel"
    first, second, third = operands.operands
    np.testing.assert_array_equal(first, [2, 4, 7])
    assert second is None  # no integers
    assert third is None  # integers of what is not given
