"""Checks of where new tokens are written, as `debug=True` asks for."""

from __future__ import annotations

from functools import partial

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from .kv_pages import KVPages
from .validation import when_run


def check_slots(kv_lens: ArrayLike, page_table: ArrayLike, slots: ArrayLike, *, page_size: int) -> None:
    """Checks on the host where a decode step writes its new tokens.

    Args:
        kv_lens, page_table: as in `vsurge.kernels.paged_decode_attention`.
        slots: [num_seqs, num_queries].
        page_size: of the cache.

    Raises:
        ValueError: names the sequence, the slot and what is allowed.
    """
    lengths, table, places = (np.asarray(a).astype(np.int64) for a in (kv_lens, page_table, slots))
    used = [set(table[i, : -(-length // page_size)].tolist()) for i, length in enumerate(lengths)]
    for i, j in np.argwhere(places >= 0).tolist():
        slot = int(places[i, j])
        position = int(lengths[i]) - places.shape[1] + j
        if position < 0:
            raise ValueError(f"sequence {i}: {slot=} of a token before its begin, must be negative")
        page, offset = table[i, position // page_size], position % page_size
        if slot != page * page_size + offset:
            raise ValueError(f"sequence {i}: {slot=}, its page table says {page * page_size + offset}")
        if others := [other for other, pages in enumerate(used) if other != i and page in pages]:
            raise ValueError(f"sequence {i}: writes to page {page}, which sequence {others[0]} has as well")


def check_prompt_slots(
    kv_lens: ArrayLike,
    page_table: ArrayLike,
    query_starts: ArrayLike,
    num_seqs: ArrayLike,
    slots: ArrayLike,
    *,
    page_size: int,
) -> None:
    """Checks on the host where a step of any tokens writes them.

    Args:
        kv_lens, page_table, query_starts, num_seqs: as in `vsurge.kernels.ragged_paged_attention`, checked.
        slots: [num_tokens].
        page_size: of the cache.

    Raises:
        ValueError: names the sequence, the slot and what is allowed.
    """
    lengths, table, starts, places = (
        np.asarray(a).astype(np.int64) for a in (kv_lens, page_table, query_starts, slots)
    )
    count = int(np.asarray(num_seqs).reshape(()))
    for i in range(count):
        begin, end = int(starts[i]), int(starts[i + 1])
        positions = int(lengths[i]) - (end - begin) + np.arange(end - begin)
        right = table[i, positions // page_size] * page_size + positions % page_size
        for row in np.flatnonzero((places[begin:end] >= 0) & (places[begin:end] != right)).tolist():
            raise ValueError(
                f"sequence {i}: slots[{begin + row}]={places[begin + row]}, its page table says {right[row]}"
            )
    end = int(starts[count]) if count else 0
    for row in (end + np.flatnonzero(places[end:] >= 0)).tolist():
        raise ValueError(f"slots[{row}]={places[row]}: of no sequence's token, must be negative")
    check_written(places, num_slots=None)


def check_written(slots: ArrayLike, *, num_slots: int | None) -> None:
    """Checks on the host that slots lie in the pool, and that none is written twice.

    Args:
        slots: [num_tokens]; negative ones are skipped.
        num_slots: of the pool; None if that is known.

    Raises:
        ValueError: names the tokens, the slot and what is allowed.
    """
    places = np.asarray(slots).astype(np.int64)
    seen = dict[int, int]()
    for token in np.flatnonzero(places >= 0).tolist():
        slot = int(places[token])
        if num_slots is not None and slot >= num_slots:
            raise ValueError(
                f"slots[{token}]={slot}: must be less than num_pages * page_size = {num_slots}, or negative "
                "for padding"
            )
        if slot in seen:
            raise ValueError(f"slots[{token}]={slot}: token {seen[slot]} is written there as well")
        seen[slot] = token


def check_prompt_slots_when_run(
    kv_pages: KVPages, kv_lens: Array, page_table: Array, query_starts: Array, num_seqs: Array, slots: Array
) -> None:
    """`check_prompt_slots` as `check_metadata_when_run` does its check."""
    check = partial(check_prompt_slots, page_size=kv_pages.page_size)
    when_run(check, kv_lens, page_table, query_starts, num_seqs, slots)


def check_written_when_run(kv_pages: KVPages, slots: Array) -> None:
    """`check_written` as `check_metadata_when_run` does its check."""
    when_run(partial(check_written, num_slots=kv_pages.num_pages * kv_pages.page_size), slots)


def check_slots_when_run(kv_pages: KVPages, kv_lens: Array, page_table: Array, slots: Array) -> None:
    """`check_slots` as `check_metadata_when_run` does its check."""
    when_run(partial(check_slots, page_size=kv_pages.page_size), kv_lens, page_table, slots)
