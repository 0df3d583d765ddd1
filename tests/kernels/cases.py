"""Random batches over a poisoned cache, and the one comparison with the oracle that the tests here use.

Whatever must not matter holds NaN or nonsense: pages in nobody's table, rows beyond a sequence's length, rows
of queries that belong to no sequence, table entries beyond the last page, metadata of sequences not in use.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    Implementation,
    KVPages,
    append_kv,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)
from vsurge.kernels.decode import reference as decode_reference
from vsurge.kernels.quantization import is_quantized
from vsurge.kernels.ragged import reference as ragged_reference

# What is compared with the reference on this machine. An implementation for another device adds its name.
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "mosaic_tpu")

TOLERANCES = {
    "float32": 1e-5,
    "bfloat16": 8e-3,
}  # of an output row, relative to its norm; by the queries' dtype
LSE_TOLERANCE = 1e-5  # relative, or absolute below 1: scores are float32 whatever the inputs are
ROUNDED_LSE_TOLERANCE = 2.0**-9  # where weights are summed that were rounded to bfloat16
SPARE_PAGES = 4  # in nobody's table


OPTIONS: dict[str, dict[str, Any]] = {  # KV blocks have 128 tokens
    "window of 1": {"sliding_window": 1},
    "window of 7": {"sliding_window": 7},
    "window of a block": {"sliding_window": 128},
    "window beyond everything": {"sliding_window": 5000},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 100, "soft_cap": 2.0, "sinks": True},
}

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# The interpreter of kernels for TPU is slow: what other tests show as well it runs with the slow tests only.
each_implementation_slowly = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
)


def every_option() -> list[Any]:
    """Implementation, dtype and entry of OPTIONS; what is interpreted runs each alone with the slow tests."""
    cases = [
        (implementation, dtype, options)
        for implementation in IMPLEMENTATIONS
        for dtype, options in [*(("float32", options) for options in OPTIONS), ("bfloat16", "all")]
    ]
    return [
        pytest.param(*case, marks=pytest.mark.slow if case[:2] == ("mosaic_tpu", "float32") else ())
        for case in cases
    ]


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


DTYPES = [  # of queries and cache
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("float32", "float8_e4m3fn"),
]
SWEEP = [
    Setup(num_kv_heads * group, num_kv_heads, head_dim, page_size, *dtypes)
    for (num_kv_heads, group), head_dim, page_size, dtypes in itertools.product(
        [(2, 1), (2, 2), (1, 4), (1, 8)], [64, 128], [16, 64, 256], DTYPES
    )
]
QUANTIZED = (
    Setup(page_size=16, query_dtype="bfloat16", cache_dtype="int8"),
    Setup(num_q_heads=8, num_kv_heads=1, page_size=256, query_dtype="float32", cache_dtype="int8"),
    Setup(num_q_heads=3, num_kv_heads=3, page_size=64, query_dtype="float32", cache_dtype="float8_e4m3fn"),
    Setup(num_q_heads=4, num_kv_heads=1, page_size=32, query_dtype="bfloat16", cache_dtype="float8_e4m3fn"),
)

# Heads twice as wide as a register's row, or half of it; groups of 5 query heads (14B) and of 16 (235B).
GEOMETRIES = (
    Setup(num_q_heads=5, num_kv_heads=1, head_dim=256, page_size=32),
    Setup(num_q_heads=32, num_kv_heads=2, head_dim=64, page_size=64),
    Setup(num_q_heads=16, num_kv_heads=1, head_dim=256, query_dtype="bfloat16", cache_dtype="bfloat16"),
    Setup(num_q_heads=10, num_kv_heads=2, head_dim=64, query_dtype="bfloat16", cache_dtype="bfloat16"),
    Setup(num_q_heads=5, num_kv_heads=1, head_dim=256, query_dtype="bfloat16", cache_dtype="int8"),
    Setup(num_q_heads=16, num_kv_heads=1, head_dim=64, page_size=256, cache_dtype="int8"),
)

each_geometry = pytest.mark.parametrize(
    ("implementation", "setup"),
    [
        pytest.param(
            implementation,
            setup,
            marks=pytest.mark.slow if i > (1 if implementation == "mosaic_tpu" else 3) else (),
        )
        for implementation in IMPLEMENTATIONS
        for i, setup in enumerate(GEOMETRIES)
    ],
    ids=str,
)

each_quantized = pytest.mark.parametrize(
    ("implementation", "setup"),
    [
        pytest.param(implementation, setup, marks=() if sampled else pytest.mark.slow)
        for implementation in IMPLEMENTATIONS
        for setup in QUANTIZED
        for sampled in [implementation == "xla" and setup == QUANTIZED[0]]
    ],
    ids=str,
)


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
) -> RaggedBatch:
    """Sequences of `kv_lens` tokens of which the last `q_lens` are new; two padding sequences by default."""
    rng = np.random.default_rng(seed)
    used, total = len(q_lens), sum(q_lens)
    max_seqs = max_seqs or used + 2
    num_tokens = num_tokens or total + 3
    kv_pages, table = poisoned_cache(setup, kv_lens, rng, pages_per_seq, num_pages, outliers=outliers)
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
        data = jnp.where(unwritten, garbage.astype(kv_pages.data.dtype), kv_pages.data)
        kv_pages = replace(kv_pages, data=data)
    return kv_pages, table


def check_ragged(batch: RaggedBatch, implementation: Implementation, **options: Any) -> None:
    """Fails unless output and log-sum-exp of `implementation` are the reference's, within the tolerances."""
    scale = batch.setup.scale
    got = ragged_paged_attention(
        *batch.arguments, scale=scale, return_lse=True, implementation=implementation, **options
    )
    want = ragged_reference.ragged_paged_attention(*batch.arguments, scale=scale, **_all(options))
    both_bfloat16 = batch.setup.query_dtype == batch.setup.cache_dtype == "bfloat16"
    rounded = both_bfloat16 and implementation == "mosaic_tpu"
    _check(
        batch.setup,
        [np.asarray(a)[batch.owned] for a in got],
        [a[batch.owned] for a in want],
        lse_tolerance=ROUNDED_LSE_TOLERANCE if rounded else LSE_TOLERANCE,
    )


def check_decode(batch: DecodeBatch, implementation: Implementation, **options: Any) -> None:
    """As `check_ragged`."""
    scale = batch.setup.scale
    got = paged_decode_attention(
        *batch.arguments, scale=scale, return_lse=True, implementation=implementation, **options
    )
    queries, *cache = batch.arguments
    by_query = queries if queries.ndim == 4 else queries[:, None]
    want = decode_reference.paged_decode_attention(by_query, *cache, scale=scale, **_all(options))
    want = (want[0].reshape(queries.shape), want[1].reshape(queries.shape[:-1]))
    _check(batch.setup, [np.asarray(a) for a in got], list(want))


def _all(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options.get(name) for name in ("sliding_window", "soft_cap", "sinks")}


def _check(setup: Setup, got: list[Any], want: list[Any], *, lse_tolerance: float = LSE_TOLERANCE) -> None:
    assert got[0].dtype == setup.query_dtype
    assert got[1].dtype == jnp.float32
    assert_rows_close(got[0], want[0], TOLERANCES[setup.query_dtype])
    assert_lse_close(got[1], want[1], lse_tolerance)


def assert_rows_close(got: Any, want: Any, tolerance: float) -> None:
    """Each row (last axis) differs by at most `tolerance` of its norm; where `want` is zero, not at all."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    difference, norm = np.linalg.norm(got - want, axis=-1), np.linalg.norm(want, axis=-1)
    within = difference <= tolerance * norm  # false for NaN
    worst = np.max(np.divide(difference, norm, out=np.zeros_like(norm), where=norm > 0), initial=0.0)
    assert within.all(), f"{np.sum(~within)} of {within.size} rows differ, by {worst:.1e} > {tolerance:.0e}"


def assert_lse_close(got: Any, want: Any, tolerance: float = LSE_TOLERANCE) -> None:
    """Log-sum-exps agree, -inf included."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], rtol=tolerance, atol=tolerance)


def chosen(options: str, setup: Setup) -> dict[str, Any]:
    """Keywords for a kernel: an entry of OPTIONS, with the sinks themselves."""
    keywords = dict(OPTIONS[options])
    if "sinks" in keywords:
        keywords["sinks"] = sinks_of(setup)
    return keywords


def sinks_of(setup: Setup) -> jax.Array:
    """One sink per query head, of the size of a score."""
    return jnp.linspace(-1.0, 3.0, setup.num_q_heads, dtype=jnp.float32)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _nonsense(rng: np.random.Generator, shape: tuple[int, ...], num_pages: int) -> np.ndarray:
    """Page numbers of which most lie outside the pool."""
    return rng.choice([-(2**31), -7, -1, 0, num_pages - 1, num_pages, num_pages + 5, 2**31 - 1], shape)
