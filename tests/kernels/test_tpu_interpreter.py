"""The kernels for TPU in the interpreter: block sizes, both orders of copies, races, planted ones too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from vsurge.kernels import (
    DecodeBlocks,
    Implementation,
    RaggedBlocks,
    append_kv,
    empty_kv_pages,
    read_kv,
)
from vsurge.kernels.decode import mosaic_tpu as decode_tpu
from vsurge.kernels.decode.new_rows import WRITES, NewRows
from vsurge.kernels.ragged.query_blocks import RaggedRows
from vsurge.kernels.tpu.fetcher import Fetcher

from .cases import Setup, check_decode, check_ragged, decode_batch, ragged_batch, sinks_of
from .fused import check_fused
from .interpreter import DMA_MODES, DmaMode, races_in

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")

BLOCKS = [DecodeBlocks(128, 1, 2), DecodeBlocks(128, 2, 3), DecodeBlocks(256, 3, 2), DecodeBlocks(256, 1, 5)]
SMALL_RAGGED = RaggedBlocks(q_tokens=16, kv_tokens=128)
BFLOAT16 = Setup(query_dtype="bfloat16", cache_dtype="bfloat16", page_size=32)
INT8 = Setup(query_dtype="bfloat16", cache_dtype="int8", page_size=32)
LENGTHS = (520, 0, 3, 256, 384, 1, 1, 700, 128, 0, 260, 33)  # of two groups


def slowly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def attend(blocks: DecodeBlocks, setup: Setup = BFLOAT16, **options: Any) -> None:
    check_decode(decode_batch(setup, LENGTHS), "mosaic_tpu", block_sizes=blocks, **options)


def attend_ragged(blocks: RaggedBlocks = SMALL_RAGGED, setup: Setup = BFLOAT16, **options: Any) -> None:
    """Query blocks of two groups, single tokens in between, an empty sequence and one without a cache."""
    batch = ragged_batch(setup, (150, 1, 33, 0, 1, 17), (300, 130, 33, 5, 1, 400))
    check_ragged(batch, "mosaic_tpu", block_sizes=blocks, **options)


def attend_fused(**options: Any) -> None:
    """More sequences than writes can be under way."""
    assert np.count_nonzero(LENGTHS) > WRITES
    check_fused(BFLOAT16, LENGTHS, "mosaic_tpu", block_sizes=BLOCKS[1], **options)


def attend_several() -> None:
    attend_fused(num_queries=3, sliding_window=77)


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
    "ragged int8": "on_wait",
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


def missing_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fetcher, "wait", lambda *_: None)
    patch.setattr(Fetcher, "wait_whole", lambda *_: None)


def copied_over_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    right = Fetcher._copy

    def copy(self: Fetcher, slot: Any, *place: Any) -> Any:
        shifted = replace(self, buffer=self.buffer.at[pl.ds(1 - slot, 1)])  # of the two slots the other one
        return right(replace(shifted, arrived=self.arrived.at[pl.ds(slot, 1)]), 0, *place)

    patch.setattr(Fetcher, "_copy", copy)


@pytest.mark.parametrize("fault", [missing_wait, slowly(copied_over_what_is_in_use)])
def test_a_planted_race_is_found(fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    batch = decode_batch(BFLOAT16, LENGTHS)

    def run() -> Any:
        return decode_tpu.paged_decode_attention.__wrapped__(  # pyright: ignore[reportAttributeAccessIssue]
            batch.arguments[0][:, None],
            *batch.arguments[1:],
            scale=0.1,
            sliding_window=None,
            soft_cap=None,
            sinks=None,
            block_sizes=BLOCKS[0],
        )

    assert races_in(run, "eager", monkeypatch)


@pytest.mark.slow
def test_a_tile_whose_write_nobody_waits_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NewRows, "_wait", lambda *_: None)
    assert races_in(attend_fused, "eager", monkeypatch)


@pytest.mark.slow
def test_queries_that_nobody_waits_for_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RaggedRows.wait
    monkeypatch.setattr(RaggedRows, "wait", lambda rows, *place: right(rows, *place) if rows.write else None)
    assert races_in(attend_ragged, "eager", monkeypatch)
