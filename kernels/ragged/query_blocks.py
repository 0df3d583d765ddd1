# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The new tokens of a batch cut into query blocks, and the copies of their rows, inside a kernel for TPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..tpu.control import for_each


@dataclass(frozen=True)
class QueryBlocks:
    """The batch's query blocks, one after another; all [num_blocks] int32, 0 behind the last one.

    Attributes:
        kv_lens: the tokens that the block's last query sees.
        starts: the first query's row.
        counts: query tokens.
        used: [1], the blocks that are not empty, which are the first ones.
    """

    kv_lens: Any
    starts: Any
    counts: Any
    used: Any


def cut_queries(
    new_tokens: Array, kv_lens: Array, query_starts: Array, q_tokens: int, num_blocks: int
) -> tuple[QueryBlocks, Array]:
    """Cuts [max_seqs] new tokens of each sequence into blocks; also whose each is, [num_blocks].

    Cuts are at positions that are multiples of `q_tokens`, so that tokens before such a position are seen by
    all queries of a block or by none.
    """
    first = jnp.where(kv_lens > 0, lax.rem(kv_lens - new_tokens, q_tokens), 0)  # place in the first block
    each = jnp.where(new_tokens > 0, (first + new_tokens + q_tokens - 1) // q_tokens, 0)
    until = jnp.cumsum(each)  # blocks, this sequence's included
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    sequence = jnp.sum(until[None] <= block[:, None], axis=1, dtype=jnp.int32)
    used = sequence < new_tokens.shape[0]
    sequence = jnp.minimum(sequence, new_tokens.shape[0] - 1)
    new = new_tokens[sequence]
    cut = (block - (until[sequence] - each[sequence])) * q_tokens - first[sequence]
    offset = jnp.maximum(cut, 0)
    count = jnp.where(used, jnp.minimum(new, cut + q_tokens) - offset, 0)
    seen = jnp.where(used & (kv_lens[sequence] > 0), kv_lens[sequence] - new + offset + count, 0)
    start = jnp.where(used, query_starts[sequence] + offset, 0)
    return QueryBlocks(seen, start, count, until[-1:]), sequence


def most_blocks(num_tokens: int, max_seqs: int, q_tokens: int) -> int:
    """The most blocks that `cut_queries` may find: two tokens may already lie in two."""
    return num_tokens // q_tokens + 2 * min(max_seqs, num_tokens // 2 + 1)


@dataclass(frozen=True)
class RaggedRows:
    """Copies between consecutive rows of an array in HBM, any number at any place, and a buffer in VMEM.

    A copy's size is static, so that a number of rows is copied as its binary digits.

    Attributes:
        hbm: [rows, num_q_heads, numbers].
        buffers: [2, most rows, num_q_heads, numbers], of which blocks take turns.
        semaphores: [2], for DMA.
        write: whether from VMEM to HBM.
    """

    hbm: Any
    buffers: Any
    semaphores: Any
    write: bool

    def start(self, block: Any, start: Any, count: Any) -> None:
        self._pieces(block, start, count, lambda copy: copy.start())

    def wait(self, block: Any, start: Any, count: Any) -> None:
        self._pieces(block, start, count, lambda copy: copy.wait())

    def _pieces(self, block: Any, start: Any, count: Any, act: Callable[[Any], None]) -> None:
        slot, most = lax.rem(block, 2), self.buffers.shape[1]

        def digits(_: Any) -> None:
            size = most // 2
            while size:
                if size <= self.hbm.shape[0]:
                    before = count & -(2 * size)
                    pl.when((count & size) != 0)(partial(self._piece, slot, start, before, size, act))
                size //= 2

        if most <= self.hbm.shape[0]:
            pl.when(count == most)(partial(self._piece, slot, start, 0, most, act))
        # a loop is jumped over, whereas small branches are executed and their effects left out
        for_each(0, (count < most).astype(jnp.int32), digits)

    def _piece(self, slot: Any, start: Any, before: Any, size: int, act: Callable[[Any], None]) -> None:
        hbm = self.hbm.at[pl.ds(start + before, size)]
        vmem = self.buffers.at[slot, pl.ds(before, size)]
        ends = (vmem, hbm) if self.write else (hbm, vmem)
        act(pltpu.make_async_copy(*ends, self.semaphores.at[slot]))
