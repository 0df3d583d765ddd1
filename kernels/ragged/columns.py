# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""A query block against a piece of the cache, inside a kernel for TPU.

A KV head's queries of a block are the columns of one product: scores are [tokens, columns], so that the
softmax runs down the columns, sums of weights come out of the matrix unit as one more row of the values, and
nothing has to be spread over the lanes of a register. While one head's weights are computed, the matrix unit
already makes the next head's scores.

Of a quantized cache the scales of a unit are transposed once, tokens down the sublanes. Scores are multiplied
with a head's column of them. The values are multiplied themselves, and not the weights: hundreds of columns
share them, and the ones below them sum the weights. That rounds them again, by less than quantization did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..blockwise import LOG2_E, MASKED
from ..kv_pages import KEYS, VALUES, KVPages, decode_bits
from ..tpu.control import largest
from ..tpu.fetcher import REST, TOKENS, Fetcher
from ..tpu.products import dot
from ..tpu.shapes import LANES, SUBLANES
from .heads import Heads
from .items import Item, items_of, take_in_turn


@dataclass(frozen=True)
class Attention:
    """What the kernel computes, besides the cutting.

    Attributes:
        heads: which columns there are.
        scale, soft_cap, sliding_window: as in `vsurge.kernels.ragged_paged_attention`.
        dtype: of the factors of products, bfloat16 or float32.
    """

    heads: Heads
    scale: float
    soft_cap: float | None
    sliding_window: int | None
    dtype: Any


@dataclass(frozen=True)
class Softmax:
    """The running softmax of a block's columns in VMEM, all float32, to the base of 2.

    Attributes:
        highest, total: [num_kv_heads, 1, columns], the largest score, and the sum of `2^(score - highest)`.
        weighted: [num_kv_heads, head_dim, columns], the sum of `2^(score - highest) * value`.
    """

    highest: Any
    total: Any
    weighted: Any

    def clear(self) -> None:
        """Once before all blocks."""
        self.weighted[...] = jnp.zeros(self.weighted.shape, jnp.float32)

    def reset(self) -> None:
        """Begins a block."""
        self.highest[...] = jnp.full(self.highest.shape, MASKED, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)

    def take(self, head: int, part: slice) -> Any:
        """The weighted values of some columns, which are zero from now on."""
        taken = self.weighted[head, :, part]
        self.weighted[head, :, part] = jnp.zeros(taken.shape, jnp.float32)
        return taken

    def with_sinks(self, head: int, part: slice, sinks: Any) -> tuple[Any, Any, Any]:
        """The highest score and the sum of some columns with their sinks, and what `weighted` then counts.

        Args:
            sinks: [num_kv_heads, 1, columns], scores without a value; MASKED for none.
        """
        old, sink = self.highest[head, :, part], sinks[head, :, part]
        new = jnp.maximum(old, sink)
        keep = jnp.exp2(old - new)
        return (
            new,
            self.total[head, :, part] * keep + jnp.where(sink > MASKED, jnp.exp2(sink - new), 0.0),
            keep,
        )

    def raise_to(self, head: Any, part: slice, highest: Any) -> tuple[Any, Any]:
        """The highest score of a head's columns with `highest`, and what the sums so far then count."""
        old = self.highest[head, :, part]
        new = jnp.maximum(old, highest)
        self.highest[head, :, part] = new
        return new, jnp.exp2(old - new)

    def add(self, head: Any, part: slice, keep: Any, sums: Any) -> None:
        """Adds [head_dim + SUBLANES, columns]: weighted values, and below them the weights' sums."""
        head_dim = self.weighted.shape[1]
        self.total[head, :, part] = self.total[head, :, part] * keep + sums[head_dim : head_dim + 1]
        self.weighted[head, :, part] = self.weighted[head, :, part] * keep + sums[:head_dim]


def column_of(columns: Any, head: int) -> Any:
    """A head's column [tokens, 1] of [tokens, num_kv_heads]."""
    return columns[:, head : head + 1]


def zero_behind(rows: Any, count: Any) -> Any:
    """The first `count` rows; what lies behind them may be NaN, as is 0 times that."""
    held = lax.broadcasted_iota(jnp.int32, rows.shape, 0) < count
    return jnp.where(held, rows, jnp.zeros_like(rows))


def scales_of_unit(fetcher: Fetcher, slot: Any, start: Any, width: int, factor: float) -> tuple[Any, ...]:
    """Scales [width, num_kv_heads] of a unit's keys, times a factor, and of its values; none without any."""
    if fetcher.scales is None:
        return ()
    keys, values = (fetcher.scales_of(slot, 0, kind, width, start).T for kind in (KEYS, VALUES))
    return keys * factor, values


def attend(
    attention: Attention,
    kv_pages: KVPages,
    fetcher: Fetcher,
    queries: Any,
    softmax: Softmax,
    waiting: Any,
    count: Any,
    slot: Any,
    start: Any,
    width: int,
    seen_by_all: int,
) -> None:
    """Adds `width` tokens of a slot's unit to the softmax of a block.

    Args:
        attention, kv_pages: static.
        queries: the block's, `Heads.scratch`.
        softmax: the block's.
        waiting: [waiting_rows, columns at once] float32 in VMEM, for scores.
        count: query tokens of the block.
        slot: of the unit.
        start: the first token, a multiple of PIECE.
        width, seen_by_all: static; of the first `seen_by_all` tokens it is known that all queries see them.
    """
    unit, block, heads = fetcher.units_in.at[slot, 0], fetcher.buffer.at[slot, 0], attention.heads
    lanes = heads.at_once
    factor = attention.scale * LOG2_E if attention.soft_cap is None else attention.scale / attention.soft_cap
    scales = scales_of_unit(fetcher, slot, start, width, factor)

    def loaded(kind: int, head: int, part: slice) -> Any:
        """Keys without their scales, or values with them, [tokens, head_dim]."""
        place = pl.ds(start + part.start, part.stop - part.start)
        rows = decode_bits(kv_pages, block[kind, head, place])
        if scales and kind == VALUES:
            rows = rows.astype(jnp.float32) * column_of(scales[VALUES][part], head)
        return rows.astype(attention.dtype)

    def masked_from(part: slice) -> int:
        """The place in a part where tokens may be unseen."""
        return max(0, min(seen_by_all, part.stop - LANES) // LANES * LANES - part.start)

    def scores(item: Item, part: slice) -> Any:
        found = masked(item, part, products(item, part))
        waiting[item.rows(part)] = found
        return jnp.max(found, axis=0, keepdims=True)

    def products(item: Item, part: slice) -> Any:
        columns = heads.columns_of(item.head, item.columns, queries)
        found = dot(loaded(KEYS, item.head, part), columns.astype(attention.dtype), contract=(1, 1))
        found *= column_of(scales[KEYS][part], item.head) if scales else factor
        return found if attention.soft_cap is None else attention.soft_cap * LOG2_E * jnp.tanh(found)

    def masked(item: Item, part: slice, found: Any) -> Any:
        if part.stop <= seen_by_all:
            return found
        first = masked_from(part)
        last = found[first:]
        token = lax.broadcasted_iota(jnp.int32, last.shape, 0) + (part.start + first)
        column = lax.broadcasted_iota(jnp.int32, (1, lanes), 1) + item.columns.start
        beyond = unit[REST] - start - count + 1 + heads.token(column)  # the first unseen token
        seen = token < beyond
        if attention.sliding_window is not None:
            seen &= token >= beyond - attention.sliding_window
        last = jnp.where(seen, last, MASKED)
        return jnp.concatenate([found[:first], last]) if first else last

    def held(rows: Any, part: slice) -> Any:
        """Rows of a part; what lies behind the tokens, which may be NaN, as zeros: 0 times NaN is NaN."""
        if part.stop <= seen_by_all:
            return rows
        first = masked_from(part)
        last = zero_behind(rows[first:], unit[TOKENS] - start - (part.start + first))
        return jnp.concatenate([rows[:first], last]) if first else last

    def operand(head: int, part: slice) -> Any:
        """Values [head_dim + SUBLANES, tokens], with ones at the end, by which a product sums the weights."""
        values = held(loaded(VALUES, head, part), part).T
        return jnp.concatenate([values, jnp.ones((SUBLANES, values.shape[1]), values.dtype)])

    values = list[Any]()  # of the head and the piece in use

    def add(item: Item, highests: list[Any], begin_later: Callable[[int], None]) -> None:
        if item.columns.start == 0:
            values[:] = [operand(item.head, part) for part in item.parts]
        highest, keep = softmax.raise_to(item.head, item.columns, largest(highests))
        sums: Any = 0.0
        for i, part in enumerate(item.parts):
            begin_later(i)
            weights = jnp.exp2(waiting[item.rows(part)] - highest).astype(attention.dtype)
            sums += dot(values[i], weights, contract=(1, 0))
        softmax.add(item.head, item.columns, keep, sums)

    take_in_turn(width, items_of(width, heads.num_kv_heads, heads.columns, lanes), scores, add)
