"""Faults of the attention kernels for TPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from vsurge.kernels.decode import kernel, step
from vsurge.kernels.ragged import columns
from vsurge.kernels.ragged import kernel as ragged_kernel
from vsurge.kernels.ragged import mosaic_tpu as ragged_tpu
from vsurge.kernels.tpu import streams
from vsurge.kernels.tpu.fetcher import FIRST, TOKENS, Fetcher
from vsurge.kernels.tpu.units import Units

from .faults import Patch, changed


def neighbouring_page(patch: Patch) -> None:
    changed(patch, Fetcher, "_page", lambda f, self, slot, lane, i: f(self, slot, lane, i + 1))


def table_row_off_by_one(patch: Patch) -> None:
    def page(_: Any, self: Fetcher, slot: Any, lane: int, i: Any) -> Any:
        return self.table[self.units_in[slot, lane, FIRST] + self.units.table_row + i]

    changed(patch, Fetcher, "_page", page)


def unit_begins_a_page_late(patch: Patch) -> None:
    changed(patch, Units, "first_page", lambda f, self, kv_len: f(self, kv_len) + 1)


def in_attention(**changes: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Other options in the body of both kernels."""

    def fault(patch: Patch) -> None:
        for module, name in ((kernel, "compute"), (ragged_kernel, "attend")):

            def call(f: Any, attention: Any, *rest: Any, **options: Any) -> Any:
                new = {field: change(getattr(attention, field)) for field, change in changes.items()}
                return f(replace(attention, **new), *rest, **options)

            changed(patch, module, name, call)

    return fault


def keys_and_values_swapped(patch: Patch) -> None:
    for module in (step, columns):
        patch.setattr(module, "KEYS", 1)
        patch.setattr(module, "VALUES", 0)


def stale_buffer(patch: Patch) -> None:
    def decode(f: Any, *arguments: Any, **options: Any) -> Any:
        *before, slot, width = arguments
        return f(*before, 1 - slot, width, **options)

    def ragged(f: Any, *arguments: Any) -> Any:
        *before, slot, start, width, seen_by_all = arguments
        return f(*before, 1 - slot, start, width, seen_by_all)

    changed(patch, kernel, "compute", decode)
    changed(patch, ragged_kernel, "attend", ragged)


def steps_dropped(dropped: Callable[[int, int, bool], bool]) -> Callable[[Patch], None]:
    """Of decoding, those for whose width, unit's tokens and whether they are masked `dropped` says so."""

    def compute(f: Any, *arguments: Any, masked: bool) -> None:
        *_, fetcher, _, _, _, width = arguments
        if not dropped(width, fetcher.units.tokens, masked):
            f(*arguments, masked=masked)

    return lambda patch: changed(patch, kernel, "compute", compute)


def last_partial_unit_dropped(patch: Patch) -> None:
    def seen(f: Any, attention: Any, units_in: list[Any], width: int) -> Any:
        whole = [jnp.full((attention.rows, width), unit[TOKENS] % 256 == 0) for unit in units_in]
        return f(attention, units_in, width) & jnp.concatenate(whole)

    changed(patch, step, "_seen", seen)


def blocks_dropped(dropped: Callable[[int, int, int], bool]) -> Callable[[Patch], None]:
    """Of prompts, those for whose width, unit's tokens and tokens that all queries see `dropped` says so."""

    def attend(f: Any, *arguments: Any) -> None:
        _, _, fetcher, *_, width, seen_by_all = arguments
        if not dropped(width, fetcher.units.tokens, seen_by_all):
            f(*arguments)

    return lambda patch: changed(patch, ragged_kernel, "attend", attend)


def one_token_too_many(patch: Patch) -> None:
    changed(patch, step, "_seen", lambda f, *args: jnp.roll(f(*args), 1, axis=1))
    _other_count(patch, -1)


def one_token_too_few(patch: Patch) -> None:
    changed(patch, step, "_seen", lambda f, *args: f(*args) & jnp.roll(f(*args), -1, axis=1))
    _other_count(patch, 1)


def _other_count(patch: Patch, more: int) -> None:
    def attend(f: Any, *arguments: Any) -> Any:
        *before, count, slot, start, width, seen_by_all = arguments
        return f(*before, count + more, slot, start, width, seen_by_all)

    changed(patch, ragged_kernel, "attend", attend)


def mask_skipped(patch: Patch) -> None:
    """Where only some queries see some tokens."""
    changed(patch, ragged_kernel, "attend", lambda f, *arguments: f(*arguments[:-1], arguments[-2]))


def earlier_units_not_rescaled(patch: Patch) -> None:
    def add(f: Any, self: Any, highest: Any, keeps: Any, *rest: Any) -> None:
        f(self, highest, [jnp.where(keep > 0, 1.0, 0.0) for keep in keeps], *rest)

    changed(patch, kernel.Softmax, "add", add)
    changed(
        patch,
        ragged_kernel.Softmax,
        "add",
        lambda f, self, head, part, keep, sums: f(self, head, part, jnp.ones_like(keep), sums),
    )


def scores_overwritten(patch: Patch) -> None:
    """By those that are made meanwhile."""

    def items_of(f: Any, *arguments: Any) -> Any:
        return [replace(item, waiting=0) for item in f(*arguments)]

    changed(patch, columns, "items_of", items_of)


def sinks_ignored(patch: Patch) -> None:
    nothing = jnp.full_like
    changed(patch, kernel.Softmax, "write", lambda f, self, s, *o: f(self, nothing(s[...], -1e30), *o))
    changed(
        patch,
        ragged_kernel.Softmax,
        "with_sinks",
        lambda f, self, head, part, s: f(self, head, part, nothing(s[...], -1e30)),
    )


def all_units_begin(begins: bool) -> Callable[[Patch], None]:
    def same(flags: Any) -> list[Any]:
        return [jnp.bool_(begins) for _ in flags]

    def raise_to(f: Any, self: Any, highest: Any, flags: Any) -> Any:
        return f(self, highest, same(flags))

    def add(f: Any, self: Any, *sums: Any) -> None:
        *before, flags, sequences = sums
        f(self, *before, same(flags), sequences)

    def fault(patch: Patch) -> None:
        changed(patch, kernel.Softmax, "raise_to", raise_to)
        changed(patch, kernel.Softmax, "add", add)

    return fault


def heads_swapped(patch: Patch) -> None:
    def first_two(rows: Any, axis: int) -> Any:
        parts = [lax.slice_in_dim(rows, begin, end, axis=axis) for begin, end in ((1, 2), (0, 1), (2, None))]
        return jnp.concatenate(parts, axis=axis)

    def swapped(f: Any, *arguments: Any) -> Any:
        return first_two(f(*arguments), axis=-2)

    changed(patch, streams.Products, "weighted", swapped)
    changed(
        patch,
        ragged_kernel.BlockIO,
        "_output",
        lambda f, self, head, part: f(self, head ^ 1 if head < 2 else head, part),
    )


def products_in_bfloat16(patch: Patch) -> None:
    low = jnp.bfloat16
    for module in (streams, columns):
        changed(patch, module, "dot", lambda f, left, right, **o: f(left.astype(low), right.astype(low), **o))


def neighbouring_queries(patch: Patch) -> None:
    def start(f: Any, self: Any, block: Any, row: Any, count: Any) -> None:
        f(self, block, row if self.write else row + 1, count)

    changed(patch, ragged_kernel.RaggedRows, "start", start)


def output_rows_off_by_one(patch: Patch) -> None:
    def start(f: Any, self: Any, block: Any, row: Any, count: Any) -> None:
        f(self, block, row + 1 if self.write else row, count)

    changed(patch, ragged_kernel.RaggedRows, "start", start)


def blocks_of_the_next_sequence(patch: Patch) -> None:
    def cut(f: Any, *arguments: Any) -> Any:
        blocks, sequences = f(*arguments)
        return blocks, sequences + 1

    changed(patch, ragged_tpu, "cut_queries", cut)


BOTH = {
    "neighbouring page": neighbouring_page,
    "table row off by one": table_row_off_by_one,
    "unit begins a page late": unit_begins_a_page_late,
    "keys and values swapped": keys_and_values_swapped,
    "stale buffer": stale_buffer,
    "one token too many": one_token_too_many,
    "one token too few": one_token_too_few,
    "window one wider": in_attention(sliding_window=lambda window: window + 1),
    "window one narrower": in_attention(sliding_window=lambda window: window - 1),
    "scale one percent off": in_attention(scale=lambda scale: scale * 0.99),
    "soft cap ignored": in_attention(soft_cap=lambda _: None),
    "sinks ignored": sinks_ignored,
    "earlier units not rescaled": earlier_units_not_rescaled,
    "heads swapped": heads_swapped,
    "products in bfloat16": products_in_bfloat16,
}
DECODE = {
    "sequences run together": all_units_begin(False),
    "every unit begins a sequence": all_units_begin(True),
}
DECODE_IN_WHOLE_STEPS = {
    "masked steps dropped": steps_dropped(lambda _, __, masked: masked),
    "whole steps dropped": steps_dropped(lambda _, __, masked: not masked),
    "wide masked steps dropped": steps_dropped(lambda width, tokens, masked: masked and width == tokens),
    "narrow masked steps dropped": steps_dropped(lambda width, tokens, masked: masked and width < tokens),
    "last partial unit dropped": last_partial_unit_dropped,
}
RAGGED_WIDE = {
    "whole blocks dropped": blocks_dropped(lambda width, tokens, _: width == tokens),
    "narrow blocks dropped": blocks_dropped(lambda width, tokens, _: width < tokens),
    "last partial block dropped": blocks_dropped(lambda width, _, seen_by_all: seen_by_all < width),
}
RAGGED = {
    "mask skipped": mask_skipped,
    "scores overwritten": scores_overwritten,
    "neighbouring queries": neighbouring_queries,
    "output rows off by one": output_rows_off_by_one,
    "blocks of the next sequence": blocks_of_the_next_sequence,
}
