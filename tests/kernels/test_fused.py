"""Attention that writes the new tokens' keys and values in the same pass."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    DecodeBlocks,
    Implementation,
    KVPages,
    RaggedBlocks,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)

from .batches import Setup, ragged_batch
from .cases import each_implementation_slowly, sinks_of
from .fused import check_fused, new_slots, without

pytestmark = pytest.mark.usefixtures("small_units")

BFLOAT16 = Setup(page_size=32, query_dtype="bfloat16", cache_dtype="bfloat16")
# At the ends of tiles, pages and units, beyond them, and more sequences than writes can be under way.
LENGTHS = (300, 0, 1, 128, 129, 256, 16, 17, 32, 33, 145, 384)


@pytest.mark.parametrize(
    "implementation", ["reference", "xla", pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
)
def test_the_new_tokens_are_seen_and_kept(implementation: Implementation) -> None:
    check_fused(BFLOAT16, LENGTHS, implementation, in_cache=(3, 6))


@pytest.mark.parametrize(
    ("setup", "blocks"),
    [
        (BFLOAT16, DecodeBlocks(128, 2, 3)),
        pytest.param(BFLOAT16, DecodeBlocks(128, 1, 2), marks=pytest.mark.slow),
        pytest.param(BFLOAT16, DecodeBlocks(256, 3, 2), marks=pytest.mark.slow),
        pytest.param(Setup(page_size=8), DecodeBlocks(128, 1, 5), marks=pytest.mark.slow),
        pytest.param(Setup(8, 1, 128, 64, "float32", "bfloat16"), DecodeBlocks(128), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_with_a_window_and_any_block_sizes_too(setup: Setup, blocks: DecodeBlocks) -> None:
    check_fused(
        setup,
        LENGTHS,
        "mosaic_tpu",
        in_cache=(0,),
        sliding_window=77,
        sinks=sinks_of(setup),
        block_sizes=blocks,
    )


@pytest.mark.parametrize("implementation", ["xla", pytest.param("mosaic_tpu", marks=pytest.mark.slow)])
def test_several_new_tokens_are_written_too(implementation: Implementation) -> None:
    check_fused(BFLOAT16, LENGTHS, implementation, num_queries=3, in_cache=(4,))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_ragged_attention_writes_first(implementation: Implementation, return_lse: bool) -> None:
    setup = Setup()
    batch = ragged_batch(setup, (3, 1, 5), (60, 33, 5))
    queries, full, kv_lens, table, starts, num_seqs = batch.arguments
    slots = np.full(len(queries), -1)
    for sequence, (begin, end) in enumerate(itertools.pairwise(starts[:4].tolist())):
        [slots[begin:end]] = new_slots(kv_lens[sequence][None], table[sequence][None], end - begin, 16)
    emptied, new_kv = without(full, slots)
    attend = partial(ragged_paged_attention, scale=0.1, return_lse=return_lse, implementation=implementation)
    metadata = kv_lens, table, starts, num_seqs
    want = attend(queries, full, *metadata)
    new: dict[str, Any] = {"new_kv": new_kv, "slots": jnp.asarray(slots, jnp.int32)}
    results: Any = attend(queries, emptied, *metadata, **new)
    *got, written = results
    for result, expected in zip(got, want if return_lse else [want], strict=True):
        np.testing.assert_array_equal(result[batch.owned], expected[batch.owned])
    np.testing.assert_array_equal(written.data, full.data)


@each_implementation_slowly
def test_the_cache_is_donated(implementation: Implementation) -> None:
    kv_pages = empty_kv_pages(4, 16, 2, 16, "float32")
    row, one = jnp.ones((1, 2, 16)), jnp.ones((1,), jnp.int32)
    keywords = {"new_kv": (row, row), "slots": 16 * one, "implementation": implementation}
    paged_decode_attention(row, kv_pages, one, one[None], scale=1.0, **keywords)
    assert kv_pages.data.is_deleted()


def test_a_call_that_is_refused_leaves_the_cache_alone() -> None:
    def pages(dtype: str) -> KVPages:
        return empty_kv_pages(4, 16, 2, 64, dtype)

    lengths, table = jnp.asarray([20, 2], jnp.int32), jnp.asarray([[0, 1], [2, 3]], jnp.int32)
    options: dict[str, Any] = {"scale": 1.0, "implementation": "mosaic_tpu"}
    queries, rows = jnp.ones((5, 4, 64)), jnp.ones((5, 2, 64))
    starts, count = jnp.asarray([0, 3, 5], jnp.int32), jnp.asarray([2], jnp.int32)
    slots = jnp.asarray([17, 18, 19, 32, 33], jnp.int32)
    wrong: dict[str, Any] = {"block_sizes": RaggedBlocks(24, 128)}
    kv_pages = pages("float32")
    with pytest.raises(ValueError, match="q_tokens=24"):
        ragged_paged_attention(
            queries,
            kv_pages,
            lengths,
            table,
            starts,
            count,
            new_kv=(rows, rows),
            slots=slots,
            **options,
            **wrong,
        )
    assert not kv_pages.data.is_deleted()
    for dtype in ("float32", "int8"):  # which is written by the kernel, and before it
        kv_pages, wrong = pages(dtype), {"block_sizes": DecodeBlocks(100)}
        with pytest.raises(ValueError, match="kv_tokens=100"):
            paged_decode_attention(
                queries[:2],
                kv_pages,
                lengths,
                table,
                new_kv=(rows[:2], rows[:2]),
                slots=slots[2:4],
                **options,
                **wrong,
            )
        assert not kv_pages.data.is_deleted()
