"""What the TPU compiler makes of the kernels' memory: vector memory, and registers that are spilled to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vsurge.kernels import DecodeBlocks
from vsurge.kernels.tuning import CHIPS, Batch, Call, Compilers, Schedule
from vsurge.kernels.tuning.calls import Kernel

BLOCKS = DecodeBlocks(1024, lanes=1, depth=8)
DECODE = Call(kernel="decode", num_q_heads=32, num_kv_heads=8, block_sizes=BLOCKS)
BUFFER_BYTES = BLOCKS.depth * BLOCKS.kv_tokens * 2 * 8 * 128 * 2


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    with Compilers(1) as processes:
        yield processes


def assert_fits(schedule: Schedule) -> int:
    """The bytes of vector memory that a kernel has."""
    memory = schedule.vector_memory
    assert memory is not None
    assert 0 <= memory.spilled_bytes < memory.bytes <= CHIPS[schedule.chip].vmem_mib * 2**20
    return memory.bytes


def test_decoding_long_sequences_spills_no_register(compilers: Compilers) -> None:
    (schedule,) = compilers.schedules(DECODE, "v6e").result()
    assert BUFFER_BYTES < assert_fits(schedule) < 1.2 * BUFFER_BYTES
    (prediction,) = compilers.predict(DECODE, [Batch((8192,) * 64)], "v6e").result()
    visits = prediction.runs[0].replay.visits
    first, (count, bundles) = max(visits.items(), key=lambda piece: piece[1][0] * piece[1][1])
    assert count * bundles > 0.9 * prediction.runs[0].replay.issued  # this is where the time goes
    slots = schedule.slots(first, first + bundles - 1)
    assert (slots["VLOAD:FILL"], slots["VSTORE:SPILL"]) == (0, 0)


@pytest.mark.parametrize(
    ("chip", "heads"),
    [
        pytest.param(chip, heads, marks=() if (chip, heads) == ("v4", (16, 8)) else pytest.mark.slow)
        for chip in CHIPS
        for heads in ((16, 8), (32, 8), (64, 8), (8, 1))
    ],
)
def test_what_the_kernels_choose_fits_vector_memory(
    compilers: Compilers, chip: str, heads: tuple[int, int]
) -> None:
    kernels: tuple[Kernel, ...] = ("decode", "ragged", "append")
    for kernel in kernels:
        call = Call(kernel=kernel, num_q_heads=heads[0], num_kv_heads=heads[1])
        for schedule in compilers.schedules(call, chip).result():
            assert_fits(schedule)
