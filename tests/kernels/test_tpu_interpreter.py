"""The kernels for TPU in the interpreter: block sizes, both orders of copies, races, planted ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    DecodeBlocks,
    Implementation,
    RaggedBlocks,
    append_kv,
    empty_kv_pages,
    read_kv,
)

from .batches import Setup
from .cases import sinks_of
from .interpreter import DMA_MODES, DmaMode, races_in
from .tpu_runs import BFLOAT16, BLOCKS, INT8, attend, attend_fused, attend_ragged, attend_several

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")


def slowly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def write(num_tokens: int = 100, dtype: str = "bfloat16", page_size: int = 32) -> None:
    """Writes rows of many tiles, several to a tile and out of order, and reads them."""
    heads, head_dim = 2, 64
    slots = np.random.default_rng(0).permutation(12 * 32)[:num_tokens]
    slots[7] = -1
    keys, values = jax.random.normal(jax.random.key(0), (2, num_tokens, heads, head_dim), jnp.bfloat16)
    places = jnp.asarray(slots, jnp.int32)

    def read(implementation: Implementation) -> Any:
        kv_pages = empty_kv_pages(12 * 32 // page_size, page_size, heads, head_dim, dtype)
        return read_kv(append_kv(kv_pages, keys, values, places, implementation=implementation), places)

    kept = slots >= 0
    for rows, right in zip(read("mosaic_tpu"), read("reference"), strict=True):
        np.testing.assert_array_equal(np.asarray(rows)[kept], np.asarray(right)[kept])


@pytest.mark.parametrize(
    "blocks", [BLOCKS[2], *(slowly(blocks) for blocks in BLOCKS[:2] + BLOCKS[3:])], ids=str
)
def test_any_block_sizes_match_the_reference(blocks: DecodeBlocks) -> None:
    attend(blocks)


@pytest.mark.parametrize("blocks", [BLOCKS[1], slowly(BLOCKS[0])], ids=str)
def test_a_window_may_begin_anywhere_in_a_unit(blocks: DecodeBlocks) -> None:
    attend(blocks, Setup(page_size=16), sliding_window=77, sinks=sinks_of(Setup()), soft_cap=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [RaggedBlocks(64, 256, 3), RaggedBlocks(32, 384, 2)], ids=str)
def test_any_block_sizes_match_the_reference_for_prompts(blocks: RaggedBlocks) -> None:
    attend_ragged(blocks, sliding_window=77, sinks=sinks_of(BFLOAT16), soft_cap=3.0)


def test_pages_larger_than_a_unit_and_odd_numbers_of_heads() -> None:
    attend(DecodeBlocks(256, 1, 2), Setup(num_q_heads=9, num_kv_heads=3, page_size=256))


RUNS: dict[str, Callable[[], None]] = {
    "decode": lambda: attend(BLOCKS[1]),
    "several": attend_several,
    "fused": attend_fused,
    "ragged": attend_ragged,
    "append": write,
    "decode int8": lambda: attend(BLOCKS[1], INT8),
    "ragged int8": lambda: attend_ragged(setup=INT8),
    "append int8": lambda: write(dtype="int8", page_size=128),
}
SAMPLED = {  # modes of a run without the slow tests, where it is not both
    "ragged": "on_wait",
    "fused": "on_wait",
    "several": None,
    "decode int8": "on_wait",
    "ragged int8": None,
    "append int8": "on_wait",
}


@pytest.mark.parametrize(
    ("run", "mode"),
    [
        pytest.param(
            run, mode, id=f"{name}-{mode}", marks=() if SAMPLED.get(name, mode) == mode else pytest.mark.slow
        )
        for name, run in RUNS.items()
        for mode in DMA_MODES
    ],
)
def test_there_are_no_races(run: Callable[[], None], mode: DmaMode, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not races_in(run, mode, monkeypatch)
