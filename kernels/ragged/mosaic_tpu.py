# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Ragged paged attention as Pallas kernels for TPU.

Sequences with a single new token go through the decode kernel. The new tokens of all others are cut into
query blocks of `q_tokens`, and what a block sees into units of `kv_tokens` (see `tpu/units.py`), which come
from HBM while earlier ones are computed, across the ends of blocks and sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..block_sizes import Key
from ..blockwise import MASKED, product_dtype
from ..decode.mosaic_tpu import paged_decode_attention
from ..kv_pages import KVPages
from ..tpu.control import for_each, if_then_else
from ..tpu.launch import check_pages, tpu_call, vmem_bytes
from ..tpu.shapes import LANES, SUBLANES, padded
from ..tpu.units import (
    FULL,
    TABLE_TILE,
    TOKENS,
    WHOLE,
    Fetcher,
    Units,
    fetcher_scratch,
    in_hbm,
    vmem_bytes_per_token,
)
from .blocks import RaggedBlocks, Sizes, tuned_or_default_blocks
from .columns import LOG2_E, Attention, Softmax, attend
from .heads import PIECE, Heads
from .query_blocks import QueryBlocks, RaggedRows, cut_queries, most_blocks

BLOCKS_PER_GROUP = 8


@dataclass(frozen=True)
class _Block:
    """What a block's begin and end move.

    Attributes:
        attention: static.
        blocks: in scalar memory.
        rows_in, rows_out, lse_out: the block's queries, its output, and its log-sum-exp if wanted.
        words: `Heads.scratch` of head_dim numbers: the queries of the block in use, then its output.
        lse_scratch: `Heads.scratch` of LANES numbers without shared words, and [columns / 2, LANES] float32.
        sinks: [num_kv_heads, 1, columns] float32 in VMEM.
        softmax: of the block in use.
    """

    attention: Attention
    blocks: QueryBlocks
    rows_in: RaggedRows
    rows_out: RaggedRows
    lse_out: RaggedRows | None
    words: Any
    lse_scratch: tuple[Any, Any]
    sinks: Any
    softmax: Softmax

    def place(self, block: Any) -> tuple[Any, Any, Any]:
        return block, self.blocks.starts[block], self.blocks.counts[block]

    def prepare(self) -> None:
        """Before the first block."""
        self.rows_in.start(*self.place(0))
        self.softmax.clear()

    def begin(self, block: Any) -> None:
        """Takes the block's queries, and starts the copy of the next one's."""
        self.rows_in.wait(*self.place(block))
        pl.when(block + 1 < self.blocks.used[0])(lambda: self.rows_in.start(*self.place(block + 1)))
        self.attention.heads.take(self.rows_in.buffers.at[lax.rem(block, 2)], self.words)
        self.softmax.reset()

    def end(self, block: Any) -> None:
        """Writes the block's output."""
        outs = [self.rows_out] + ([self.lse_out] if self.lse_out else [])
        pl.when(block >= 2)(lambda: self._wait(outs, block - 2))
        slot = lax.rem(block, 2)
        heads = self.attention.heads
        heads.put(self._output, self.words, self.rows_out.buffers.at[slot])
        if self.lse_out is not None:
            words, pairs = self.lse_scratch
            has_tokens = self.blocks.kv_lens[block] > 0

            def log_sum_exp(head: int, part: slice) -> Any:
                return heads.unpacked(self._log_sum_exp(head, part, has_tokens), pairs)

            replace(heads, packed=1).put(log_sum_exp, words, self.lse_out.buffers.at[slot])
        for out in outs:
            out.start(*self.place(block))

        @pl.when(block + 1 == self.blocks.used[0])
        def _() -> None:
            pl.when(block >= 1)(lambda: self._wait(outs, block - 1))
            self._wait(outs, block)

    def _wait(self, outs: list[RaggedRows], block: Any) -> None:
        for out in outs:
            out.wait(*self.place(block))

    def _output(self, head: int, part: slice) -> Any:
        """[columns, head_dim] of some of a KV head's columns."""
        _, total, keep = self.softmax.with_sinks(head, part, self.sinks)
        factor = jnp.where(total > 0, keep / total, 0.0)
        return (self.softmax.take(head, part) * factor).astype(self.rows_out.buffers.dtype).T

    def _log_sum_exp(self, head: int, part: slice, has_tokens: Any) -> Any:
        """[columns, LANES] of some of a KV head's columns."""
        highest, total, _ = self.softmax.with_sinks(head, part, self.sinks)
        found = jnp.where(has_tokens, (highest + jnp.log2(total)) / LOG2_E, -jnp.inf)
        return jnp.broadcast_to(found, (LANES, found.shape[1])).T


def _kernel(
    attention: Attention,
    units: Units,
    kv_pages: KVPages,
    return_lse: bool,
    kv_lens: Any,
    starts: Any,
    counts: Any,
    used: Any,
    decoding: Any,
    queries_hbm: Any,
    decoded_hbm: Any,
    decoded_lse_hbm: Any,
    sinks: Any,
    table_hbm: Any,
    kv_hbm: Any,
    output_hbm: Any,
    lse_hbm: Any,
    *scratch: Any,
) -> None:
    """One grid step: some query blocks.

    Args:
        attention, units, kv_pages, return_lse: static; of `kv_pages` only what it says of its data.
        kv_lens, starts, counts, used: see `QueryBlocks`, in scalar memory; used[1] are the sequences.
        decoding: [max_seqs] int32 in scalar memory, the row of a sequence's single new token, or -1.
        queries_hbm, output_hbm: [num_tokens, num_q_heads, head_dim].
        decoded_hbm, decoded_lse_hbm: [max_seqs, num_q_heads, head_dim | LANES], what the rows of `decoding`
            get; the latter of any size if unwanted.
        sinks: [num_kv_heads, 1, columns] float32 in VMEM, to the base of 2, MASKED for none.
        table_hbm, kv_hbm: page table and cache, see `Fetcher`.
        lse_hbm: [num_tokens, num_q_heads, LANES] float32, the same number in all lanes; any size if unwanted.
        scratch: see the call.
    """
    rows_in, rows_sem, words, out, out_sem, lse, lse_sem, lse_words, lse_pairs, *rest = scratch
    decoded_sem, highest, total, weighted, *rest = rest
    fetcher = Fetcher(units, (used[0] + units.seqs - 1) // units.seqs, kv_lens, table_hbm, kv_hbm, *rest)
    block_io = _Block(
        attention,
        QueryBlocks(kv_lens, starts, counts, used),
        RaggedRows(queries_hbm, rows_in, rows_sem, write=False),
        RaggedRows(output_hbm, out, out_sem, write=True),
        RaggedRows(lse_hbm, lse, lse_sem, write=True) if return_lse else None,
        words,
        (lse_words, lse_pairs),
        sinks,
        Softmax(highest, total, weighted),
    )
    group = pl.program_id(0)

    def scatter(act: Callable[[Any], None]) -> None:
        """The rows of the sequences that decode, from one place in HBM to another."""
        pairs = [(decoded_hbm, output_hbm)] + ([(decoded_lse_hbm, lse_hbm)] if return_lse else [])

        def row(sequence: Any) -> None:
            @pl.when(decoding[sequence] >= 0)
            def _() -> None:
                for source, target in pairs:
                    ends = source.at[pl.ds(sequence, 1)], target.at[pl.ds(decoding[sequence], 1)]
                    act(pltpu.make_async_copy(*ends, decoded_sem))

        for_each(0, used[1], row)

    @pl.when(group == 0)
    def _() -> None:
        scatter(lambda copy: copy.start())

        @pl.when(used[0] > 0)
        def _() -> None:
            fetcher.begin(meanwhile=block_io.prepare)

    @pl.when(group < fetcher.num_groups)
    def _() -> None:
        fetcher.begin_group()
        attend_to = partial(attend, attention, kv_pages, fetcher, words, block_io.softmax)
        for_each(
            0, units.seqs, lambda row: _attend_block(block_io, fetcher, attend_to, group * units.seqs + row)
        )

    @pl.when(group == pl.num_programs(0) - 1)
    def _() -> None:
        scatter(lambda copy: copy.wait())


def _attend_block(block_io: _Block, fetcher: Fetcher, attend_to: Callable[..., None], block: Any) -> None:
    """Takes the steps of one query block; `attend_to` is `attend` from its `count` on."""
    units, blocks = fetcher.units, block_io.blocks
    count, kv_len = blocks.counts[block], blocks.kv_lens[block]
    pl.when(count > 0)(lambda: block_io.begin(block))
    pages = kv_len - units.first_page(kv_len) * units.page_size
    steps = jnp.maximum(1, (pages + units.tokens - 1) // units.tokens)  # an empty block takes one, too

    def step(_: Any) -> None:
        slot, coming = fetcher.take_oldest()
        whole, waiting = fetcher.step_in[coming, WHOLE] == 1, fetcher.step_in[slot, WHOLE] == 1
        if_then_else(whole, lambda: fetcher.start_whole(coming), lambda: fetcher.start(coming))
        if_then_else(waiting, lambda: fetcher.wait_whole(slot), lambda: fetcher.wait(slot))

        def edge() -> None:
            tokens, start, narrower = fetcher.units_in[slot, 0, TOKENS], 0, 0
            if _even(units) and units.tokens > PIECE:
                pieces = jnp.maximum(tokens - 1, 0) // PIECE  # which all queries see
                for_each(0, pieces, lambda i: attend_to(count, slot, _piece(i), PIECE, PIECE))
                start = _piece(pieces)
            for width in _widths(min(units.tokens, PIECE) if _even(units) else units.tokens):
                fits = (tokens - start > narrower) & (tokens - start <= width)
                pl.when(fits)(partial(attend_to, count, slot, start, width, _seen_by_all(units, narrower)))
                narrower = width

        everything = partial(attend_to, count, slot, 0, units.tokens, units.tokens)
        if_then_else(fetcher.step_in[slot, FULL] == 1, everything, edge)
        fetcher.describe()

    for_each(0, steps, step)
    pl.when(count > 0)(lambda: block_io.end(block))


def _even(units: Units) -> bool:
    """Whether the places in a unit where query blocks are cut are multiples of their size."""
    divides = LANES % units.queries == 0 or units.tokens % units.queries == 0
    pieces = units.tokens <= PIECE or (
        units.tokens % PIECE == 0 and PIECE % units.queries == 0 and PIECE % units.page_size == 0
    )
    return divides and pieces and units.sliding_window is None


def _piece(i: Any) -> Any:
    return pl.multiple_of(i * PIECE, PIECE)


def _seen_by_all(units: Units, tokens: int) -> int:
    """Of a unit of more than `tokens`, those of which it is known that all of a block's queries see them."""
    if units.sliding_window is not None:
        return 0
    return tokens // units.queries * units.queries if _even(units) else max(0, tokens + 2 - units.queries)


def _widths(tokens: int) -> list[int]:
    """Numbers of tokens for which there is code of its own: 128, 256, 384, 512, 768, … up to `tokens`."""
    widths = [LANES * 2**i for i in range(tokens.bit_length())]
    widths += [width * 3 // 2 for width in widths[1:]]
    return [*sorted(width for width in widths if width < tokens), tokens]


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "return_lse", "block_sizes"))
def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
    return_lse: bool = True,
    block_sizes: RaggedBlocks | None = None,
) -> tuple[Float[Array, "num_tokens num_q_heads head_dim"], Float[Array, "num_tokens num_q_heads"] | None]:
    """As `vsurge.kernels.ragged_paged_attention`; the log-sum-exp in float32, or None if unwanted.

    Raises:
        ValueError: the pages hold no whole tiles, or the block sizes fit neither cache nor device.
    """
    num_tokens, num_q_heads, head_dim = queries.shape
    max_seqs, pages_per_seq = page_table.shape
    if num_tokens == 0:
        return queries, jnp.zeros((0, num_q_heads), jnp.float32)
    check_pages(kv_pages)
    num_kv_heads, page_size = kv_pages.num_kv_heads, kv_pages.page_size
    sizes = Sizes(
        num_q_heads,
        num_kv_heads,
        head_dim,
        page_size,
        queries.dtype.itemsize,
        vmem_bytes_per_token(kv_pages),
        return_lse,
    )
    blocks = block_sizes or tuned_or_default_blocks(
        Key.of("ragged", queries, kv_pages),
        sizes,
        pages_per_seq=pages_per_seq,
        vmem_bytes=vmem_bytes(),
    )
    blocks.check(sizes, vmem_bytes())
    units = Units(
        seqs=BLOCKS_PER_GROUP,
        num_groups=-(-most_blocks(num_tokens, max_seqs, blocks.q_tokens) // BLOCKS_PER_GROUP),
        table_row=padded(pages_per_seq, TABLE_TILE // math.gcd(TABLE_TILE, BLOCKS_PER_GROUP)),
        lanes=1,
        pages=blocks.kv_tokens // page_size,
        page_size=page_size,
        depth=blocks.depth,
        sliding_window=sliding_window,
        queries=blocks.q_tokens,
    )
    units.check()
    heads = Heads.of(num_kv_heads, num_q_heads // num_kv_heads, blocks.q_tokens, queries.dtype.itemsize)
    attention = Attention(
        heads,
        scale,
        soft_cap,
        sliding_window,
        product_dtype(queries, kv_pages),
    )

    new_tokens = query_starts[1:] - query_starts[:-1]
    new_tokens = jnp.where(jnp.arange(max_seqs, dtype=jnp.int32) < num_seqs, new_tokens, 0)
    decodes = new_tokens == 1
    decode = cast(Callable[..., tuple[Array, Array]], paged_decode_attention)
    decoded, decoded_lse = decode(
        queries.at[jnp.where(decodes, query_starts[:-1], 0)].get(mode="clip")[:, None],
        kv_pages,
        jnp.where(decodes, kv_lens, 0),
        page_table,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    decoded, decoded_lse = decoded[:, 0], decoded_lse[:, 0]
    cut, sequences = cut_queries(
        jnp.where(decodes, 0, new_tokens),
        kv_lens,
        query_starts,
        blocks.q_tokens,
        units.num_groups * units.seqs,
    )
    table = jnp.pad(page_table, ((0, 0), (0, units.table_row - pages_per_seq)))[sequences]
    start = jnp.full(num_q_heads, MASKED) if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    start = heads.by_column(start.astype(jnp.float32))
    lse_shape = (num_tokens if return_lse else 1, num_q_heads, LANES)
    decoded_lse = decoded_lse if return_lse else decoded_lse[:1]
    decoded_lse = jnp.broadcast_to(decoded_lse[:, :, None], (*decoded_lse.shape, LANES))

    nothing = pltpu.VMEM((1, 1, SUBLANES, LANES), jnp.float32)

    def turns(numbers: int, dtype: Any) -> Any:
        return pltpu.VMEM((2, blocks.q_tokens, num_q_heads, numbers), dtype)

    def by_head(*sizes: int) -> Any:
        return pltpu.VMEM((num_kv_heads, *sizes), jnp.float32)

    output, log_sum_exp = tpu_call(
        partial(_kernel, attention, units, jax.eval_shape(lambda: kv_pages), return_lse),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(units.num_groups,),
            in_specs=[
                *[pl.BlockSpec(memory_space=pl.ANY)] * 3,
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pl.ANY),
                in_hbm(kv_pages),
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[
                turns(head_dim, queries.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                heads.scratch(head_dim),
                turns(head_dim, queries.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                turns(LANES, jnp.float32) if return_lse else nothing,
                pltpu.SemaphoreType.DMA((2,)),
                replace(heads, packed=1).scratch(LANES) if return_lse else nothing,
                pltpu.VMEM((heads.columns // 2, LANES), jnp.float32) if return_lse else nothing,
                pltpu.SemaphoreType.DMA,
                by_head(1, heads.columns),
                by_head(1, heads.columns),
                by_head(head_dim, heads.columns),
                *fetcher_scratch(units, kv_pages),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=vmem_bytes()),
        name="ragged_paged_attention",
    )(
        cut.kv_lens,
        cut.starts,
        cut.counts,
        jnp.concatenate([cut.used, num_seqs]),
        jnp.where(decodes, query_starts[:-1], -1),
        queries,
        decoded,
        decoded_lse,
        start,
        table.reshape(-1),
        kv_pages,
    )
    return output, log_sum_exp[:, :, 0] if return_lse else None
