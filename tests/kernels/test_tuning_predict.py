"""Predictions of kernels' times, from what the real compiler makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import jax
import pytest

from vsurge.kernels import DecodeBlocks, RaggedBlocks
from vsurge.kernels.tuning import CHIPS, Assumptions, Batch, Call, Compilers, Prediction, predict
from vsurge.kernels.tuning.bare import column_products, matrix_product, product_cycles, row_products

DECODE = Call(
    kernel="decode", num_q_heads=8, num_kv_heads=2, max_seqs=8, max_context=4096,
    block_sizes=DecodeBlocks(512, lanes=1, depth=8),
)  # fmt: skip
LONG, SHORT, MIXED = Batch((2048,) * 8), Batch((200,) * 8), Batch((1, 64, 65, 700, 1333, 4096, 0, 5))
PAGE_BYTES = 64 * 2 * 2 * 128 * 2


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    with Compilers(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def predicted(compilers: Compilers):
    """Of LONG, SHORT and MIXED at 1 us; of LONG at 0 us, there at half the bandwidth, and at 3 us."""

    @cache
    def of(chip: str) -> list[Prediction]:
        usual = Assumptions.of(chip)
        none = replace(usual, latency_us=0.0)
        more = [none, replace(none, gbytes_per_s=usual.gbytes_per_s / 2), replace(usual, latency_us=3.0)]
        found = compilers.predict(DECODE, [LONG, SHORT, MIXED], chip, [usual, *more]).result()
        return [found[0], found[4], found[8], *found[1:4]]

    return of


def extra_us(long: Prediction, short: Prediction) -> float:
    """What LONG takes more than SHORT: where the memory decides of the one, it may not of the other."""
    explained = (max(prediction.compute_us, prediction.memory_us) for prediction in (long, short))
    return next(explained) - next(explained)


def test_no_prediction_is_faster_than_the_matrix_units(compilers: Compilers) -> None:
    """At a thousandth of the matrix rate they decide, at the chip's they do not."""
    usual = Assumptions.of("v6e")
    slow = replace(usual, tflops=usual.tflops / 1000)
    as_it_is, bound = compilers.predict(DECODE, [LONG], "v6e", [usual, slow]).result()
    flops = 4 * 8 * 128 * sum(LONG.kv_lens)
    assert bound.time_us == bound.compute_us == pytest.approx(flops / (slow.tflops * 1e6))
    assert bound.mfu == 1
    assert bound.bound == "compute"
    assert as_it_is.matrix_us == pytest.approx(bound.time_us / 1000)
    assert as_it_is.compute_us > 10 * as_it_is.matrix_us


@pytest.mark.parametrize(
    "chip", [pytest.param(chip, marks=pytest.mark.slow if chip in ("v4", "v5p") else ()) for chip in CHIPS]
)
def test_every_chip_works_and_what_is_predicted_is_possible(predicted, chip: str) -> None:
    long, short, mixed, *_ = predicted(chip)
    for prediction in (long, short, mixed):
        assert 0 < prediction.mbu <= 1
        assert 0 < prediction.mfu <= 1
        assert max(prediction.compute_us, prediction.memory_us) <= prediction.time_us
        assert 0 < prediction.bundles <= sum(run.replay.issued for run in prediction.runs)
        assert prediction.chip == chip
        explained = max(prediction.compute_us, prediction.memory_us)
        assert explained + 1 < prediction.time_us < explained + 4  # the rest is latency, of three waits
    assert long.runs[0].replay.copies - short.runs[0].replay.copies == 8 * (2048 // 64 - 4)
    assert long.time_us - short.time_us == pytest.approx(extra_us(long, short), rel=0.1)


@pytest.mark.parametrize("batch", range(3))
def test_what_is_copied_is_what_is_useful_rounded_up_to_pages(predicted, batch: int) -> None:
    prediction = predicted("v6e")[batch]
    (run,) = prediction.runs
    lens = [length for length in prediction.batch.kv_lens if length]
    useful = prediction.call.useful_bytes(prediction.batch)
    assert useful == sum(lens) * PAGE_BYTES // 64
    # besides the cache: queries, outputs and log-sum-exps of 8 sequences, and rows of the page table
    others = 8 * 8 * 128 * (2 + 2 + 4) + 2 * 8 * 128 * 4
    assert useful <= run.replay.bytes < useful + len(lens) * PAGE_BYTES + others + 2**16
    assert sum(-(-length // 64) for length in lens) <= run.replay.copies


def test_a_call_waits_for_latency_three_times_and_half_the_bandwidth_doubles_it_where_it_binds(
    predicted,
) -> None:
    """For lengths and page table, for the first pages, and for the last output to be written."""
    long, _, _, without_latency, half, late = predicted("v5e")
    assert long.time_us - without_latency.time_us == pytest.approx(3 * 1.0, abs=0.1)
    assert late.time_us - without_latency.time_us == pytest.approx(3 * 3.0, abs=0.1)
    assert long.bound == half.bound == "bandwidth"
    assert 1.9 < half.time_us / without_latency.time_us <= 2.01
    assert half.mbu == pytest.approx(long.mbu * 2 * long.time_us / half.time_us)


def test_loops_tell_their_trips_bundles_slots_spills_and_copies(predicted) -> None:
    """Of a real program: a loop over steps of 512 tokens, and one that starts the first copies."""
    (run,) = predicted("v6e")[0].runs
    step, first = run.loops[:2]
    assert step.trips == 8 * 2048 // 512
    assert first.trips == DECODE.block_sizes.depth - 1  # pyright: ignore
    assert (step.copies, step.copied_bytes) == (32 * 8, 32 * 8 * PAGE_BYTES)
    assert (first.copies, first.copied_bytes) == (7 * 8, 7 * 8 * PAGE_BYTES)
    assert {size for size in step.loop.copies if size} >= {PAGE_BYTES}
    assert step.work.bundles + first.work.bundles <= run.work.bundles == run.replay.issued
    assert step.bundles_per_trip == step.work.bundles / 32 > first.bundles_per_trip
    assert run.busiest.bundles < step.work.bundles < step.loop.bundles * step.trips
    each = {unit: slots / step.trips for unit, slots in step.work.slots.items()}
    registers = 512 * 2 * 2 * 128 * 2 // 4096  # of keys and values
    assert registers <= each["VLOAD"] - each["VLOAD:FILL"] < 1.5 * registers
    assert 4 <= each["EUP"] < 8  # exponentials of 8 x 512 scores fill 4 registers
    for unit in ("MXU", "VALU", "VLOAD", "VSTORE", "SALU"):
        assert 0 < step.work.share(unit) < 1
    assert (first.work.slots["MXU"], first.work.spills) == (0, 0)
    assert sum(run.spills.values()) == run.work.slots["VSTORE:SPILL"]
    assert run.busiest.spills == 0


def test_a_window_limits_what_is_copied(compilers: Compilers, predicted) -> None:
    window = replace(DECODE, sliding_window=256)
    long, short = compilers.predict(window, [LONG, Batch((2048 + 37,) * 8)], "v6e").result()
    everything = predicted("v6e")[0].runs[0].replay
    assert window.useful_bytes(LONG) == 8 * 4 * PAGE_BYTES
    assert everything.copies - long.runs[0].replay.copies == 8 * (32 - 4)
    assert everything.bytes - long.runs[0].replay.bytes == 8 * (32 - 4) * PAGE_BYTES
    assert short.runs[0].replay.bytes - long.runs[0].replay.bytes == 8 * PAGE_BYTES  # a window of 5 pages


def test_a_cost_per_copy_is_paid_for_each_and_a_faster_clock_shortens_what_computes(
    compilers: Compilers,
) -> None:
    usual = Assumptions.of("v6e")
    costly = replace(usual, copy_ns=1000.0)
    fast = replace(usual, gbytes_per_s=1e6, latency_us=0.0)
    faster = replace(fast, clock_ghz=2 * usual.clock_ghz)
    first, second, third, fourth = compilers.predict(
        DECODE, [LONG], "v6e", [usual, costly, fast, faster]
    ).result()
    copies = first.runs[0].replay.copies
    assert second.memory_us - first.memory_us == pytest.approx(copies, rel=1e-6)
    assert second.time_us > copies
    assert third.bound == "compute"
    assert third.time_us == pytest.approx(2 * fourth.time_us, rel=0.02)


def test_a_ragged_call_is_predicted_kernel_by_kernel(compilers: Compilers) -> None:
    call = replace(DECODE, kernel="ragged", max_tokens=256, block_sizes=RaggedBlocks(16, 128, 2))
    mixed = Batch((700, 300), (1, 200))
    (prediction,) = compilers.predict(call, [mixed], "v6e").result()
    assert [run.kernel for run in prediction.runs] == ["paged_decode_attention", "ragged_paged_attention"]
    assert prediction.time_us == pytest.approx(sum(run.replay.cycles for run in prediction.runs) / 1750)
    pairs = 700 + sum(range(101, 301))
    assert call.useful_flops(mixed) == 4 * 8 * 128 * pairs


def test_append_and_jaxs_own_kernel_are_predicted_too(compilers: Compilers) -> None:
    append = replace(DECODE, kernel="append", max_tokens=16, block_sizes=None)
    theirs = replace(DECODE, kernel="jax_ragged", max_tokens=8, block_sizes=(2, 8), max_context=512)
    theirs = replace(theirs, num_kv_heads=1)
    short = Batch((500, 300))
    futures = [compilers.predict(call, [short], "v6e") for call in (append, theirs)]
    written, attended = (future.result()[0] for future in futures)
    tile, rows = 16 * 1024, 16 * 1024  # bytes of 16 tokens
    assert 2 * 2 * tile + rows <= written.runs[0].replay.bytes < 2 * 2 * tile + rows + 4096  # there and back
    assert 3 < written.time_us < 4  # for slots, for a tile, and until it is back
    assert written.mbu == pytest.approx(2 * 1024 / (written.time_us * 1640e3))
    pages = 8 + 6  # of blocks of two
    assert pages * PAGE_BYTES // 2 <= attended.runs[0].replay.bytes < (pages + 2) * PAGE_BYTES // 2
    assert 0.02 < attended.mbu < 0.04


def test_what_cannot_be_predicted_is_refused(compilers: Compilers) -> None:
    with pytest.raises(ValueError, match="chip='v3': must be one of"):
        compilers.predict(DECODE, [SHORT], "v3")
    with pytest.raises(ValueError, match="batch: 9 sequences of up to 1 tokens; the call is for 8 of up to"):
        compilers.predict(DECODE, [Batch((1,) * 9)], "v6e").result()
    wrong = replace(DECODE, block_sizes=DecodeBlocks(96))
    with pytest.raises(ValueError, match="kv_tokens=96 must be a multiple of"):
        predict(wrong, SHORT, "v6e", compilers=compilers)


def test_a_sliding_window_bounds_what_is_useful() -> None:
    call = replace(DECODE, sliding_window=100)
    batch = Batch((1000, 50), (3, 1))
    assert call.useful_bytes(batch) == (102 + 50) * PAGE_BYTES // 64
    assert call.useful_flops(batch) == 4 * 8 * 128 * (3 * 100 + 50)


def tile(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "bfloat16")


@pytest.mark.parametrize(
    "chip", ["v6e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5e", "7x"))]
)
def test_a_bare_matrix_product_runs_at_the_rate_that_the_chip_is_sold_with(
    compilers: Compilers, chip: str
) -> None:
    (schedule,) = compilers.schedules_of(matrix_product, (tile(1024, 1024),) * 2, chip).result()
    known = CHIPS[chip]
    cycles = 2 * 1024**3 / (known.tflops * 1e3 / known.clock_ghz)
    assert 0.9 < cycles / len(schedule.bundles) <= 1
    assert product_cycles(schedule, 2 * 1024**3) == len(schedule.bundles)
    assert product_cycles(schedule, 4 * 1024**3) == pytest.approx(2 * cycles)  # the peak is the limit


def test_the_products_of_several_heads_fill_each_others_waits(compilers: Compilers) -> None:
    """head_dim 128 fills half of a matrix unit of 256 x 256, but only in one of the products."""

    def share(heads: int) -> float:
        tiles = tile(heads, 512, 128), tile(heads, 512, 128), tile(heads, 512, 128)
        flops = 4 * heads * 512 * 512 * 128
        futures = [compilers.schedules_of(f, tiles, "v6e") for f in (row_products, column_products)]
        cycles = min(product_cycles(future.result()[0], flops) for future in futures)
        return flops / cycles / (920e3 / 1.75)

    assert 0.25 < share(1) < 0.4
    assert 0.5 < share(4) < 0.75
