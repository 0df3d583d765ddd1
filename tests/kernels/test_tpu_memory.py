"""What the TPU compiler makes of the kernels' memory: vector memory, and registers that are spilled to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import pytest

from vsurge.kernels import DecodeBlocks
from vsurge.kernels.append.mosaic_tpu import BUFFERS, ROW_BYTES
from vsurge.kernels.ragged.items import PIECE
from vsurge.kernels.tpu.fetcher import vmem_bytes_per_row, vmem_bytes_per_token
from vsurge.kernels.tuning import CHIPS, Batch, Call, Compilers, Schedule
from vsurge.kernels.tuning.calls import Kernel
from vsurge.kernels.tuning.candidates import chosen_ragged_blocks, claimed_bytes
from vsurge.kernels.tuning.loops import FILLED, SPILLED, LoopRun
from vsurge.kernels.tuning.prediction import KernelRun

TUNED = ("v5e", "v6e", "7x")  # chips with a table of block sizes
MODELS = ((16, 8), (32, 8), (64, 8), (8, 2), (8, 1))  # Qwen3-0.6B, 8B and 32B; a fourth and an eighth of 8B
# Of these, in a run without the slow tests.
SAMPLE = {
    "decode": {("v6e", (32, 8)), ("7x", (8, 1))},
    "ragged": {("v6e", (8, 1))},
}
BATCHES: dict[Kernel, Batch] = {"decode": Batch((8192,) * 64), "ragged": Batch((8192,), (2048,))}
REGISTER = 8 * 128  # float32 numbers

Heads = tuple[int, int]
Run = Callable[..., KernelRun]


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    with Compilers(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def run_of(compilers: Compilers) -> Run:
    """What a call of long sequences executes, with the block sizes that the kernel chooses or given ones."""

    @cache
    def run(kernel: Kernel, chip: str, heads: Heads, block_sizes: DecodeBlocks | None = None) -> KernelRun:
        call = call_of(kernel, heads, block_sizes)
        (prediction,) = compilers.predict(call, [BATCHES[kernel]], chip).result()
        return next(run for run in prediction.runs if kernel in run.kernel)

    return run


def call_of(kernel: Kernel, heads: Heads, block_sizes: DecodeBlocks | None = None) -> Call:
    return Call(kernel=kernel, num_q_heads=heads[0], num_kv_heads=heads[1], block_sizes=block_sizes)


def step_of(run: KernelRun) -> LoopRun:
    """The loop over steps, in which the time goes."""
    step = run.loops[0]
    assert step.work.bundles > 0.9 * run.replay.issued
    return step


def spilled_accumulators(run: KernelRun) -> float:
    """Per step."""
    return sum(times for spill, times in run.spills.items() if spill.is_accumulator) / step_of(run).trips


def chip_and_heads(*kernels: Kernel) -> list[object]:
    """Each of `kernels`, where there are several, with each chip and each model's heads."""
    return [
        pytest.param(
            *((kernel,) if len(kernels) > 1 else ()),
            chip,
            heads,
            marks=() if (chip, heads) in SAMPLE[kernel] else pytest.mark.slow,
        )
        for kernel in kernels
        for chip in TUNED
        for heads in MODELS
    ]


# Query heads -> a chip's spilled accumulators per step of decoding, at most: of each query row the partial
# sums of its weights. Up to 32 query heads only the code at the ends of sequences spills any.
AT_MOST = {64: {"v5e": 1.1, "v6e": 12.2, "7x": 17.0}}


@pytest.mark.parametrize(("chip", "heads"), chip_and_heads("decode"))
def test_decoding_spills_no_accumulator(run_of: Run, chip: str, heads: Heads) -> None:
    run = run_of("decode", chip, heads)
    assert spilled_accumulators(run) <= AT_MOST.get(heads[0], {chip: 0.1})[chip]
    assert sum(run.spills.values()) == run.work.slots[SPILLED]  # each was understood


@pytest.mark.parametrize(
    ("chip", "most"), [("v6e", 16), pytest.param("v5e", 14, marks=pytest.mark.slow), ("7x", 147)]
)
def test_long_units_spill_keys_and_values_on_7x_and_nothing_in_whole_steps_elsewhere(
    run_of: Run, chip: str, most: int
) -> None:
    """In 7x's schedule of units of 1,024 tokens keys and values wait in registers for the matrix unit."""
    run = run_of("decode", chip, (32, 8), DecodeBlocks(1024, lanes=1, depth=8))
    step, work = step_of(run), run.work
    assert (work.slots[SPILLED] + work.slots[FILLED]) / step.trips <= most
    assert spilled_accumulators(run) < 0.1
    loaded = sum(times for spill, times in run.spills.items() if spill.made_by == "vld")
    assert (loaded > 0.8 * sum(run.spills.values())) == (chip == "7x")
    assert run.busiest.bundles > 0.9 * run.replay.issued  # whole steps
    assert (run.busiest.spills > 0) == (chip == "7x")


# Chip -> the share of accumulators that prompts spill between their rescaling and the next product.
SHARES = {"v5e": 0.7, "v6e": 0.25, "7x": 0.3}
MOST_SPILLED = 0.3  # registers per bundle; with scores in registers it was 0.75 on v6e and 7x


@pytest.mark.parametrize(("chip", "heads"), chip_and_heads("ragged"))
def test_prompts_spill_some_accumulators_and_few_scores_as_those_wait_in_memory(
    run_of: Run, chip: str, heads: Heads
) -> None:
    run, blocks = run_of("ragged", chip, heads), chosen_ragged_blocks(call_of("ragged", heads), chip)
    pieces = -(-blocks.kv_tokens // PIECE)
    accumulators = blocks.q_tokens * heads[0] * 128 // REGISTER * pieces
    assert spilled_accumulators(run) < SHARES[chip] * accumulators
    step = step_of(run)
    assert step.work.slots[SPILLED] < MOST_SPILLED * step.work.bundles
    for unit in ("VLOAD", "VSTORE"):
        assert step.work.share(unit) < 0.7 * step.work.share("MXU")
    assert sum(run.spills.values()) == pytest.approx(run.work.slots[SPILLED], rel=1e-3)


@pytest.mark.parametrize(("kernel", "chip", "heads"), chip_and_heads("decode", "ragged"))
def test_vector_memory_is_what_the_block_sizes_claim_and_spills(
    run_of: Run, kernel: Kernel, chip: str, heads: Heads
) -> None:
    memory, claimed = run_of(kernel, chip, heads).vector_memory, claimed_bytes(call_of(kernel, heads), chip)
    assert memory is not None
    assert 0.98 * claimed < memory.bytes - memory.spilled_bytes <= claimed
    assert memory.bytes < 1.25 * claimed
    assert memory.bytes <= CHIPS[chip].vmem_mib * 2**20


@pytest.mark.parametrize("heads", [(32, 8), (8, 1)], ids=str)
def test_the_cache_write_holds_16_tiles_and_the_new_rows(compilers: Compilers, heads: Heads) -> None:
    call = call_of("append", heads)
    (schedule, *_) = compilers.schedules(call, "v6e").result()
    memory, tile = schedule.vector_memory, 16 * vmem_bytes_per_token(call.cache())
    assert memory is not None
    tokens = min(call.max_tokens, ROW_BYTES // vmem_bytes_per_token(call.cache()))
    assert memory.bytes == BUFFERS * tile + tokens * vmem_bytes_per_row(call.cache())


def assert_fits(schedule: Schedule) -> None:
    memory = schedule.vector_memory
    assert memory is not None
    assert 0 <= memory.spilled_bytes < memory.bytes <= CHIPS[schedule.chip].vmem_mib * 2**20


@pytest.mark.parametrize(
    ("chip", "heads", "kernel"),
    [
        pytest.param(*case, marks=() if case == ("v4", (16, 8), "decode") else pytest.mark.slow)
        for case in product(CHIPS, ((16, 8), (32, 8), (64, 8), (8, 1)), ("decode", "ragged", "append"))
    ],
)
def test_what_the_kernels_choose_fits_vector_memory(
    compilers: Compilers, chip: str, heads: Heads, kernel: Kernel
) -> None:
    for schedule in compilers.schedules(call_of(kernel, heads), chip).result():
        assert_fits(schedule)
