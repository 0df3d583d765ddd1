# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Paged decode attention as a Pallas kernel for TPU.

What moves when: the tokens of all sequences are cut into units of `kv_tokens` (see `tpu/units.py`). A step
computes `lanes` units side by side out of vector memory (VMEM), while the pages of the next steps are under
way from HBM, whichever sequences they belong to; only pages that hold tokens are fetched. A unit's own
softmax is merged into its sequence's running one, which stays in VMEM until all sequences of the grid step's
group are done. So a sequence's beginning and end cost nothing; a group's do.

A step whose tokens are all there and all seen, while all pages of the step to be fetched are needed, runs
code without branches or masks. Any other step runs the code of the smallest width that holds its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..block_sizes import Key
from ..blockwise import MASKED
from ..kv_pages import KEYS, VALUES, KVPages, bytes_per_token, decode_bits
from ..tpu.control import largest
from ..tpu.launch import check_pages, tpu_call, vmem_bytes
from ..tpu.shapes import LANES, SUBLANES, padded
from ..tpu.streams import Products
from ..tpu.units import (
    FULL,
    LAST,
    REST,
    ROW,
    TABLE_TILE,
    TOKENS,
    Fetcher,
    Units,
    fetcher_scratch,
    most_seqs,
)
from .blocks import DecodeBlocks, tuned_or_default_blocks


@dataclass(frozen=True)
class Attention:
    """What the kernel computes, besides the cutting: see `vsurge.kernels.ragged_paged_attention`."""

    num_q_heads: int
    products: Products
    scale: float
    soft_cap: float | None
    sliding_window: int | None


@dataclass(frozen=True)
class Softmax:
    """The running softmax of a group's sequences in VMEM, all float32.

    The last row is that of units without tokens, which nobody reads.

    Attributes:
        highest, total: [seqs + 1, num_q_heads, 1], the largest score, and the sum of `exp(score - highest)`.
        weighted: [seqs + 1, num_q_heads, head_dim], the sum of `exp(score - highest) * value`.
    """

    highest: Any
    total: Any
    weighted: Any

    def reset(self) -> None:
        self.highest[...] = jnp.full(self.highest.shape, MASKED, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)
        self.weighted[...] = jnp.zeros(self.weighted.shape, jnp.float32)

    def merge(self, row: Any, highest: Any, total: Any, weighted: Any) -> None:
        """Merges the softmax of a unit, arrays as those of one row, into its sequence's."""
        old = self.highest[row]
        new = jnp.maximum(old, highest)
        keep, add = jnp.exp(old - new), jnp.exp(highest - new)
        self.highest[row] = new
        self.total[row] = self.total[row] * keep + total * add
        self.weighted[row] = self.weighted[row] * keep + weighted * add

    def write(self, sinks: Any, output: Any, log_sum_exp: Any) -> None:
        """Writes the result, to which a sink adds a score without a value."""
        seqs = output.shape[0]
        old, total = self.highest[:seqs], self.total[:seqs]
        sink = sinks[...][None]
        new = jnp.maximum(old, sink)
        keep = jnp.exp(old - new)
        total = jnp.where(total > 0, total * keep + jnp.exp(sink - new), 0.0)  # 0: an empty sequence
        output[...] = jnp.where(total > 0, self.weighted[:seqs] * keep / total, 0.0).astype(output.dtype)
        log_sum_exp[...] = jnp.broadcast_to(new + jnp.log(total), log_sum_exp.shape)


def _kernel(
    attention: Attention,
    units: Units,
    kv_pages: KVPages,
    kv_lens: Any,
    num_groups: Any,
    queries: Any,
    sinks: Any,
    table_hbm: Any,
    kv_hbm: Any,
    output: Any,
    log_sum_exp: Any,
    highest: Any,
    total: Any,
    weighted: Any,
    *fetcher_refs: Any,
) -> None:
    """One grid step: the sequences of a group.

    Args:
        attention, units, kv_pages: static; of `kv_pages` only what it says of its data.
        kv_lens: [grid steps * seqs] int32 in scalar memory.
        num_groups: [1] int32 in scalar memory, the groups up to the last sequence with tokens.
        queries, output: [seqs, num_q_heads, head_dim] in VMEM.
        sinks: [num_q_heads, 1] float32 in VMEM, MASKED for none.
        table_hbm, kv_hbm: page table and cache, see `Fetcher`.
        log_sum_exp: [seqs, num_q_heads, LANES] float32 in VMEM, the same number in all lanes.
        highest, total, weighted: see `Softmax`.
        fetcher_refs: see `fetcher_scratch`.
    """
    fetcher = Fetcher(units, num_groups[0], kv_lens, table_hbm, kv_hbm, *fetcher_refs)
    softmax = Softmax(highest, total, weighted)
    compute = partial(_compute, attention, kv_pages, fetcher, queries, softmax)
    softmax.reset()
    pl.when(pl.program_id(0) == 0)(fetcher.begin)
    pl.when(pl.program_id(0) < num_groups[0])(partial(_attend_group, fetcher, compute))
    softmax.write(sinks, output, log_sum_exp)


def _attend_group(fetcher: Fetcher, compute: Callable[..., None]) -> None:
    """Takes the steps of a group; `compute` is `_compute` from its `slot` on."""
    units = fetcher.units
    fetcher.begin_group()

    def step(_: Any) -> Any:
        slot, coming = fetcher.take_oldest()
        last = fetcher.step_in[slot, LAST]
        full = (fetcher.step_in[slot, FULL] == 1) & (fetcher.step_in[coming, FULL] == 1)

        @pl.when(full)
        def _() -> None:
            fetcher.wait_whole(slot)
            fetcher.start_whole(coming)
            compute(slot, units.tokens, masked=False)
            fetcher.describe()

        @pl.when(~full)
        def _() -> None:
            fetcher.start(coming)
            fetcher.wait(slot)
            tokens = [fetcher.units_in[slot, lane, TOKENS] for lane in range(units.lanes)]
            most, narrower = largest(tokens), 0
            for width in _widths(units.tokens):
                fits = (most > narrower) & (most <= width)
                pl.when(fits)(partial(compute, slot, width, masked=True))
                narrower = width
            fetcher.describe()

        return last

    lax.while_loop(lambda last: last == 0, step, jnp.int32(0))


def _widths(tokens: int) -> list[int]:
    """Numbers of tokens for which there is code of its own: a short unit costs what its tokens cost."""
    widths = [tokens]
    while widths[0] % (2 * LANES) == 0:
        widths.insert(0, widths[0] // 2)
    return widths


def _compute(
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

    scores = attention.products.scores(rows.astype(dtype), keys) * attention.scale
    if attention.soft_cap is not None:
        scores = attention.soft_cap * jnp.tanh(scores / attention.soft_cap)
    if masked:
        scores = jnp.where(_seen(attention, units_in, width), scores, MASKED)
    highest = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=1, keepdims=True)
    weighted = attention.products.weighted(weights.astype(dtype), values)
    for lane, unit in enumerate(units_in):
        part = slice(lane * attention.num_q_heads, (lane + 1) * attention.num_q_heads)
        softmax.merge(unit[ROW], highest[part], total[part], weighted[part])


def _seen(attention: Attention, units_in: list[Any], width: int) -> Any:
    """[lanes * num_q_heads, width]: which of its unit's tokens a row sees."""
    column = lax.broadcasted_iota(jnp.int32, (attention.num_q_heads, width), 1)
    seen = list[Any]()
    for unit in units_in:
        sees = column < unit[TOKENS]
        if attention.sliding_window is not None:
            sees &= column >= unit[REST] - attention.sliding_window
        seen.append(sees)
    return jnp.concatenate(seen)


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "block_sizes"))
def paged_decode_attention(
    queries: Float[Array, "num_seqs num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
    block_sizes: DecodeBlocks | None = None,
) -> tuple[Float[Array, "num_seqs num_q_heads head_dim"], Float[Array, "num_seqs num_q_heads"]]:
    """As `vsurge.kernels.paged_decode_attention`; the log-sum-exp in float32.

    Raises:
        ValueError: the pages hold no whole tiles, or the block sizes fit neither cache nor device.
    """
    num_seqs, num_q_heads, head_dim = queries.shape
    if num_seqs == 0:
        return queries, jnp.zeros((0, num_q_heads), jnp.float32)
    check_pages(kv_pages)
    num_kv_heads, page_size, pages_per_seq = kv_pages.num_kv_heads, kv_pages.page_size, page_table.shape[1]
    token_bytes = bytes_per_token(num_kv_heads, padded(head_dim), kv_pages.dtype)
    blocks = block_sizes or tuned_or_default_blocks(
        Key.of("decode", queries, kv_pages),
        pages_per_seq=pages_per_seq,
        most_seqs=most_seqs(pages_per_seq, num_seqs),
        token_bytes=token_bytes,
        vmem_bytes=vmem_bytes(),
    )
    blocks.check(page_size=page_size, token_bytes=token_bytes, vmem_bytes=vmem_bytes())
    seqs = padded(blocks.lanes * blocks.depth, SUBLANES)
    num_groups = -(-num_seqs // seqs)
    units = Units(
        seqs=seqs,
        num_groups=num_groups,
        table_row=padded(pages_per_seq, TABLE_TILE // math.gcd(TABLE_TILE, seqs)),
        lanes=blocks.lanes,
        pages=blocks.kv_tokens // page_size,
        page_size=page_size,
        depth=blocks.depth,
        sliding_window=sliding_window,
    )
    units.check()
    both_bfloat16 = queries.dtype == kv_pages.dtype == jnp.bfloat16
    products = Products(num_q_heads // num_kv_heads, head_dim, jnp.bfloat16 if both_bfloat16 else jnp.float32)
    attention = Attention(num_q_heads, products, scale, soft_cap, sliding_window)

    spare = num_groups * seqs - num_seqs
    kv_lens = jnp.pad(kv_lens, (0, spare))
    queries = jnp.pad(queries, ((0, spare), (0, 0), (0, 0)))
    page_table = jnp.pad(page_table, ((0, spare), (0, units.table_row - pages_per_seq)))
    last = jnp.max(jnp.where(kv_lens > 0, jnp.arange(1, kv_lens.shape[0] + 1, dtype=jnp.int32), 0))
    used_groups = ((last + seqs - 1) // seqs)[None]
    start = jnp.full(num_q_heads, MASKED) if sinks is None else sinks

    def by_group(numbers: int) -> pl.BlockSpec:
        def index(group: Any, *_: Any) -> Any:
            return group, 0, 0

        return pl.BlockSpec((seqs, num_q_heads, numbers), index)

    shapes = ((seqs + 1, num_q_heads, 1), (seqs + 1, num_q_heads, 1), (seqs + 1, num_q_heads, head_dim))
    output, log_sum_exp = tpu_call(
        partial(_kernel, attention, units, jax.eval_shape(lambda: kv_pages)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_groups,),
            in_specs=[
                by_group(head_dim),
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[by_group(head_dim), by_group(LANES)],
            scratch_shapes=[
                *(pltpu.VMEM(shape, jnp.float32) for shape in shapes),
                *fetcher_scratch(units, kv_pages),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct((*queries.shape[:2], LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=vmem_bytes()),
        name="paged_decode_attention",
    )(
        kv_lens,
        used_groups,
        queries,
        start.astype(jnp.float32)[:, None],
        page_table.reshape(-1),
        kv_pages.data,
    )
    return output[:num_seqs], log_sum_exp[:num_seqs, :, 0]
