"""A second oracle, by other people: what jax ships for attention over pages.

Its reference function for ragged paged attention knows windows and soft caps; it has neither sinks nor a
log-sum-exp, computes in its arguments' dtype and takes only sequences with tokens. Of its kernels for TPU the
one for decoding runs in the interpreter and serves too; it multiplies in bfloat16 whatever it is given. The
ragged one does not run there (jax 0.10.2: "'ReshapeTransform' object has no attribute 'indices'").
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from vsurge.kernels import (
    Implementation,
    KVPages,
    RaggedBlocks,
    paged_decode_attention,
    ragged_paged_attention,
    read_kv,
)

from .batches import RaggedBatch, Setup, decode_batch, ragged_batch
from .cases import IMPLEMENTATIONS, TOLERANCES, assert_rows_close

pytestmark = pytest.mark.usefixtures("small_units")

SETUPS = {
    "float32": Setup(),
    "bfloat16": Setup(8, 2, 128, 32, query_dtype="bfloat16", cache_dtype="bfloat16"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 50},
    "soft cap": {"soft_cap": 1.5},
    "both": {"sliding_window": 9, "soft_cap": 3.0},
}
Q_LENS, KV_LENS = (3, 20, 1), (150, 20, 77)  # a chunk, a prompt, a single token
SAMPLE = [("float32", "both", False), ("bfloat16", "window", False)]  # for a run without the slow tests
BLOCKS = RaggedBlocks(16, 128, 2)


def keys_and_values(kv_pages: KVPages) -> tuple[jax.Array, jax.Array]:
    """Each [num_pages, page_size, num_kv_heads, head_dim]."""
    slots = jnp.arange(kv_pages.num_pages * kv_pages.page_size, dtype=jnp.int32)
    shape = (kv_pages.num_pages, kv_pages.page_size, kv_pages.num_kv_heads, kv_pages.head_dim)
    keys, values = read_kv(kv_pages, slots)
    return keys.reshape(shape), values.reshape(shape)


def by_jax(batch: RaggedBatch, **options: Any) -> jax.Array:
    queries, kv_pages, *metadata = batch.arguments
    lengths: list[Any] = [np.asarray(array) for array in metadata]  # known while it is traced

    @jax.jit
    def attend(queries: Any, keys: Any, values: Any) -> Any:
        shape = (kv_pages.num_pages, kv_pages.page_size, 2 * kv_pages.num_kv_heads, kv_pages.head_dim)
        pages = jnp.stack([keys, values], axis=3).reshape(shape)  # of each head its keys, then its values
        return ref_ragged_paged_attention(queries, pages, *lengths, sm_scale=batch.setup.scale, **options)

    return attend(queries, *keys_and_values(kv_pages))


@pytest.mark.parametrize(
    ("dtype", "options", "interpreted"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow)
        for case in itertools.product(SETUPS, OPTIONS, [False, True])
    ],
)
def test_ragged_attention_is_jaxs(dtype: str, options: str, interpreted: bool) -> None:
    batch = ragged_batch(SETUPS[dtype], Q_LENS, KV_LENS)
    want = by_jax(batch, **OPTIONS[options])

    def compare(implementation: Implementation, **blocks: Any) -> None:
        keywords = {"implementation": implementation, **OPTIONS[options], **blocks}
        got = ragged_paged_attention(*batch.arguments, scale=batch.setup.scale, **keywords)
        assert_rows_close(np.asarray(got)[batch.owned], want, TOLERANCES[dtype])

    if interpreted:
        compare("mosaic_tpu", block_sizes=BLOCKS)
    else:
        compare("reference")
        compare("xla")


def test_decoding_is_jaxs_kernel() -> None:
    setup = SETUPS["bfloat16"]
    queries, kv_pages, kv_lens, page_table = decode_batch(setup, (150, 40, 1, 130)).arguments
    keys, values = (jnp.nan_to_num(rows).transpose(2, 0, 1, 3) for rows in keys_and_values(kv_pages))
    table = jnp.clip(page_table, 0, kv_pages.num_pages - 1)  # it reads all pages
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % 4)))
    scaled = queries.astype(jnp.float32) * setup.scale  # it has no scale
    lenient = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with lenient[0], lenient[1], pltpu.force_tpu_interpret_mode():
        want = paged_attention(scaled, keys, values, kv_lens, table, pages_per_compute_block=4)
    for implementation in ("reference", *IMPLEMENTATIONS):
        got = paged_decode_attention(
            queries, kv_pages, kv_lens, page_table, scale=setup.scale, implementation=implementation
        )
        assert_rows_close(got, want, TOLERANCES["bfloat16"])
