"""What fits a device's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vsurge.planning.memory import DeviceMemory

GIB = 2**30
MEMORY = DeviceMemory(
    capacity=32 * GIB, weights=16 * GIB, row_state=0, temporaries=GIB, program=0, page=GIB // 4,
    page_size=128, utilization=0.5,
)  # fmt: skip


def test_the_cache_takes_its_share_of_what_weights_leave() -> None:
    assert MEMORY.left == 15 * GIB
    assert (MEMORY.num_pages, MEMORY.cache, MEMORY.tokens) == (32, 8 * GIB, 32 * 128)


def test_steps_that_need_more_than_the_rest_take_it_from_the_cache() -> None:
    assert replace(MEMORY, utilization=1.0).num_pages == 15 * 4
    assert replace(MEMORY, temporaries=12 * GIB, program=2 * GIB).num_pages == 2 * 4


@pytest.mark.parametrize("field", ["weights", "row_state", "temporaries", "program"])
def test_what_is_too_large_leaves_no_cache(field: str) -> None:
    memory = replace(MEMORY, **{field: 33 * GIB})
    assert memory.left < 0
    assert (memory.num_pages, memory.tokens) == (0, 0)
    assert not memory.holds(1, 1)


def test_sequences_take_whole_pages() -> None:
    assert MEMORY.sequences(128) == 32
    assert MEMORY.sequences(129) == 16
    assert MEMORY.holds(16, 129)
    assert not MEMORY.holds(17, 129)
