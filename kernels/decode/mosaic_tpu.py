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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..blockwise import MASKED
from ..kv_pages import KEYS, VALUES, KVPages, bytes_per_token, decode_bits, encode_bits
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
from .blocks import DecodeBlocks, default_blocks
from .new_rows import NewRows, new_rows_scratch
from .rows import by_kv_head, by_query, seq_bytes


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


@dataclass(frozen=True)
class Softmax:
    """The running softmax of a group's sequences in VMEM, all float32.

    The last row is that of units without tokens, which nobody reads.

    Attributes:
        highest, total: [seqs + 1, rows, 1], the largest score, and the sum of `exp(score - highest)`.
        weighted: [seqs + 1, rows, head_dim], the sum of `exp(score - highest) * value`.
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
        nothing = old == MASKED  # is what a row has seen
        total = jnp.where(nothing, 0.0, total * keep + jnp.exp(sink - new))
        output[...] = jnp.where(nothing, 0.0, self.weighted[:seqs] * keep / total).astype(output.dtype)
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
    new_rows: NewRows | None = None,
) -> None:
    """One grid step: the sequences of a group.

    Args:
        attention, units, kv_pages: static; of `kv_pages` only what it says of its data.
        kv_lens: [grid steps * seqs] int32 in scalar memory.
        num_groups: [1] int32 in scalar memory, the groups up to the last sequence with tokens.
        queries, output: [seqs, rows, head_dim] in VMEM.
        sinks: [rows, 1] float32 in VMEM, MASKED for none.
        table_hbm, kv_hbm: page table and cache, see `Fetcher`.
        log_sum_exp: [seqs, rows, LANES] float32 in VMEM, the same number in all lanes.
        highest, total, weighted: see `Softmax`.
        fetcher_refs: see `fetcher_scratch`.
        new_rows: for a kernel that also writes them to the cache.
    """
    fetcher = Fetcher(units, num_groups[0], kv_lens, table_hbm, kv_hbm, *fetcher_refs)
    softmax = Softmax(highest, total, weighted)
    compute = partial(_compute, attention, kv_pages, fetcher, queries, softmax)
    softmax.reset()
    pl.when(pl.program_id(0) == 0)(fetcher.begin)
    if new_rows:
        pl.when(pl.program_id(0) == 0)(new_rows.begin)
    pl.when(pl.program_id(0) < num_groups[0])(partial(_attend_group, fetcher, compute, new_rows))
    if new_rows:
        pl.when(pl.program_id(0) == pl.num_programs(0) - 1)(new_rows.end)
    softmax.write(sinks, output, log_sum_exp)


def _fused_kernel(attention: Attention, units: Units, kv_pages: KVPages, *refs: Any) -> None:
    """`_kernel` with a few more references among its own: those of `NewRows`, and the cache as an output."""
    kv_lens, num_groups, slots, queries, sinks, table_hbm, rows, _, output, log_sum_exp, kv_hbm, *scratch = (
        refs
    )
    *new_rows, highest, total, weighted = scratch[:6]
    _kernel(
        attention,
        units,
        kv_pages,
        *(kv_lens, num_groups, queries, sinks, table_hbm, kv_hbm, output, log_sum_exp),
        *(highest, total, weighted, *scratch[6:]),
        new_rows=NewRows(slots, rows, kv_hbm, *new_rows),
    )


def _attend_group(fetcher: Fetcher, compute: Callable[..., None], new_rows: NewRows | None) -> None:
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
            if new_rows:
                new_rows.insert(fetcher, slot)
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
        part = slice(lane * attention.rows, (lane + 1) * attention.rows)
        softmax.merge(unit[ROW], highest[part], total[part], weighted[part])


def _seen(attention: Attention, units_in: list[Any], width: int) -> Any:
    """[lanes * rows, width]: which of its unit's tokens a row sees."""
    column = lax.broadcasted_iota(jnp.int32, (attention.rows, width), 1)
    before_end = _before_end(attention, column.shape)
    seen = list[Any]()
    for unit in units_in:
        sees = column < unit[TOKENS]
        if attention.num_queries > 1:
            sees &= column <= unit[REST] - before_end
        if attention.sliding_window is not None:
            sees &= column > unit[REST] - before_end - attention.sliding_window
        seen.append(sees)
    return jnp.concatenate(seen)


def _before_end(attention: Attention, shape: tuple[int, ...]) -> Any:
    """[rows, width]: the tokens from a row's own one to the end of its sequence."""
    if attention.num_queries == 1:
        return 1
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    group = attention.products.rows // attention.num_queries
    return attention.num_queries - row // group % attention.num_queries


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "block_sizes"))
def paged_decode_attention(
    queries: Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    **options: Any,
) -> tuple[
    Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    Float[Array, "num_seqs num_queries num_q_heads"],
]:
    """As `vsurge.kernels.paged_decode_attention`, with the options of `_attend`."""
    output, log_sum_exp, _ = _attend(queries, kv_pages, kv_lens, page_table, None, **options)
    return output, log_sum_exp


@partial(
    jax.jit,
    static_argnames=("scale", "sliding_window", "soft_cap", "block_sizes"),
    donate_argnames="kv_pages",
)
def append_and_attend(
    queries: Float[Array, "num_seqs one num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    keys: Float[Array, "num_seqs num_kv_heads head_dim"],
    values: Float[Array, "num_seqs num_kv_heads head_dim"],
    slots: Int[Array, " num_seqs"],
    **options: Any,
) -> tuple[
    Float[Array, "num_seqs one num_q_heads head_dim"],
    Float[Array, "num_seqs one num_q_heads"],
    KVPages,
]:
    """`paged_decode_attention` of one query per sequence that also writes the cache, see `NewRows`."""
    rows = encode_bits(kv_pages, jnp.stack([keys, values], axis=1))
    inside = slots < kv_pages.num_pages * kv_pages.page_size
    new = rows, jnp.where(inside, slots, -1)
    output, log_sum_exp, data = _attend(queries, kv_pages, kv_lens, page_table, new, **options)
    return output, log_sum_exp, replace(kv_pages, data=data)


def _attend(
    queries: Array,
    kv_pages: KVPages,
    kv_lens: Array,
    page_table: Array,
    new: tuple[Array, Array] | None,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Array | None,
    block_sizes: DecodeBlocks | None = None,
) -> tuple[Array, Array, Array]:
    """Runs the kernel.

    Args:
        new: the rows [num_seqs, 2, num_kv_heads, head_dim] as the cache stores them, and their slots
            [num_seqs], to be written as well.

    Returns:
        Output, log-sum-exp and the cache's data.

    Raises:
        ValueError: the pages hold no whole tiles, or the block sizes fit neither cache nor device.
    """
    num_seqs, num_queries, num_q_heads, head_dim = queries.shape
    if num_seqs == 0:
        return queries, jnp.zeros(queries.shape[:3], jnp.float32), kv_pages.data
    check_pages(kv_pages)
    new_tokens = 0 if new is None else 1
    num_kv_heads, page_size, pages_per_seq = kv_pages.num_kv_heads, kv_pages.page_size, page_table.shape[1]
    rows, group = num_queries * num_q_heads, num_queries * num_q_heads // num_kv_heads
    token_bytes = bytes_per_token(num_kv_heads, padded(head_dim), kv_pages.dtype)
    vmem = vmem_bytes()
    blocks = block_sizes or default_blocks(
        page_size=page_size,
        pages_per_seq=pages_per_seq,
        most_seqs=most_seqs(pages_per_seq, num_seqs * (1 + new_tokens)),
        token_bytes=token_bytes,
        seq_bytes=seq_bytes(rows, head_dim, queries.dtype.itemsize),
        vmem_bytes=vmem if num_queries == 1 else vmem * 3 // 4,  # the scores of many rows take room as well
    )
    blocks.check(page_size=page_size, token_bytes=token_bytes, vmem_bytes=vmem)
    seqs = padded(blocks.lanes * blocks.depth, SUBLANES if num_queries == 1 else 1)
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
        queries=num_queries,
        new_tokens=new_tokens,
    )
    units.check()
    both_bfloat16 = queries.dtype == kv_pages.dtype == jnp.bfloat16
    products = Products(group, head_dim, jnp.bfloat16 if both_bfloat16 else jnp.float32)
    attention = Attention(rows, num_queries, products, scale, soft_cap, sliding_window)

    spare = num_groups * seqs - num_seqs
    kv_lens = jnp.pad(kv_lens, (0, spare))
    queries = jnp.pad(by_kv_head(queries, num_kv_heads), ((0, spare), (0, 0), (0, 0)))
    page_table = jnp.pad(page_table, ((0, spare), (0, units.table_row - pages_per_seq)))
    last = jnp.max(jnp.where(kv_lens > 0, jnp.arange(1, kv_lens.shape[0] + 1, dtype=jnp.int32), 0))
    used_groups = ((last + seqs - 1) // seqs)[None]
    start = jnp.full(num_q_heads, MASKED) if sinks is None else sinks
    start = by_kv_head(jnp.broadcast_to(start, (1, num_queries, num_q_heads)), num_kv_heads)[0]

    def by_group(*shape: int) -> pl.BlockSpec:
        def index(group: Any, *_: Any) -> Any:
            return group, *(0 for _ in shape)

        return pl.BlockSpec((seqs, *shape), index)

    shapes = ((seqs + 1, rows, 1), (seqs + 1, rows, 1), (seqs + 1, rows, head_dim))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kernel, aliases = _kernel, dict[int, int]()
    scalars = [kv_lens, used_groups]
    inputs = [queries, start.astype(jnp.float32)[:, None], page_table.reshape(-1)]
    in_specs = [by_group(rows, head_dim), pl.BlockSpec(memory_space=pltpu.VMEM), anywhere]
    out_specs = [by_group(rows, head_dim), by_group(rows, LANES)]
    out_shape = [
        jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        jax.ShapeDtypeStruct((*queries.shape[:2], LANES), jnp.float32),
    ]
    scratch = [*(pltpu.VMEM(shape, jnp.float32) for shape in shapes), *fetcher_scratch(units, kv_pages)]
    if new is not None:
        new_rows, slots = new
        kernel = _fused_kernel
        scalars.append(jnp.pad(slots, (0, spare), constant_values=-1))
        inputs.append(jnp.pad(new_rows, ((0, spare), (0, 0), (0, 0), (0, 0))))
        in_specs.append(by_group(2, num_kv_heads, head_dim))
        out_specs.append(anywhere)
        out_shape.append(jax.ShapeDtypeStruct(kv_pages.data.shape, kv_pages.data.dtype))
        scratch = [*new_rows_scratch(kv_pages), *scratch]
        aliases[len(scalars) + len(inputs)] = 2
    output, log_sum_exp, *written = tpu_call(
        partial(kernel, attention, units, jax.eval_shape(lambda: kv_pages)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_groups,),
            in_specs=[*in_specs, anywhere],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=vmem),
        name="paged_decode_attention",
    )(*scalars, *inputs, kv_pages.data)
    return (
        by_query(output[:num_seqs], num_queries, num_kv_heads),
        by_query(log_sum_exp[:num_seqs, :, 0], num_queries, num_kv_heads),
        written[0] if written else kv_pages.data,
    )
