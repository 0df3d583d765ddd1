"""Checks of attention arguments: static ones on shapes and dtypes, dynamic ones on the metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from .kv_pages import KVPages

QUERY_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(np.float32))


def check_static(
    queries: Array,
    kv_pages: KVPages,
    metadata: dict[str, tuple[Array, tuple[int, ...]]],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Array | None,
    most_queries: int | None = None,
) -> None:
    """Checks what is known before tracing.

    Args:
        queries: [rows, num_q_heads, head_dim]; or [rows, num_queries, num_q_heads, head_dim] with at most
            `most_queries`, if that is given.
        kv_pages: one layer's cache.
        metadata: name -> (array, the shape it must have); -1 stands for any size.
        scale, sliding_window, soft_cap, sinks: as in `vsurge.kernels.ragged_paged_attention`.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    if queries.ndim == 4 and most_queries is not None:
        if not 1 <= queries.shape[1] <= most_queries:
            raise ValueError(
                f"queries: {queries.shape[1]} per sequence, must be 1 to {most_queries}; "
                "ragged_paged_attention takes any number"
            )
    elif queries.ndim != 3:
        raise ValueError(f"queries: shape {queries.shape}, expected [rows, num_q_heads, head_dim]")
    if queries.dtype not in QUERY_DTYPES:
        raise ValueError(f"queries: dtype {queries.dtype}, must be one of {[d.name for d in QUERY_DTYPES]}")
    *_, num_q_heads, head_dim = queries.shape
    if head_dim != kv_pages.head_dim:
        raise ValueError(f"queries: head_dim {head_dim}, but the cache's is {kv_pages.head_dim}")
    if num_q_heads % kv_pages.num_kv_heads:
        raise ValueError(
            f"queries: {num_q_heads} query heads, must be a multiple of the {kv_pages.num_kv_heads} KV heads"
        )
    for name, (array, shape) in metadata.items():
        _check_integers(name, array, shape)
        if array.ndim == 2 and array.shape[1] == 0:
            raise ValueError(f"{name}: shape {array.shape}, needs at least one page per sequence")
    _check_options(scale, sliding_window, soft_cap)
    if sinks is not None and sinks.shape != (num_q_heads,):
        raise ValueError(f"sinks: shape {sinks.shape}, expected one per query head ({num_q_heads},)")


def check_new_kv(
    kv_pages: KVPages,
    new_kv: tuple[Array, Array] | None,
    slots: Array | None,
    *,
    tokens: tuple[int, ...],
) -> None:
    """Checks the rows that an attention kernel is to write to the cache, if any.

    Args:
        kv_pages: one layer's cache.
        new_kv, slots: as in `vsurge.kernels.paged_decode_attention`.
        tokens: the axes of the queries before num_q_heads.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    if new_kv is None or slots is None:
        if new_kv is not slots:
            given, missing = ("slots", "new_kv") if new_kv is None else ("new_kv", "slots")
            raise ValueError(f"{given} without {missing}: give both, or none of them")
        return
    _check_integers("slots", slots, tokens)
    expected = (*tokens, kv_pages.num_kv_heads, kv_pages.head_dim)
    for name, rows in zip(("keys", "values"), new_kv, strict=True):
        check_rows(f"new_kv: {name}", rows, expected)


def check_rows(name: str, rows: Array, shape: tuple[int, ...]) -> None:
    """Checks keys or values that are to be written to the cache.

    Raises:
        ValueError: another shape, or no float dtype that is written.
    """
    if rows.shape != shape:
        raise ValueError(
            f"{name}: shape {rows.shape}, expected {shape} "
            f"({', '.join(str(n) for n in shape[:-2])} tokens, KV heads, head_dim)"
        )
    if rows.dtype not in QUERY_DTYPES:
        raise ValueError(f"{name}: dtype {rows.dtype}, must be one of {[d.name for d in QUERY_DTYPES]}")


def check_has_blocks(implementation: str, block_sizes: object, kinds: Mapping[str, type]) -> None:
    """Checks that block sizes are given to an implementation that has them.

    Args:
        implementation: that was chosen.
        block_sizes: that were given.
        kinds: of which type each implementation's are.

    Raises:
        ValueError: the implementation that was chosen has none.
        TypeError: they are of another kind.
    """
    if implementation not in kinds:
        having = " and ".join(map(repr, kinds))
        raise ValueError(f"block_sizes={block_sizes!r}: {implementation!r} has none, {having} have")
    kind = kinds[implementation]
    if not isinstance(block_sizes, kind):
        raise TypeError(f"block_sizes={block_sizes!r}: must be a {kind.__name__} of {implementation!r}")


def check_traces(attend: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Has an attention make its own checks before the cache is given away to be written.

    Raises:
        ValueError: its block sizes fit neither cache nor device, say.
    """
    cast(Any, jax).eval_shape(partial(attend, **options), *arguments)


def _check_integers(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.dtype != jnp.int32:
        raise ValueError(f"{name}: dtype {array.dtype}, must be int32")
    fits = array.ndim == len(shape) and all(
        want in (-1, have) for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: shape {array.shape}, expected {shape} (-1: any size)")


def _check_options(scale: float, sliding_window: int | None, soft_cap: float | None) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale}: must be a positive number")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: must be at least 1 token, or None")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap={soft_cap}: must be a positive number, or None")


def check_metadata(
    kv_lens: ArrayLike,
    page_table: ArrayLike,
    query_starts: ArrayLike,
    num_seqs: ArrayLike,
    *,
    num_tokens: int,
    num_pages: int,
    page_size: int,
) -> None:
    """Checks the values of the metadata on the host, as `debug=True` asks for.

    Args:
        kv_lens, page_table, query_starts, num_seqs: as in `vsurge.kernels.ragged_paged_attention`.
        num_tokens: rows of queries.
        num_pages, page_size: of the cache.

    Raises:
        ValueError: names the sequence, the values and what is allowed.
    """
    lengths, table, starts = (np.asarray(a).astype(np.int64) for a in (kv_lens, page_table, query_starts))
    count = int(np.asarray(num_seqs).reshape(()))
    if not 0 <= count <= len(lengths):
        raise ValueError(f"num_seqs={count}: must lie between 0 and {len(lengths)} (max_seqs)")
    if count and starts[0] != 0:
        raise ValueError(f"query_starts[0]={starts[0]}: must be 0")
    for i in range(count):
        q_len, kv_len = int(starts[i + 1] - starts[i]), int(lengths[i])
        if not 0 <= q_len <= kv_len:
            raise ValueError(f"sequence {i}: require 0 <= {q_len=} <= {kv_len=}")
        if starts[i + 1] > num_tokens:
            raise ValueError(f"sequence {i}: its queries end at {starts[i + 1]}, beyond {num_tokens=}")
        capacity = table.shape[1] * page_size
        if kv_len > capacity:
            raise ValueError(f"sequence {i}: require {kv_len=} <= pages_per_seq * page_size = {capacity}")
        pages = table[i, : -(-kv_len // page_size)]
        if pages.size and not (pages.min() >= 0 and pages.max() < num_pages):
            raise ValueError(f"sequence {i}: pages {pages.tolist()} must lie in 0..{num_pages - 1}")


def check_metadata_when_run(
    kv_pages: KVPages,
    kv_lens: Array,
    page_table: Array,
    query_starts: Array,
    num_seqs: Array,
    *,
    num_tokens: int,
) -> None:
    """`check_metadata` now if the values are known, else when the compiled program runs.

    A failure inside a compiled program surfaces as the `jax.errors.JaxRuntimeError` of the callback, with the
    ValueError's text in it.
    """
    check = partial(
        check_metadata, num_tokens=num_tokens, num_pages=kv_pages.num_pages, page_size=kv_pages.page_size
    )
    when_run(check, kv_lens, page_table, query_starts, num_seqs)


def when_run(check: Callable[..., None], *metadata: Array) -> None:
    """Checks now if all values are known, else when the compiled program runs."""
    if any(isinstance(array, Tracer) for array in metadata):
        jax.debug.callback(check, *metadata)
    else:
        check(*metadata)
