# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The body of the ragged kernel for TPU.

A step takes one unit of what a query block sees (see `tpu/units.py`). A unit whose tokens are all seen by all
of the block's queries runs code without masks; at the diagonal and at a sequence's end it is taken in pieces,
of which only the last one has masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..blockwise import LOG2_E
from ..kv_pages import KVPages
from ..tpu.control import for_each, if_then_else
from ..tpu.fetcher import FULL, TOKENS, WHOLE, Fetcher
from ..tpu.shapes import LANES
from ..tpu.units import Units
from .columns import Attention, Softmax, attend
from .items import PIECE
from .query_blocks import QueryBlocks, RaggedRows


@dataclass(frozen=True)
class BlockIO:
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


def kernel(
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
    decoded_sem, highest, total, weighted, waiting, *rest = rest
    fetcher = Fetcher(units, (used[0] + units.seqs - 1) // units.seqs, kv_lens, table_hbm, kv_hbm, *rest)
    block_io = BlockIO(
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
        attend_to = partial(attend, attention, kv_pages, fetcher, words, block_io.softmax, waiting)
        for_each(
            0, units.seqs, lambda row: _attend_block(block_io, fetcher, attend_to, group * units.seqs + row)
        )

    @pl.when(group == pl.num_programs(0) - 1)
    def _() -> None:
        scatter(lambda copy: copy.wait())


def _attend_block(block_io: BlockIO, fetcher: Fetcher, attend_to: Callable[..., None], block: Any) -> None:
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
