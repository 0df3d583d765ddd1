"""Random batches over a poisoned cache.

Whatever must not matter holds NaN or nonsense: pages in nobody's table, rows beyond a sequence's length, rows
of queries that belong to no sequence, table entries beyond the last page, metadata of sequences not in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vsurge.kernels import KVPages, append_kv, empty_kv_pages
from vsurge.kernels.quantization import is_quantized

SPARE_PAGES = 4  # in nobody's table


@dataclass(frozen=True)
class Setup:
    """Shapes and dtypes of a kernel call; the id of a parametrized test."""

    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    query_dtype: str = "float32"
    cache_dtype: str = "float32"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def __str__(self) -> str:
        heads = f"{self.num_q_heads}q{self.num_kv_heads}kv{self.head_dim}d"
        return f"{heads}-page{self.page_size}-{self.query_dtype}-{self.cache_dtype}"


@dataclass(frozen=True)
class RaggedBatch:
    """Arguments of `ragged_paged_attention`, and which rows of queries belong to a sequence."""

    setup: Setup
    arguments: tuple[Any, ...]
    owned: slice


@dataclass(frozen=True)
class DecodeBatch:
    """Arguments of `paged_decode_attention`."""

    setup: Setup
    arguments: tuple[Any, ...]


def ragged_batch(
    setup: Setup,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    seed: int = 0,
    max_seqs: int | None = None,
    num_tokens: int | None = None,
    pages_per_seq: int | None = None,
    num_pages: int | None = None,
    outliers: bool = False,
    share: bool = True,
) -> RaggedBatch:
    """Sequences of `kv_lens` tokens of which the last `q_lens` are new; two padding sequences by default."""
    rng = np.random.default_rng(seed)
    used, total = len(q_lens), sum(q_lens)
    max_seqs = max_seqs or used + 2
    num_tokens = num_tokens or total + 3
    kv_pages, table = poisoned_cache(
        setup, kv_lens, rng, pages_per_seq, num_pages, outliers=outliers, share=share
    )
    padding = max_seqs - used
    lengths = np.concatenate([kv_lens, rng.integers(-5, 10**6, padding)])
    starts = np.concatenate([[0], np.cumsum(q_lens), rng.integers(-(10**6), 10**6, padding)])
    table = np.concatenate([table, _nonsense(rng, (padding, table.shape[1]), kv_pages.num_pages)])
    queries = _normal(rng, (num_tokens, setup.num_q_heads, setup.head_dim))
    queries[total:] = np.nan
    arguments = (
        jnp.asarray(queries, setup.query_dtype),
        kv_pages,
        *(jnp.asarray(array, jnp.int32) for array in (lengths, table, starts, [used])),
    )
    return RaggedBatch(setup, arguments, slice(0, total))


def decode_batch(
    setup: Setup,
    kv_lens: Sequence[int],
    *,
    num_queries: int | None = None,
    seed: int = 0,
    outliers: bool = False,
    share: bool = True,
    **sizes: int,
) -> DecodeBatch:
    """One new token per sequence, or several on an axis of their own; a length of 0 is padding."""
    rng = np.random.default_rng(seed)
    kv_pages, table = poisoned_cache(
        setup,
        kv_lens,
        rng,
        sizes.get("pages_per_seq"),
        sizes.get("num_pages"),
        outliers=outliers,
        share=share,
    )
    queries = _normal(rng, (len(kv_lens), num_queries or 1, setup.num_q_heads, setup.head_dim))
    for sequence, kv_len in enumerate(kv_lens):
        queries[sequence, : max(0, queries.shape[1] - kv_len)] = np.nan  # before the sequence's begin
    queries = queries[:, 0] if num_queries is None else queries
    arguments = (
        jnp.asarray(queries, setup.query_dtype),
        kv_pages,
        jnp.asarray(kv_lens, jnp.int32),
        jnp.asarray(table, jnp.int32),
    )
    return DecodeBatch(setup, arguments)


def poisoned_cache(
    setup: Setup,
    kv_lens: Sequence[int],
    rng: np.random.Generator,
    pages_per_seq: int | None = None,
    num_pages: int | None = None,
    *,
    outliers: bool = False,
    share: bool = True,
) -> tuple[KVPages, np.ndarray]:
    """A cache of NaN with normal numbers where a sequence has tokens, and a shuffled page table.

    Every second sequence shares pages with the one before it, if `share`.
    """
    page_size = setup.page_size
    needed = [-(-kv_len // page_size) for kv_len in kv_lens]
    pages_per_seq = pages_per_seq or max(needed, default=0) + 2
    num_pages = num_pages or sum(needed) + SPARE_PAGES
    pool = iter(rng.permutation(num_pages).tolist())
    table = _nonsense(rng, (len(kv_lens), pages_per_seq), num_pages)
    for sequence, count in enumerate(needed):
        shared = min(count, needed[sequence - 1]) // 2 + 1 if sequence % 2 and share else 0
        shared = min(shared, count, needed[sequence - 1])
        table[sequence, :shared] = table[sequence - 1, :shared]
        table[sequence, shared:count] = [next(pool) for _ in range(count - shared)]
    written = sorted(
        {
            int(table[sequence, token // page_size]) * page_size + token % page_size
            for sequence, kv_len in enumerate(kv_lens)
            for token in range(kv_len)
        }
    )
    rows = (num_pages * page_size, setup.num_kv_heads, setup.head_dim)
    quantized = is_quantized(jnp.dtype(setup.cache_dtype))
    keys, values = np.full(rows, np.nan), np.full(rows, np.nan)
    keys[written] = _normal(rng, (len(written), *rows[1:]))
    values[written] = _normal(rng, (len(written), *rows[1:]))
    if outliers:  # some channels of the keys, and some tokens' values, far larger than the rest
        keys[:, :, :: setup.head_dim // 2] *= 8.0
        values[::13] *= 50.0
    empty = empty_kv_pages(num_pages, page_size, setup.num_kv_heads, setup.head_dim, setup.cache_dtype)
    slots = jnp.arange(rows[0], dtype=jnp.int32)
    row_dtype = "float32" if quantized else setup.cache_dtype
    keys, values = (jnp.asarray(array, row_dtype) for array in (keys, values))
    kv_pages = append_kv(empty, keys, values, slots, implementation="reference")
    if quantized:  # of rows of NaN it holds scales of NaN and zeros
        unwritten = np.isin(slots, written, invert=True).reshape(num_pages, 1, 1, page_size, 1)
        garbage = jnp.asarray(rng.integers(0, 256, kv_pages.data.shape), jnp.uint8)
        if setup.cache_dtype != "int8":  # float8 has NaN
            garbage |= 0x7F
        garbage = jax.lax.bitcast_convert_type(garbage, kv_pages.data.dtype)
        data = jnp.where(unwritten, garbage, kv_pages.data)
        kv_pages = replace(kv_pages, data=data)
    return kv_pages, table


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _nonsense(rng: np.random.Generator, shape: tuple[int, ...], num_pages: int) -> np.ndarray:
    """Page numbers of which most lie outside the pool."""
    return rng.choice([-(2**31), -7, -1, 0, num_pages - 1, num_pages, num_pages + 5, 2**31 - 1], shape)
