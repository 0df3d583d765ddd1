# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The cache write inside the decode kernel for TPU.

A sequence's new token lies in its last unit, which is in VMEM anyway: its row is put in there before the unit
is computed. The tile that changed goes back to HBM from a place of its own, so that the unit's place is free
for the next fetch at once; a write is waited for when its place is needed again, or at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..kv_pages import KVPages
from ..tpu.control import for_each
from ..tpu.fetcher import REST, ROW, TOKENS, Fetcher, vmem_bytes_per_token

WRITES = 8  # under way at once


@dataclass(frozen=True)
class NewRows:
    """Inserts the new tokens' rows of keys and values, one per sequence.

    Attributes:
        slots: [grid steps * seqs] int32 in scalar memory: where a sequence's last token is kept, or negative
            if it is in the cache already.
        rows: [seqs, 2, num_kv_heads, head_dim] in VMEM, of this grid step, as the cache stores them.
        kv_hbm: the cache's data.
        tiles: [WRITES, 2, num_kv_heads, tile, head_dim] in VMEM.
        written: [WRITES] DMA semaphores.
        count: [1] int32 in scalar memory, of writes that were started.
    """

    slots: Any
    rows: Any
    kv_hbm: Any
    tiles: Any
    written: Any
    count: Any

    def begin(self) -> None:
        self.count[0] = 0

    def insert(self, fetcher: Fetcher, slot: Any) -> None:
        """Puts the rows of new tokens in a slot's units into their place, and starts the writes."""
        units = fetcher.units
        for lane in range(units.lanes):
            unit = fetcher.units_in.at[slot, lane]
            sequence = pl.program_id(0) * units.seqs + jnp.minimum(unit[ROW], units.seqs - 1)
            new = (unit[TOKENS] > 0) & (unit[REST] <= units.tokens) & (self.slots[sequence] >= 0)
            block = fetcher.buffer.at[slot, lane]

            @pl.when(new)
            def _(unit: Any = unit, sequence: Any = sequence, block: Any = block) -> None:
                self._insert(block, unit[REST] - 1, self.rows[unit[ROW]], self.slots[sequence])

    def _insert(self, block: Any, token: Any, row: Any, slot: Any) -> None:
        """Makes [2, num_kv_heads, head_dim] the row of a unit's token, and writes its tile."""
        tile, page_size = self.tiles.shape[3], self.kv_hbm.shape[3]
        place = lax.rem(self.count[0], WRITES)
        pl.when(self.count[0] >= WRITES)(lambda: self._wait(place))
        old = block.at[:, :, pl.ds(pl.multiple_of(token // tile * tile, tile), tile)]
        offset = lax.broadcasted_iota(jnp.int32, self.tiles.shape[1:], 2)
        changed = jnp.where(offset == lax.rem(token, tile), row[:, :, None], old[...])
        old[...] = changed
        self.tiles[place] = changed
        begin = pl.multiple_of(lax.rem(slot, page_size) // tile * tile, tile)
        target = self.kv_hbm.at[slot // page_size, :, :, pl.ds(begin, tile)]
        pltpu.make_async_copy(self.tiles.at[place], target, self.written.at[place]).start()
        self.count[0] += 1

    def end(self) -> None:
        """Waits for the writes that nobody has waited for yet."""
        count = self.count[0]
        for_each(jnp.maximum(count - WRITES, 0), count, lambda i: self._wait(lax.rem(i, WRITES)))

    def _wait(self, place: Any) -> None:
        tile = self.tiles.at[place]
        pltpu.make_async_copy(tile, tile, self.written.at[place]).wait()


def new_rows_bytes(kv_pages: KVPages) -> int:
    """Bytes of vector memory of `new_rows_scratch`."""
    tile = math.gcd(kv_pages.page_size, 32 // kv_pages.dtype.itemsize)
    return WRITES * tile * vmem_bytes_per_token(kv_pages)


def new_rows_scratch(kv_pages: KVPages) -> list[Any]:
    """The scratch memory of `NewRows`: what follows its `kv_hbm`, in that order."""
    tile = math.gcd(kv_pages.page_size, 32 // kv_pages.dtype.itemsize)
    return [
        pltpu.VMEM((WRITES, 2, kv_pages.num_kv_heads, tile, kv_pages.head_dim), kv_pages.data.dtype),
        pltpu.SemaphoreType.DMA((WRITES,)),
        pltpu.SMEM((1,), jnp.int32),
    ]
