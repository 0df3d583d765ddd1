"""Faults in the copies of the kernels for TPU: what is not waited for, and what is copied without need.

None of them need change a number: the first are races, which the interpreter looks for, and the others are
seen by pages that a kernel has no business with, whose entries in the page table point nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from vsurge.kernels import DecodeBlocks, RaggedBlocks, paged_decode_attention, ragged_paged_attention
from vsurge.kernels.decode import mosaic_tpu as decode_tpu
from vsurge.kernels.decode import reference as decode_reference
from vsurge.kernels.decode.kernel import ByGroup
from vsurge.kernels.decode.new_rows import NewRows
from vsurge.kernels.ragged import reference as ragged_reference
from vsurge.kernels.ragged.query_blocks import RaggedRows
from vsurge.kernels.tpu.fetcher import Fetcher
from vsurge.kernels.tpu.units import Units

from ..batches import Setup, decode_batch, ragged_batch
from ..cases import TOLERANCES, assert_rows_close
from ..interpreter import races_in
from ..tpu_runs import BFLOAT16, BLOCKS, LENGTHS, attend, attend_fused, attend_ragged
from .faults import Patch, changed, named

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")

SETUP, WINDOW = Setup(page_size=32), 150
NOWHERE = 2**31 - 1  # a page that no pool has
OPTIONS: dict[str, Any] = {"scale": SETUP.scale, "sliding_window": WINDOW, "soft_cap": None, "sinks": None}


def beside_window(table: Any, kv_lens: Any, new_tokens: Any, *, block: int = 1) -> Any:
    """The page table with NOWHERE for pages that no new token sees, before the window or behind the end.

    Of a block of `block` queries that is not full, as many tokens more may be fetched as it has queries less.
    """
    lens, page = np.asarray(kv_lens)[:, None], np.arange(table.shape[1])
    first = np.maximum(lens - np.asarray(new_tokens)[:, None] + 1 - WINDOW - (block - 1), 0)
    first //= SETUP.page_size
    seen = (page >= first) & (page * SETUP.page_size < lens)
    assert (~seen & (page * SETUP.page_size < lens)).any()  # the window spares some
    return jnp.asarray(np.where(seen, table, NOWHERE), jnp.int32)


def check_decode_copies() -> None:
    queries, kv_pages, kv_lens, table = decode_batch(SETUP, (700, 3, 0, 128, 200)).arguments
    want = decode_reference.paged_decode_attention(queries[:, None], kv_pages, kv_lens, table, **OPTIONS)
    got = paged_decode_attention(
        queries,
        kv_pages,
        kv_lens,
        beside_window(table, kv_lens, np.ones(5, int)),
        **OPTIONS,
        block_sizes=DecodeBlocks(128, 1, 2),
        implementation="mosaic_tpu",
    )
    assert_rows_close(got, want[0][:, 0], TOLERANCES["float32"])


def check_ragged_copies() -> None:
    new, lens = (3, 20, 1), (3, 300, 260)
    queries, kv_pages, kv_lens, table, *rest = ragged_batch(SETUP, new, lens, max_seqs=3).arguments
    want, _ = ragged_reference.ragged_paged_attention(queries, kv_pages, kv_lens, table, *rest, **OPTIONS)
    got = ragged_paged_attention(
        queries,
        kv_pages,
        kv_lens,
        beside_window(table, kv_lens, new, block=16),
        *rest,
        **OPTIONS,
        block_sizes=RaggedBlocks(16, 128, 2),
        implementation="mosaic_tpu",
    )
    assert_rows_close(got[: sum(new)], want[: sum(new)], TOLERANCES["float32"])


def everything_fetched_despite_the_window(patch: Patch) -> None:
    """And masked, so that the output is right."""
    changed(patch, Units, "lowest", lambda _, __, kv_len: jnp.zeros_like(kv_len))


def a_page_more_before_the_window(patch: Patch) -> None:
    changed(patch, Units, "first_page", lambda f, self, kv_len: jnp.maximum(f(self, kv_len) - 1, 0))


def whole_units_fetched(patch: Patch) -> None:
    """Beyond a sequence's end."""
    changed(patch, Fetcher, "start", lambda _, self, slot: self.start_whole(slot))


UNNEEDED = {
    "everything fetched despite the window": everything_fetched_despite_the_window,
    "a page more before the window": a_page_more_before_the_window,
    "whole units fetched": whole_units_fetched,
}


def attend_in_two_slots() -> Any:
    batch = decode_batch(BFLOAT16, LENGTHS)
    return decode_tpu.paged_decode_attention.__wrapped__(  # pyright: ignore[reportAttributeAccessIssue]
        batch.arguments[0][:, None],
        *batch.arguments[1:],
        **OPTIONS | {"sliding_window": None},
        block_sizes=BLOCKS[0],
    )


def missing_wait(patch: Patch) -> None:
    patch.setattr(Fetcher, "wait", lambda *_: None)
    patch.setattr(Fetcher, "wait_whole", lambda *_: None)


def copied_over_what_is_in_use(patch: Patch) -> None:
    right = Fetcher._copy

    def copy(self: Fetcher, slot: Any, *place: Any) -> Any:
        shifted = replace(self, buffer=self.buffer.at[pl.ds(1 - slot, 1)])  # of the two slots the other one
        return right(replace(shifted, arrived=self.arrived.at[pl.ds(slot, 1)]), 0, *place)

    patch.setattr(Fetcher, "_copy", copy)


def queries_not_waited_for(patch: Patch) -> None:
    changed(patch, RaggedRows, "wait", lambda f, self, *place: f(self, *place) if self.write else None)


RACES = {
    "missing wait": (attend_in_two_slots, missing_wait),
    "copied over what is in use": (attend_in_two_slots, copied_over_what_is_in_use),
    "written tile not waited for": (
        attend_fused,
        lambda patch: patch.setattr(NewRows, "_wait", lambda *_: None),
    ),
    "queries of a block not waited for": (attend_ragged, queries_not_waited_for),
}


@pytest.mark.parametrize(
    "check", [check_decode_copies, pytest.param(check_ragged_copies, marks=pytest.mark.slow)]
)
def test_a_window_spares_the_copies_of_the_pages_before_it(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        *named("decode", check_decode_copies, UNNEEDED, {"everything fetched despite the window"}),
        *named("ragged", check_ragged_copies, UNNEEDED, {"everything fetched despite the window"}),
    ],
)
def test_a_fault_is_noticed_by_pages_that_are_nowhere(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds read"):
        check()


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        pytest.param(*race, id=name, marks=() if name == "missing wait" else pytest.mark.slow)
        for name, race in RACES.items()
    ],
)
def test_a_fault_is_noticed_as_a_race(
    run: Callable[[], Any], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    assert races_in(run, "eager", monkeypatch)


def group_not_waited_for(patch: Patch) -> None:
    patch.setattr(ByGroup, "wait", lambda *_: None)


@pytest.mark.slow
def test_a_fault_is_noticed_where_copies_come_as_late_as_they_may(monkeypatch: Patch) -> None:
    """No race is reported of a group's queries, so they are looked at: what nobody waits for has not come."""
    group_not_waited_for(monkeypatch)
    with pytest.raises(AssertionError, match="rows differ"):
        races_in(lambda: attend(BLOCKS[0]), "on_wait", monkeypatch)
