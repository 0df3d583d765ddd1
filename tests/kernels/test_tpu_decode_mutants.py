"""Faults in what the decode kernel for TPU does for several queries per sequence: each is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vsurge.kernels import DecodeBlocks
from vsurge.kernels.decode import mosaic_tpu as decode_tpu
from vsurge.kernels.tpu.units import Fetcher, Units

from .cases import Setup, check_decode, decode_batch, sinks_of
from .test_tpu_mutants import Patch, changed

pytestmark = pytest.mark.usefixtures("traced_anew")

SETUP = Setup(page_size=32)
OPTIONS: dict[str, Any] = {"sliding_window": 150, "sinks": sinks_of(SETUP)}
NUM_QUERIES = 3


def check_queries() -> None:
    """A unit whose last token only the last query sees stands before a full one."""
    batch = decode_batch(SETUP, (310, 2, 0, 128, 145), num_queries=NUM_QUERIES)
    check_decode(batch, "mosaic_tpu", block_sizes=DecodeBlocks(128, 1, 2), **OPTIONS)


def one_token_too_many(patch: Patch) -> None:
    changed(patch, decode_tpu, "_before_end", lambda f, *shape: f(*shape) - 1)


def one_token_too_few(patch: Patch) -> None:
    changed(patch, decode_tpu, "_before_end", lambda f, *shape: f(*shape) + 1)


def queries_in_reverse(patch: Patch) -> None:
    changed(patch, decode_tpu, "_before_end", lambda f, *shape: NUM_QUERIES + 1 - f(*shape))


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


QUERIES = [
    one_token_too_many,
    one_token_too_few,
    queries_in_reverse,
    first_page_of_the_last_query,
    full_for_the_last_query,
    rows_by_query,
    output_rows_by_kv_head,
]
SAMPLE = {full_for_the_last_query}  # which a run without the slow tests looks at


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_queries])
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        pytest.param(check_queries, fault, marks=() if fault in SAMPLE else pytest.mark.slow)
        for fault in QUERIES
    ],
)
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
