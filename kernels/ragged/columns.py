# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""A query block against a piece of the cache, inside a kernel for TPU.

A KV head's queries of a block are the columns of one product: scores are [tokens, columns], so that the
softmax runs down the columns, sums of weights come out of the matrix unit as one more row of the values, and
nothing has to be spread over the lanes of a register. While one head's weights are computed, the matrix unit
already makes the next head's scores.

Of a quantized cache the scales of a unit are transposed once, tokens down the sublanes. Then scores and
weights are multiplied with a head's column of them, and the weights are summed before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..blockwise import MASKED
from ..kv_pages import KEYS, VALUES, KVPages, decode_bits
from ..tpu.control import for_each
from ..tpu.products import dot
from ..tpu.shapes import SUBLANES
from ..tpu.units import REST, TOKENS, Fetcher

LOG2_E = math.log2(math.e)
CHUNK = 512  # tokens whose scores make one product, at most
MASKED_HEADS = 4  # KV heads in straight-line code where it is compiled for several widths


@dataclass(frozen=True)
class Attention:
    """What the kernel computes, besides the cutting.

    Attributes:
        num_kv_heads, group: KV heads, and query heads of each.
        q_tokens: query tokens in a block, at most; a KV head has group * q_tokens columns.
        scale, soft_cap, sliding_window: as in `vsurge.kernels.ragged_paged_attention`.
        dtype: of the factors of products, bfloat16 or float32.
    """

    num_kv_heads: int
    group: int
    q_tokens: int
    scale: float
    soft_cap: float | None
    sliding_window: int | None
    dtype: Any

    @property
    def columns(self) -> int:
        return self.group * self.q_tokens


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

    def reset(self, sinks: Any) -> None:
        """Begins with the sinks, scores without a value; MASKED is none."""
        self.highest[...] = sinks[...]
        self.total[...] = jnp.where(sinks[...] > MASKED, 1.0, 0.0).astype(jnp.float32)
        self.weighted[...] = jnp.zeros(self.weighted.shape, jnp.float32)

    def raise_to(self, head: Any, highest: Any) -> tuple[Any, Any]:
        """The highest score of a head's columns with `highest`, and what the sums so far then count."""
        old = self.highest[head]
        new = jnp.maximum(old, highest)
        self.highest[head] = new
        return new, jnp.exp2(old - new)

    def add(self, head: Any, keep: Any, sums: Any) -> None:
        """Adds [head_dim + SUBLANES, columns]: weighted values, and below them the weights' sums."""
        head_dim = self.weighted.shape[1]
        self.total[head] = self.total[head] * keep + sums[head_dim : head_dim + 1]
        self.weighted[head] = self.weighted[head] * keep + sums[:head_dim]


def column_of(columns: Any, head: Any) -> Any:
    """A head's column [tokens, 1] of [tokens, num_kv_heads], which may hold NaN elsewhere."""
    if isinstance(head, int):
        return columns[:, head : head + 1]
    here = lax.broadcasted_iota(jnp.int32, columns.shape, 1) == head
    return jnp.sum(jnp.where(here, columns, 0.0), axis=1, keepdims=True)


def zero_behind(rows: Any, count: Any) -> Any:
    """The first `count` rows; what lies behind them may be NaN, as is 0 times that."""
    held = lax.broadcasted_iota(jnp.int32, rows.shape, 0) < count
    return jnp.where(held, rows, jnp.zeros_like(rows))


def weighted_sums(values: Any, scales: Any, weights: Any) -> Any:
    """Sums over tokens [head_dim + SUBLANES, columns]: weighted values, and below them the weights alone.

    Args:
        values: [tokens, head_dim].
        scales: of the values, [tokens, 1] float32, or None.
        weights: [tokens, columns] float32.
    """
    if scales is None:
        ones = jnp.ones((SUBLANES, values.shape[0]), values.dtype)
        return dot(jnp.concatenate([values.T, ones]), weights.astype(values.dtype), contract=(1, 0))
    total = jnp.sum(weights, axis=0, keepdims=True)
    weighted = dot(values.T, (weights * scales).astype(values.dtype), contract=(1, 0))
    return jnp.concatenate([weighted, jnp.broadcast_to(total, (SUBLANES, total.shape[1]))])


def attend(
    attention: Attention,
    kv_pages: KVPages,
    fetcher: Fetcher,
    queries: Any,
    softmax: Softmax,
    count: Any,
    slot: Any,
    width: int,
    seen_by_all: int,
) -> None:
    """Adds the first `width` tokens of a slot's unit to the softmax of a block.

    Args:
        attention, kv_pages: static.
        queries: [num_kv_heads, columns, head_dim].
        count: query tokens of the block.
        slot: of the unit.
        width, seen_by_all: static; of the first `seen_by_all` tokens it is known that all queries see them.
    """
    unit, block = fetcher.units_in.at[slot, 0], fetcher.buffer.at[slot, 0]
    chunk = width // -(-width // CHUNK)
    parts = [slice(begin, begin + chunk) for begin in range(0, width, chunk)]
    quantized = fetcher.scales is not None
    scales = [fetcher.scales_of(slot, 0, kind, width).T for kind in (KEYS, VALUES)] if quantized else []

    def loaded(kind: int, head: Any, part: slice) -> Any:
        return decode_bits(kv_pages, block[kind, head, part]).astype(attention.dtype)

    def scores(head: Any, part: slice) -> Any:
        found = dot(loaded(KEYS, head, part), queries[head], contract=(1, 1))
        if quantized:
            found *= column_of(scales[KEYS][part], head)
        if attention.soft_cap is None:
            found *= attention.scale * LOG2_E
        else:
            found = attention.soft_cap * LOG2_E * jnp.tanh(found * (attention.scale / attention.soft_cap))
        if part.stop <= seen_by_all:
            return found
        token = lax.broadcasted_iota(jnp.int32, found.shape, 0) + part.start
        column = lax.broadcasted_iota(jnp.int32, (1, attention.columns), 1)
        beyond = unit[REST] - count + 1 + lax.rem(column, attention.q_tokens)  # the first unseen token
        seen = token < beyond
        if attention.sliding_window is not None:
            seen &= token >= beyond - attention.sliding_window
        return jnp.where(seen, found, MASKED)

    def sums_of(head: Any, part: slice, weights: Any) -> Any:
        values = loaded(VALUES, head, part)
        value_scales = column_of(scales[VALUES][part], head) if quantized else None
        if part.stop > seen_by_all:
            values = zero_behind(values, unit[TOKENS] - part.start)
            value_scales = zero_behind(value_scales, unit[TOKENS] - part.start) if quantized else None
        return weighted_sums(values, value_scales, weights)

    def add(head: Any, these: list[Any], begin_next: Callable[[slice], None]) -> None:
        most = these[0]
        for others in these[1:]:
            most = jnp.maximum(most, others)
        highest, keep = softmax.raise_to(head, jnp.max(most, axis=0, keepdims=True))
        sums: Any = 0.0
        for part, part_scores in zip(parts, these, strict=True):
            begin_next(part)
            sums += sums_of(head, part, jnp.exp2(part_scores - highest))
        softmax.add(head, keep, sums)

    def run(heads: Sequence[Any]) -> None:
        """These heads one after the other, each beside the next one's scores."""
        coming = [scores(heads[0], part) for part in parts]
        for head, following in zip_longest(heads, heads[1:]):
            these, coming = coming, list[Any]()

            def begin_next(part: slice, following: Any = following, coming: list[Any] = coming) -> None:
                if following is not None:
                    coming.append(scores(following, part))

            add(head, these, begin_next)

    heads = attention.num_kv_heads
    together = heads if seen_by_all >= width else math.gcd(heads, MASKED_HEADS)
    if together == heads:
        run(range(heads))
    else:
        for_each(0, heads // together, lambda i: run([together * i + j for j in range(together)]))
