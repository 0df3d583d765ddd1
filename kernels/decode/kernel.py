# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The body of the decode kernel for TPU.

What moves when: the tokens of all sequences are cut into units of `kv_tokens` (see `tpu/units.py`). A step
computes `lanes` units side by side out of vector memory (VMEM), while the pages of the next steps are under
way from HBM, whichever sequences they belong to; only pages that hold tokens are fetched. The sequences'
softmaxes stay in VMEM until all sequences of the grid step's group are done (see `softmax.py`). So a
sequence's beginning and end cost nothing; a group's do.

A step whose tokens are all there and all seen, while all pages of the step to be fetched are needed, runs
code without branches or masks. Any other step runs the code of the smallest width that holds its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..kv_pages import KVPages
from ..tpu.control import largest
from ..tpu.fetcher import FULL, LAST, TOKENS, Fetcher
from ..tpu.units import Units
from .new_rows import NewRows
from .softmax import Softmax
from .step import Attention, compute, widths_of


@dataclass(frozen=True)
class ByGroup:
    """An input of which each group of sequences has a part, copied while the group before is computed.

    Attributes:
        hbm: [num_groups * seqs, ...].
        buffers: [2, seqs, ...] in VMEM, of which groups take turns.
        arrived: [2] DMA semaphores.
    """

    hbm: Any
    buffers: Any
    arrived: Any

    def start(self, group: Any) -> None:
        self._copy(group).start()

    def wait(self, group: Any) -> None:
        self._copy(group).wait()

    def part(self, group: Any) -> Any:
        """A group's part, to be waited for."""
        return self.buffers.at[jnp.int32(group) & 1]

    def _copy(self, group: Any) -> Any:
        seqs = self.buffers.shape[1]
        arrived = self.arrived.at[jnp.int32(group) & 1]
        return pltpu.make_async_copy(self.hbm.at[pl.ds(group * seqs, seqs)], self.part(group), arrived)


class Inputs(NamedTuple):
    """A call's inputs in HBM.

    Attributes:
        kv_pages: the cache.
        kv_lens, table: [padded num_groups * seqs] and [num_groups * table_group] int32.
        queries: [num_groups * seqs, rows, head_dim].
        sinks: [rows, LANES] float32, to the base of 2; MASKED for none.
        slots, new_rows: see `NewRows`, [padded num_groups * seqs] int32 and [num_groups * seqs, 2,
            num_kv_heads, head_dim]; None unless they are to be written.
    """

    kv_pages: Any
    kv_lens: Any
    table: Any
    queries: Any
    sinks: Any
    slots: Any = None
    new_rows: Any = None


class Outputs(NamedTuple):
    """A group's results in VMEM, and the cache.

    Attributes:
        output, log_sum_exp: [seqs, rows, head_dim | LANES], the latter the same in all lanes.
        data: the cache's data in HBM; None unless it is written.
    """

    output: Any
    log_sum_exp: Any
    data: Any = None


class Copied(NamedTuple):
    """Where a kernel has its inputs: as in `Inputs`, of a group at a time [2, seqs, ...]."""

    kv_lens: Any
    queries: Any
    sinks: Any
    slots: Any
    new_rows: Any
    arrived: Any
    queries_arrived: Any
    rows_arrived: Any


def kernel(
    attention: Attention,
    units: Units,
    cache: KVPages,
    num_groups: Any,
    inputs: Inputs,
    outputs: Outputs,
    copied: Copied,
    softmax: Softmax,
    new_rows_refs: list[Any],
    fetcher_refs: list[Any],
) -> None:
    """One grid step: the sequences of a group.

    Everything is copied here, so that a call begins with waiting for the memory twice, not once for each
    input: for lengths and page table, then for the first pages.

    Args:
        attention, units, cache: static; of `cache` only what it says of its data.
        num_groups: [1] int32 in scalar memory, the groups up to the last sequence with tokens.
        inputs, outputs, copied, softmax: see there.
        new_rows_refs, fetcher_refs: see `new_rows_scratch` and `fetcher_scratch`.
    """
    group, used = pl.program_id(0), num_groups[0]
    kv_hbm = inputs.kv_pages if outputs.data is None else replace(inputs.kv_pages, data=outputs.data)
    fetcher = Fetcher(units, used, copied.kv_lens, inputs.table, kv_hbm, *fetcher_refs)
    lengths = [pltpu.make_async_copy(inputs.kv_lens, copied.kv_lens, copied.arrived.at[0])]
    sinks = pltpu.make_async_copy(inputs.sinks, copied.sinks, copied.arrived.at[1])
    by_group = [ByGroup(inputs.queries, copied.queries, copied.queries_arrived)]
    new_rows = None
    if outputs.data is not None:
        lengths.append(pltpu.make_async_copy(inputs.slots, copied.slots, copied.arrived.at[2]))
        by_group.append(ByGroup(inputs.new_rows, copied.new_rows, copied.rows_arrived))
        rows = by_group[1].part(group)
        new_rows = NewRows(copied.slots, rows, outputs.data, *new_rows_refs)

    def start_group(of: Any) -> None:
        for part in by_group:
            part.start(of)

    @pl.when(group == 0)
    def _() -> None:
        sinks.start()
        softmax.begin()
        if new_rows:
            new_rows.begin()

        @pl.when(used > 0)
        def _() -> None:
            for copy in lengths:
                copy.start()
            start_group(0)
            fetcher.begin(meanwhile=lambda: [copy.wait() for copy in lengths])

    pl.when(group + 1 < used)(lambda: start_group(group + 1))
    softmax.begin_group()

    @pl.when(group < used)
    def _() -> None:
        for part in by_group:
            part.wait(group)
        queries = by_group[0].part(group)
        attend_group(fetcher, partial(compute, attention, cache, fetcher, queries, softmax), new_rows)

    pl.when(group == 0)(sinks.wait)
    if new_rows:
        pl.when(group == pl.num_programs(0) - 1)(new_rows.end)
    softmax.write(copied.sinks, outputs.output, outputs.log_sum_exp)


def attend_group(fetcher: Fetcher, attend: Callable[..., None], new_rows: NewRows | None) -> None:
    """Takes the steps of a group; `attend` is `compute` from its `slot` on."""
    units = fetcher.units
    fetcher.begin_group()

    def step(_: Any) -> Any:
        slot, coming = fetcher.take_oldest()
        last = fetcher.step_in[slot, LAST]
        full = (fetcher.step_in[slot, FULL] == 1) & (fetcher.step_in[coming, FULL] == 1)

        @pl.when(full)
        def _() -> None:
            fetcher.wait_whole(slot)
            attend(slot, units.tokens, masked=False)
            fetcher.start_whole(coming)  # after the arithmetic, whose last sums it hides
            fetcher.describe()

        @pl.when(~full)
        def _() -> None:
            fetcher.wait(slot)
            if new_rows:
                new_rows.insert(fetcher, slot)
            most, narrower = (
                largest([fetcher.units_in[slot, lane, TOKENS] for lane in range(units.lanes)]),
                -1,
            )
            for width in [0, *widths_of(units.tokens)]:

                @pl.when((most > narrower) & (most <= width))
                def _(width: int = width) -> None:
                    fetcher.start(coming)  # here, where the arithmetic beside it hides it
                    if width:
                        attend(slot, width, masked=True)
                    fetcher.describe()

                narrower = width

        return last

    lax.while_loop(lambda last: last == 0, step, jnp.int32(0))
