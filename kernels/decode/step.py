# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""One step of the decode kernel for TPU: the arithmetic of a few units side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..blockwise import LOG2_E, MASKED
from ..kv_pages import KEYS, VALUES, KVPages, decode_bits
from ..tpu.fetcher import BEGINS, REST, ROW, TOKENS, Fetcher
from ..tpu.shapes import LANES
from ..tpu.streams import Products
from .softmax import Softmax, spread


@dataclass(frozen=True)
class Attention:
    """What the kernel computes, besides the cutting: see `vsurge.kernels.ragged_paged_attention`.

    Attributes:
        rows: query rows of a sequence; a KV head's are those of its query heads, of each query in turn.
        num_queries: of a sequence, its last tokens.
    """

    rows: int
    num_queries: int
    products: Products
    scale: float
    soft_cap: float | None
    sliding_window: int | None


def widths_of(tokens: int) -> list[int]:
    """Numbers of tokens for which there is code of its own: a short unit costs what its tokens cost."""
    widths = [tokens]
    while widths[0] % (2 * LANES) == 0:
        widths.insert(0, widths[0] // 2)
    return widths


def compute(
    attention: Attention,
    kv_pages: KVPages,
    fetcher: Fetcher,
    queries: Any,
    softmax: Softmax,
    slot: Any,
    width: int,
    *,
    masked: bool,
) -> None:
    """Merges the first `width` tokens of a slot's units into their sequences' softmax."""
    units, dtype = fetcher.units, attention.products.dtype
    units_in = [fetcher.units_in.at[slot, lane] for lane in range(units.lanes)]
    rows = jnp.concatenate([queries[jnp.minimum(unit[ROW], units.seqs - 1)] for unit in units_in])
    keys, values = list[Any](), list[Any]()
    for lane, unit in enumerate(units_in):
        block = fetcher.buffer.at[slot, lane]
        for head in range(kv_pages.num_kv_heads):
            key, value = (
                decode_bits(kv_pages, block[kind, head, :width]).astype(dtype) for kind in (KEYS, VALUES)
            )
            if masked:  # what lies behind the tokens may be NaN, and a weight of 0 times that is NaN too
                held = lax.broadcasted_iota(jnp.int32, value.shape, 0) < unit[TOKENS]
                value = jnp.where(held, value, jnp.zeros_like(value))
                if units.lanes > 1:  # as it is beside another unit's queries
                    key = jnp.where(held, key, jnp.zeros_like(key))
            keys.append(key)
            values.append(value)

    cap = attention.soft_cap
    scores = attention.products.scores(rows.astype(dtype), keys)
    scores *= attention.scale * LOG2_E if cap is None else attention.scale / cap
    if fetcher.scales is not None:
        scores *= _scales_by_row(attention, fetcher, slot, width, KEYS)
    if cap is not None:
        scores = cap * LOG2_E * jnp.tanh(scores)
    if masked:
        scores = jnp.where(_seen(attention, units_in, width), scores, MASKED)
    begins = [unit[BEGINS] == 1 for unit in units_in]
    highest, keeps = softmax.raise_to(jnp.max(scores, axis=1, keepdims=True), begins)
    weights = jnp.exp2(scores - spread(highest, width))
    scales = None
    if fetcher.scales is not None:
        scales = _scales_by_row(attention, fetcher, slot, width, VALUES)
        if masked:
            scales = jnp.where(_held(attention, units_in, width), scales, 0.0)
    total, weighted = _sums(attention, weights, scales, values)
    softmax.add(highest, keeps, total, weighted, begins, [unit[ROW] for unit in units_in])


def _sums(attention: Attention, weights: Any, scales: Any, values: list[Any]) -> tuple[Any, Any]:
    """The sums of weights, [rows, 1], and of values with their weights, which have `scales` or None."""
    total = jnp.sum(weights, axis=1, keepdims=True)
    if scales is not None:
        weights *= scales
    return total, attention.products.weighted(weights.astype(attention.products.dtype), values)


def _scales_by_row(attention: Attention, fetcher: Fetcher, slot: Any, width: int, kind: int) -> Any:
    """[lanes * rows, width]: the scales of a slot's keys or values, each head's for its query rows."""
    group = attention.products.rows
    rows = list[Any]()
    for lane in range(fetcher.units.lanes):
        scales = fetcher.scales_of(slot, lane, kind, width)
        heads = (scales[head : head + 1] for head in range(scales.shape[0]))
        rows.extend(jnp.broadcast_to(head, (group, width)) for head in heads)
    return jnp.concatenate(rows)


def _by_row(attention: Attention, numbers: list[Any], width: int) -> Any:
    """[lanes * rows, width] int32: a number of each unit, for its rows."""
    return jnp.concatenate([jnp.full((attention.rows, width), number, jnp.int32) for number in numbers])


def _held(attention: Attention, units_in: list[Any], width: int) -> Any:
    """[lanes * rows, width]: which of its unit's tokens are there."""
    tokens = _by_row(attention, [unit[TOKENS] for unit in units_in], width)
    return lax.broadcasted_iota(jnp.int32, tokens.shape, 1) < tokens


def _seen(attention: Attention, units_in: list[Any], width: int) -> Any:
    """[lanes * rows, width]: which of its unit's tokens a row sees."""
    seen = _held(attention, units_in, width)
    column = lax.broadcasted_iota(jnp.int32, seen.shape, 1)
    if attention.num_queries == 1 and attention.sliding_window is None:
        return seen
    rest = _by_row(attention, [unit[REST] for unit in units_in], width)
    own = rest - _before_end(attention, seen.shape)  # the place of the row's own token
    if attention.num_queries > 1:
        seen &= column <= own
    if attention.sliding_window is not None:
        seen &= column > own - attention.sliding_window
    return seen


def _before_end(attention: Attention, shape: tuple[int, ...]) -> Any:
    """[lanes * rows, width]: the tokens from a row's own one to the end of its sequence."""
    if attention.num_queries == 1:
        return 1
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    group = attention.products.rows // attention.num_queries
    return attention.num_queries - row // group % attention.num_queries
