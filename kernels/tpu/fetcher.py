# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Pages on their way from HBM to VMEM, a few steps ahead of their use, inside a Pallas kernel for TPU.

A step's pages are those of the next units of a list (see `units.py`), which is never stored: a cursor walks
along it, in scalar memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..kv_pages import KVPages
from .control import following, for_each, quotient, remainder
from .shapes import SUBLANES, padded
from .units import TABLES, Units

# Places in scalar memory: of the cursor, and of what is known of a unit and of its step.
SEQUENCE, PAGE, GROUP, TABLE, NEXT_SLOT, USED_SLOT, CURSOR_SIZE = range(7)
ROW, FIRST, TOKENS, REST, BEGINS, UNIT_SIZE = range(6)
LAST, WHOLE, FULL, PAGES, STEP_SIZE = range(5)
STRAIGHT = 64  # pages of a step, at most, whose copies are started without a loop


@dataclass(frozen=True)
class Fetcher:
    """Walks along the list: can `describe` a step, `start` its copies, and later `wait` for them.

    Attributes:
        units: how the list is cut.
        num_groups: groups that are walked through, the first ones.
        kv_lens: [units.num_groups * seqs] int32 in scalar memory; 0 behind the batch's end.
        table_hbm: [num_groups * table_group] int32, the rows of the page table one after another.
        kv_hbm: the cache, of which each array is in HBM.
        table: [units.table_size] int32 in scalar memory.
        table_arrived: a DMA semaphore.
        buffer: [depth, lanes, 2, num_kv_heads, tokens, head_dim] in VMEM.
        arrived: [depth] DMA semaphores.
        cursor: [CURSOR_SIZE] int32 in scalar memory: where the next unit begins, its group and where that
            group's rows are in `table`, and the next slots.
        units_in: [depth, lanes, UNIT_SIZE] int32 in scalar memory, of the units in a slot: TOKENS; ROW,
            the sequence's place in its group, seqs if there are no tokens; FIRST, the place of the first page
            in `table`; REST, the sequence's tokens from the unit's first one to its end; BEGINS, whether
            that is the first one that is seen.
        step_in: [depth, STEP_SIZE] int32 in scalar memory, of the step in a slot: LAST, whether it is its
            group's last one; WHOLE, whether all tokens that its units have room for are there; FULL, whether
            all queries also see them; PAGES, those that hold tokens.
        scales: [depth, lanes, pages, 2, num_kv_heads, page_size or more] float32 in VMEM; None unless the
            cache has scales, as the next.
        scales_arrived: [depth] DMA semaphores.
    """

    units: Units
    num_groups: Any
    kv_lens: Any
    table_hbm: Any
    kv_hbm: Any
    table: Any
    table_arrived: Any
    buffer: Any
    arrived: Any
    cursor: Any
    units_in: Any
    step_in: Any
    scales: Any = None
    scales_arrived: Any = None

    def begin(self, meanwhile: Callable[[], Any]) -> None:
        """Describes the first `depth` steps, and starts the copies of all but the last of them.

        Args:
            meanwhile: called while the page table is under way.
        """
        self._first_tables(lambda copy: copy.start())
        meanwhile()
        self._first_tables(lambda copy: copy.wait())
        self.cursor[SEQUENCE] = 0
        self.cursor[PAGE] = self.units.first_page(self.kv_lens[0])
        self.cursor[GROUP] = 0
        self.cursor[TABLE] = 0
        self.cursor[NEXT_SLOT] = 0
        self.cursor[USED_SLOT] = 0
        for_each(0, self.units.depth - 1, lambda _: self.start(self.describe()))
        self.describe()

    def _first_tables(self, act: Callable[[Any], None]) -> None:
        for group in range(min(TABLES - 1, self.units.num_groups)):
            pl.when(group < self.num_groups)(partial(act, self._copy_table(group)))

    def begin_group(self) -> None:
        """Starts the copy of a later group's rows of the page table, and waits for the one before."""
        group, num_groups = pl.program_id(0), self.num_groups

        @pl.when((group > 0) & (group + TABLES - 2 < num_groups))
        def _() -> None:
            self._copy_table(group + TABLES - 2).wait()

        @pl.when(group + TABLES - 1 < num_groups)
        def _() -> None:
            self._copy_table(group + TABLES - 1).start()

    def describe(self) -> Any:
        """Moves the cursor over the next step's units; the slot that describes them, until now free."""
        units, cursor = self.units, self.cursor
        slot, group = cursor[NEXT_SLOT], cursor[GROUP]
        end = (group + 1) * units.seqs
        sequence, page = cursor[SEQUENCE], cursor[PAGE]
        whole, full, pages = jnp.bool_(True), jnp.bool_(True), jnp.int32(0)
        for lane in range(units.lanes):
            inside = (sequence < end) & (group < self.num_groups)
            here = jnp.where(inside, sequence, 0)
            kv_len = self.kv_lens[here]
            rest = kv_len - page * units.page_size
            tokens = jnp.where(inside, jnp.clip(rest, 0, units.tokens), 0)
            pages += quotient(tokens + (units.page_size - 1), units.page_size)
            whole &= tokens == units.tokens
            full &= inside & (rest >= units.tokens + max(units.queries - 1, units.new_tokens))
            if units.sliding_window is not None:
                full &= rest <= units.sliding_window
            unit = self.units_in.at[slot, lane]
            row = jnp.where(inside, sequence - group * units.seqs, 0)
            unit[ROW] = jnp.where(tokens > 0, row, units.seqs)
            unit[FIRST] = cursor[TABLE] + row * units.table_row + page
            unit[TOKENS], unit[REST] = tokens, rest
            unit[BEGINS] = (page == units.first_page(kv_len)).astype(jnp.int32)
            after = jnp.minimum(here + 1, units.num_groups * units.seqs - 1)
            ends = inside & ((page + units.pages) * units.page_size >= kv_len)
            beyond = jnp.where(inside, page + units.pages, page)
            page = jnp.where(ends, units.first_page(self.kv_lens[after]), beyond)
            sequence = jnp.where(ends, sequence + 1, sequence)
        step = self.step_in.at[slot]
        step[LAST] = (sequence == end).astype(jnp.int32)
        step[WHOLE] = whole.astype(jnp.int32)
        step[FULL] = full.astype(jnp.int32)
        step[PAGES] = pages
        cursor[SEQUENCE], cursor[PAGE] = sequence, page
        cursor[GROUP] = jnp.where(sequence == end, group + 1, group)
        next_table = cursor[TABLE] + units.table_group
        next_table = jnp.where(next_table == TABLES * units.table_group, 0, next_table)
        cursor[TABLE] = jnp.where(sequence == end, next_table, cursor[TABLE])
        cursor[NEXT_SLOT] = following(slot, units.depth)
        return slot

    def take_oldest(self) -> tuple[Any, Any]:
        """The slots of the oldest step, which is used until the next `describe`, and of the step to start."""
        slot = self.cursor[USED_SLOT]
        self.cursor[USED_SLOT] = following(slot, self.units.depth)
        return slot, jnp.where(slot == 0, self.units.depth - 1, slot - 1)

    def start(self, slot: Any) -> None:
        """Starts the copies of a slot's pages."""
        if self.units.lanes * self.units.pages <= STRAIGHT:
            self._start_straight(slot, whole=False)
            return

        def begin(lane: int, i: Any) -> None:
            self._start_page(slot, lane, i, self._page(slot, lane, i))

        for lane in range(self.units.lanes):
            for_each(0, self._pages(slot, lane), partial(begin, lane))

    def start_whole(self, slot: Any) -> None:
        """`start` of a whole step."""
        self._start_straight(slot, whole=True)

    def _start_straight(self, slot: Any, *, whole: bool) -> None:
        """Starts copies without a branch, so that the arithmetic beside it can hide it."""
        places = [(lane, i) for lane in range(self.units.lanes) for i in range(self.units.pages)]
        pages = [self._page(slot, lane, i) for lane, i in places]  # all first: a copy's start holds up reads
        tokens = [self.units_in[slot, lane, TOKENS] for lane in range(self.units.lanes)]
        for (lane, i), page in zip(places, pages, strict=True):
            start = partial(self._start_page, slot, lane, i, page)
            if whole:
                start()
            else:
                pl.when(i * self.units.page_size < tokens[lane])(start)

    def _start_page(self, slot: Any, lane: int, i: Any, page: Any) -> None:
        for copy in self._copies(slot, lane, i, page):
            copy.start()

    def wait(self, slot: Any) -> None:
        """Waits for a slot's pages: for their bytes, in pieces of a power of two units, then pages."""
        pages = self.step_in[slot, PAGES]
        units, rest = quotient(pages, self.units.pages), remainder(pages, self.units.pages)
        for count, most, wait in (
            (units, self.units.lanes, self._wait_units),
            (rest, self.units.pages - 1, self._wait_pages),
        ):
            for bit in range(most.bit_length()):
                pl.when(count & (1 << bit) != 0)(partial(wait, slot, 1 << bit))

    def wait_whole(self, slot: Any) -> None:
        """`wait` for a whole step."""
        self._wait_units(slot, self.units.lanes)

    def _wait_units(self, slot: Any, count: int) -> None:
        for buffer, arrived in self._buffers():
            units = buffer.at[slot, pl.ds(0, count)]
            pltpu.make_async_copy(units, units, arrived.at[slot]).wait()

    def _wait_pages(self, slot: Any, count: int) -> None:
        tokens = pl.ds(0, count * self.units.page_size)
        places = [self.buffer.at[slot, 0, :, :, tokens]]
        if self.scales is not None:
            places.append(self.scales.at[slot, 0, pl.ds(0, count)])
        for place, (_, arrived) in zip(places, self._buffers(), strict=True):
            pltpu.make_async_copy(place, place, arrived.at[slot]).wait()

    def _buffers(self) -> list[tuple[Any, Any]]:
        """Each buffer of a step's copies, with its semaphores."""
        buffers = [(self.buffer, self.arrived)]
        return buffers if self.scales is None else [*buffers, (self.scales, self.scales_arrived)]

    def scales_of(self, slot: Any, lane: int, kind: int, width: int, start: Any = 0) -> Any:
        """The scales of `width` of a unit's keys or values, [num_kv_heads, width]; some may be NaN.

        Args:
            start: the first one, a page's first.
        """
        page_size = self.units.page_size
        first = quotient(jnp.int32(start), page_size)
        pages = [
            self.scales[slot, lane, first + i, kind][:, :page_size] for i in range(-(-width // page_size))
        ]
        return jnp.concatenate(pages, axis=1)[:, :width]

    def _pages(self, slot: Any, lane: int) -> Any:
        """Pages of a unit that hold tokens."""
        return quotient(self.units_in[slot, lane, TOKENS] + (self.units.page_size - 1), self.units.page_size)

    def _page(self, slot: Any, lane: int, i: Any) -> Any:
        """The page of the pool that holds page `i` of a unit."""
        return self.table[self.units_in[slot, lane, FIRST] + i]

    def _copy_table(self, group: Any) -> Any:
        size = self.units.table_group
        return pltpu.make_async_copy(
            self.table_hbm.at[pl.ds(group * size, size)],
            self.table.at[pl.ds(lax.rem(jnp.int32(group), TABLES) * size, size)],
            self.table_arrived,
        )

    def _copies(self, slot: Any, lane: int, i: Any, page: Any) -> list[Any]:
        copies = [self._copy(slot, lane, i, page)]
        if self.scales is not None:
            scales = self.kv_hbm.scales.at[page], self.scales.at[slot, lane, i]
            copies.append(pltpu.make_async_copy(*scales, self.scales_arrived.at[slot]))
        return copies

    def _copy(self, slot: Any, lane: int, i: Any, page: Any) -> Any:
        place = pl.ds(i * self.units.page_size, self.units.page_size)
        return pltpu.make_async_copy(
            self.kv_hbm.data.at[page], self.buffer.at[slot, lane, :, :, place], self.arrived.at[slot]
        )


def vmem_bytes_per_token(kv_pages: KVPages) -> int:
    """Bytes that a token takes in a `Fetcher`'s buffers, about: a page's scales fill rows of registers."""
    heads = kv_pages.num_kv_heads
    numbers = 2 * heads * padded(kv_pages.head_dim) * kv_pages.dtype.itemsize
    if kv_pages.scales is None:
        return numbers
    return numbers + 2 * 4 * padded(heads, SUBLANES) * padded(kv_pages.page_size) // kv_pages.page_size


def vmem_bytes_per_row(kv_pages: KVPages) -> int:
    """Bytes that a new token's row, [2, num_kv_heads, head_dim], takes where rows follow each other."""
    packed = 4 // kv_pages.dtype.itemsize  # heads that share a register's row
    return 2 * padded(kv_pages.num_kv_heads, packed) * padded(kv_pages.head_dim) * kv_pages.dtype.itemsize


def fetcher_scratch(units: Units, kv_pages: KVPages) -> list[Any]:
    """The scratch memory of a `Fetcher`: what follows its `kv_hbm`, in that order."""
    if kv_pages.scales is None:
        scales = list[Any]()
    else:
        place = (units.depth, units.lanes, units.pages, *kv_pages.scales.shape[1:])
        scales = [pltpu.VMEM(place, jnp.float32), pltpu.SemaphoreType.DMA((units.depth,))]
    place = (units.depth, units.lanes, 2, kv_pages.num_kv_heads, units.tokens, kv_pages.head_dim)
    return [
        pltpu.SMEM((units.table_size,), jnp.int32),
        pltpu.SemaphoreType.DMA,
        pltpu.VMEM(place, kv_pages.data.dtype),
        pltpu.SemaphoreType.DMA((units.depth,)),
        pltpu.SMEM((CURSOR_SIZE,), jnp.int32),
        pltpu.SMEM((units.depth, units.lanes, UNIT_SIZE), jnp.int32),
        pltpu.SMEM((units.depth, STEP_SIZE), jnp.int32),
        *scales,
    ]
