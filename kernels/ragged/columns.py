# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""A query block against a piece of the cache, inside a kernel for TPU.

A KV head's queries of a block are the columns of one product: scores are [tokens, columns], so that the
softmax runs down the columns, sums of weights come out of the matrix unit as one more row of the values, and
nothing has to be spread over the lanes of a register. While one head's weights are computed, the matrix unit
already makes the next head's scores.
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
from ..tpu.control import for_each, largest
from ..tpu.products import dot
from ..tpu.shapes import LANES, SUBLANES, padded
from ..tpu.units import REST, TOKENS, Fetcher
from .heads import Heads

LOG2_E = math.log2(math.e)
CHUNK = 512  # tokens whose scores make one product, at most
MASKED_HEADS = 4  # KV heads in straight-line code where it is compiled for several widths


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

    def reset(self) -> None:
        """Begins a block. What is in `weighted` counts nothing beside the first score, see `add`."""
        self.highest[...] = jnp.full(self.highest.shape, MASKED, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)

    def clear(self) -> None:
        """For a block without scores."""
        self.weighted[...] = jnp.zeros(self.weighted.shape, jnp.float32)

    def with_sinks(self, head: int, part: slice, sinks: Any) -> tuple[Any, Any, Any]:
        """The highest score and the sum of some columns with their sinks, and what `weighted` then counts.

        Args:
            sinks: [num_kv_heads, 1, columns], scores without a value; MASKED for none.
        """
        old, sink = self.highest[head, :, part], sinks[head, :, part]
        new = jnp.maximum(old, sink)
        keep = jnp.exp2(old - new)
        return new, self.total[head, :, part] * keep + jnp.where(sink > MASKED, jnp.exp2(sink - new), 0.0), keep

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
        kept = jnp.where(keep > 0, self.weighted[head] * keep, 0.0)  # 0 times another block's NaN is NaN
        self.weighted[head] = kept + sums[:head_dim]


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
        queries: the block's, `Heads.scratch`.
        count: query tokens of the block.
        slot: of the unit.
        width, seen_by_all: static; of the first `seen_by_all` tokens it is known that all queries see them.
    """
    unit, block = fetcher.units_in.at[slot, 0], fetcher.buffer.at[slot, 0]
    size = padded(-(-width // -(-width // CHUNK)))
    parts = [slice(begin, min(begin + size, width)) for begin in range(0, width, size)]

    def loaded(kind: int, head: Any, part: slice) -> Any:
        return decode_bits(kv_pages, block[kind, head, part]).astype(attention.dtype)

    def scores(head: Any, part: slice) -> Any:
        columns = attention.heads.columns_of(head, queries).astype(attention.dtype)
        found = dot(loaded(KEYS, head, part), columns, contract=(1, 1))
        if attention.soft_cap is None:
            found *= attention.scale * LOG2_E
        else:
            found = attention.soft_cap * LOG2_E * jnp.tanh(found * (attention.scale / attention.soft_cap))
        if part.stop <= seen_by_all:
            return found
        first = max(0, min(seen_by_all, part.stop - LANES) // LANES * LANES - part.start)
        last = found[first:]
        token = lax.broadcasted_iota(jnp.int32, last.shape, 0) + (part.start + first)
        column = lax.broadcasted_iota(jnp.int32, (1, attention.heads.columns), 1)
        beyond = unit[REST] - count + 1 + attention.heads.token(column)  # the first unseen token
        seen = token < beyond
        if attention.sliding_window is not None:
            seen &= token >= beyond - attention.sliding_window
        last = jnp.where(seen, last, MASKED)
        return jnp.concatenate([found[:first], last]) if first else last

    def values_and_ones(head: Any, part: slice) -> Any:
        values = loaded(VALUES, head, part)
        if part.stop > seen_by_all:  # what lies behind the tokens may be NaN, as is 0 times that
            first = max(0, min(seen_by_all, part.stop - LANES) // LANES * LANES - part.start)
            last = values[first:]
            held = lax.broadcasted_iota(jnp.int32, last.shape, 0) + (part.start + first) < unit[TOKENS]
            last = jnp.where(held, last, jnp.zeros_like(last))
            values = jnp.concatenate([values[:first], last]) if first else last
        return jnp.concatenate([values.T, jnp.ones((SUBLANES, values.shape[0]), attention.dtype)])

    def add(head: Any, these: list[Any], begin_next: Callable[[slice], None]) -> None:
        highest, keep = softmax.raise_to(
            head, largest([jnp.max(found, axis=0, keepdims=True) for found in these])
        )
        sums: Any = 0.0
        for part, part_scores in zip(parts, these, strict=True):
            begin_next(part)
            weights = jnp.exp2(part_scores - highest).astype(attention.dtype)
            sums += dot(values_and_ones(head, part), weights, contract=(1, 0))
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

    heads = attention.heads.num_kv_heads
    together = heads
    if together == heads:
        run(range(heads))
    else:
        for_each(0, heads // together, lambda i: run([together * i + j for j in range(together)]))
