"""Faults in what the decode kernel for TPU does besides decoding: several queries, and the cache write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from vsurge.kernels import DecodeBlocks
from vsurge.kernels.decode import kernel, step
from vsurge.kernels.decode import mosaic_tpu as decode_tpu
from vsurge.kernels.decode.new_rows import NewRows
from vsurge.kernels.tpu.fetcher import Fetcher
from vsurge.kernels.tpu.units import Units

from ..batches import Setup, decode_batch
from ..cases import check_decode, sinks_of
from ..fused import check_fused
from .faults import Patch, changed, named

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")

SETUP = Setup(page_size=32)
OPTIONS: dict[str, Any] = {"sliding_window": 150, "sinks": sinks_of(SETUP)}
NUM_QUERIES = 3


BLOCKS = DecodeBlocks(128, 1, 2)
LENGTHS = (310, 2, 0, 128, 145)  # the unit of 128, whose last token is new, stands before a full one


def check_queries() -> None:
    batch = decode_batch(SETUP, LENGTHS, num_queries=NUM_QUERIES)
    check_decode(batch, "mosaic_tpu", block_sizes=BLOCKS, **OPTIONS)


def check_write() -> None:
    check_fused(SETUP, LENGTHS, "mosaic_tpu", in_cache=(1,), block_sizes=BLOCKS, **OPTIONS)


def one_token_too_many(patch: Patch) -> None:
    changed(patch, step, "_before_end", lambda f, *shape: f(*shape) - 1)


def one_token_too_few(patch: Patch) -> None:
    changed(patch, step, "_before_end", lambda f, *shape: f(*shape) + 1)


def queries_in_reverse(patch: Patch) -> None:
    changed(patch, step, "_before_end", lambda f, *shape: NUM_QUERIES + 1 - f(*shape))


def first_page_of_the_last_query(patch: Patch) -> None:
    changed(patch, Units, "lowest", lambda f, self, kv_len: f(replace(self, queries=1), kv_len))


def full_for_the_last_query(patch: Patch) -> None:
    def describe(f: Any, self: Fetcher) -> Any:
        return f(replace(self, units=replace(self.units, queries=1)))

    changed(patch, Fetcher, "describe", describe)


def rows_by_query(patch: Patch) -> None:
    def in_order(_: Any, array: Any, __: int) -> Any:
        return array.reshape(array.shape[0], -1, *array.shape[3:])

    changed(patch, decode_tpu, "by_kv_head", in_order)


def output_rows_by_kv_head(patch: Patch) -> None:
    def in_order(_: Any, rows: Any, num_queries: int, __: int) -> Any:
        return rows.reshape(rows.shape[0], num_queries, -1, *rows.shape[2:])

    changed(patch, decode_tpu, "by_query", in_order)


def inserted(change: Callable[..., tuple[Any, ...]]) -> Callable[[Patch], None]:
    """Other arguments of the write: block, token, row and slot."""
    return lambda patch: changed(patch, NewRows, "_insert", lambda f, self, *rest: f(self, *change(*rest)))


def row_as_it_was(block: Any, token: Any, _: Any, slot: Any) -> tuple[Any, ...]:
    return block, token, block[:, :, pl.ds(token, 1)][:, :, 0], slot


def lost_when_a_window_is_set(patch: Patch) -> None:
    def group(f: Any, fetcher: Fetcher, compute: Any, new_rows: Any) -> None:
        f(fetcher, compute, new_rows if fetcher.units.sliding_window is None else None)

    changed(patch, kernel, "attend_group", group)


def taken_for_full(patch: Patch) -> None:
    def describe(f: Any, self: Fetcher) -> Any:
        return f(replace(self, units=replace(self.units, new_tokens=0)))

    changed(patch, Fetcher, "describe", describe)


def other_rows(change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Of [num_seqs, 2, num_kv_heads, head_dim]."""
    return lambda patch: changed(patch, decode_tpu, "encode", lambda f, kv, rows: f(kv, change(rows)))


def padding_written(patch: Patch) -> None:
    def attend(f: Any, *arguments: Any, **options: Any) -> Any:
        *before, (rows, slots) = arguments
        return f(*before, (rows, jnp.maximum(slots, 0)), **options)

    changed(patch, decode_tpu, "_attend", attend)


def last_writes_not_waited_for(patch: Patch) -> None:
    patch.setattr(NewRows, "end", lambda _: None)


WRITE = {
    "row not inserted": inserted(row_as_it_was),
    "row of the token beside it": inserted(lambda block, token, row, slot: (block, token ^ 1, row, slot)),
    "neighbouring tile": inserted(lambda block, token, row, slot: (block, token, row, slot + 8)),
    "neighbouring page": inserted(lambda block, token, row, slot: (block, token, row, slot + 32)),
    "lost when a window is set": lost_when_a_window_is_set,
    "taken for full": taken_for_full,
    "keys and values swapped": other_rows(lambda rows: rows[:, ::-1]),
    "neighbouring sequence": other_rows(lambda rows: jnp.roll(rows, 1, axis=0)),
    "padding written": padding_written,
    "last writes not waited for": last_writes_not_waited_for,
}
QUERIES = {
    "one token too many": one_token_too_many,
    "one token too few": one_token_too_few,
    "queries in reverse": queries_in_reverse,
    "first page of the last query": first_page_of_the_last_query,
    "full for the last query": full_for_the_last_query,
    "rows by query": rows_by_query,
    "output rows by KV head": output_rows_by_kv_head,
}


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_queries, check_write])
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        *named("queries", check_queries, QUERIES, {"full for the last query"}),
        *named("write", check_write, WRITE, {"lost when a window is set"}),
    ],
)
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
