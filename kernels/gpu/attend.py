# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The part of a Triton kernel that both attention kernels share: some queries walk a range of their sequence.

A program has a block of query rows in registers, rows of one KV head, and copies one block of that head's
keys after the other, wherever their pages lie: the address of each token's row comes from the page table. So
every page size goes at the same pace, as long as a page's rows of a head fill whole sectors of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Num

from ..blockwise import LOG2_E, MASKED, product_dtype
from ..kv_pages import KVPages
from ..quantization import FLOAT8
from .refusal import not_converted, out_of_reach

LEAST_ROWS = 16  # of a matrix that the matrix units take


class Softmax(NamedTuple):
    """An online softmax (arXiv 1805.02867) over the keys seen so far, to base 2; all float32.

    Attributes:
        highest: [rows], the largest score times log2(e).
        total: [rows], the sum of `2 ** (score - highest)`.
        weighted: [rows, head_dim], the sum of `2 ** (score - highest) * value`.
    """

    highest: Array
    total: Array
    weighted: Array


class Cache(NamedTuple):
    """References to one layer's cache: [rows, head_dim] as they lie, their scales [rows] or None, and the
    page table [sequences, pages]."""

    data: Any
    scales: Any
    page_table: Any


@dataclass(frozen=True)
class Geometry:
    """What a kernel is built for; see `vsurge.kernels.ragged_paged_attention` for the first three.

    Attributes:
        num_kv_heads, page_size: of the cache.
        dtype: what the numbers in the cache mean, which may be stored as bits.
        product_dtype: of the factors of products.
        block_tokens: keys that are visited at once, a power of two.
    """

    scale: float
    sliding_window: int | None
    soft_cap: float | None
    num_kv_heads: int
    page_size: int
    dtype: np.dtype[Any]
    product_dtype: np.dtype[Any]
    block_tokens: int

    @classmethod
    def of(cls, queries: Array, kv_pages: KVPages, block_tokens: int, **options: Any) -> Geometry:
        """That of a call with these arguments and `options`, the first three fields.

        Raises:
            ValueError: the GPU that is here does not convert the cache's numbers.
        """
        complaint = not_converted(kv_pages)
        if complaint is not None:
            raise ValueError(complaint)
        return cls(
            num_kv_heads=kv_pages.num_kv_heads,
            page_size=kv_pages.page_size,
            dtype=kv_pages.dtype,
            product_dtype=product_dtype(queries, kv_pages),
            block_tokens=block_tokens,
            **options,
        )


def flat_cache(kv_pages: KVPages) -> tuple[Array, ...]:
    """A cache's data as a list of rows and, if it has them, its scales, without a copy.

    Float8 comes as bits: Triton has no zero of it.

    Raises:
        ValueError: a kernel cannot have it.
    """
    data: Any = kv_pages.data
    head_dim = kv_pages.head_dim
    if head_dim < LEAST_ROWS or head_dim & (head_dim - 1):
        raise ValueError(
            f"kv_pages: head_dim={head_dim}, must be a power of two of at least {LEAST_ROWS} on a GPU"
        )
    scales: Any = kv_pages.scales
    if scales is not None and scales.shape[3] != kv_pages.page_size:
        raise ValueError(
            f"kv_pages: scales of {scales.shape[3]} tokens for pages of {kv_pages.page_size}, as on a TPU; "
            "make the cache on the device that keeps it"
        )
    complaint = out_of_reach(kv_pages)
    if complaint is not None:
        raise ValueError(complaint)
    if kv_pages.dtype == FLOAT8 and data.dtype == FLOAT8:
        data = lax.bitcast_convert_type(data, jnp.uint8)
    rows = data.reshape(-1, head_dim)
    return (rows,) if scales is None else (rows, scales.reshape(-1))


def cache_row(geometry: Geometry, page: Array, head: Array, kind: int) -> Array:
    """Where the rows of a page's keys (kind 0) or values (1) of a head begin."""
    return ((2 * page + kind) * geometry.num_kv_heads + head) * geometry.page_size


def empty_softmax(rows: int, head_dim: int) -> Softmax:
    return Softmax(
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )


def attend_range(
    geometry: Geometry,
    cache: Cache,
    queries: Num[Array, "rows head_dim"],
    positions: Int[Array, " rows"],
    sequence: Int[Array, ""],
    head: Int[Array, ""],
    first: Int[Array, ""],
    end: Int[Array, ""],
) -> Softmax:
    """The softmax of some queries over their sequence's keys from position `first` up to `end`.

    Args:
        geometry: of the kernel.
        cache: references.
        queries: of the dtype to multiply in.
        positions: a query sees keys up to its own position, as far as the window reaches; -1 sees none.
        sequence: a row of the page table.
        head: a KV head.
        first, end: keys outside are not read.
    """
    block = geometry.block_tokens
    offsets = jnp.arange(block, dtype=jnp.int32)
    everybody_sees_up_to = jnp.min(positions) + 1

    def visit(at: Array, softmax: Softmax, *, masked: bool) -> Softmax:
        places = at * block + offsets
        read = (places >= first) & (places < end) if masked else None
        keys, key_scales, values, value_scales = _load(geometry, cache, sequence, head, places, read)
        scores = _dot(queries, keys.T) * geometry.scale
        if key_scales is not None:
            scores *= key_scales[None, :]
        if geometry.soft_cap is not None:
            scores = geometry.soft_cap * jnp.tanh(scores / geometry.soft_cap)
        scores *= LOG2_E
        if read is not None:
            seen = read[None, :] & (places[None, :] <= positions[:, None])
            if geometry.sliding_window is not None:
                seen &= places[None, :] > positions[:, None] - geometry.sliding_window
            scores = jnp.where(seen, scores, MASKED)
        highest = jnp.maximum(softmax.highest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - highest[:, None])
        keep = jnp.exp2(softmax.highest - highest)
        total = softmax.total * keep + jnp.sum(weights, axis=1)
        if value_scales is not None:
            weights *= value_scales[None, :]
        weighted = softmax.weighted * keep[:, None] + _dot(weights.astype(geometry.product_dtype), values)
        return Softmax(highest, total, weighted)

    def visit_masked(at: Array, softmax: Softmax) -> Softmax:
        return visit(at, softmax, masked=True)

    def visit_whole(at: Array, softmax: Softmax) -> Softmax:
        return visit(at, softmax, masked=False)

    begin, until = first // block, (end + block - 1) // block
    softmax = empty_softmax(*queries.shape)
    if geometry.sliding_window is None:  # with a window nearly every block needs its masks
        # blocks that all of them see, but for a first one that is not read from its beginning
        whole = jnp.maximum(jnp.minimum(everybody_sees_up_to, end) // block, begin)
        begin_whole = jnp.minimum((first + block - 1) // block, whole)
        softmax = cast(Softmax, lax.fori_loop(begin, begin_whole, visit_masked, softmax))
        softmax = cast(Softmax, lax.fori_loop(begin_whole, whole, visit_whole, softmax))
        begin = whole
    return cast(Softmax, lax.fori_loop(begin, until, visit_masked, softmax))


def _load(
    geometry: Geometry,
    cache: Cache,
    sequence: Array,
    head: Array,
    places: Int[Array, " block"],
    read: Bool[Array, " block"] | None,
) -> tuple[Array, Array | None, Array, Array | None]:
    """Keys and values at some positions, and their scales; zero where they are not to be read."""
    block, page_size = geometry.block_tokens, geometry.page_size
    pages = plgpu.load(cache.page_table.at[sequence, places // page_size], mask=read, other=_zero(read))
    columns = jnp.arange(cache.data.shape[1], dtype=jnp.int32)
    found: list[Any] = []
    for kind in (0, 1):
        rows = cache_row(geometry, pages, head, kind) + places % page_size
        mask = None if read is None else jnp.broadcast_to(read[:, None], (block, cache.data.shape[1]))
        stored = plgpu.load(cache.data.at[rows[:, None], columns[None, :]], mask=mask, other=_zero(read))
        found.append(_numbers(geometry, stored))
        scales = cache.scales
        found.append(None if scales is None else plgpu.load(scales.at[rows], mask=read, other=_zero(read)))
    return cast(Any, tuple(found))


def _zero(read: Array | None) -> int | None:
    return None if read is None else 0


def _numbers(geometry: Geometry, stored: Array) -> Array:
    if stored.dtype != geometry.dtype:
        stored = lax.bitcast_convert_type(stored, geometry.dtype)
    return stored.astype(geometry.product_dtype)


def _dot(left: Array, right: Array) -> Float[Array, "rows columns"]:
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot(left, right, precision=precision, preferred_element_type=jnp.float32)


def padded_rows(rows: int) -> int:
    """The power of two that has room for so many rows of queries."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())
