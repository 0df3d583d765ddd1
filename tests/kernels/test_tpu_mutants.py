"""Faults put into the kernels for TPU on purpose: the comparison with the oracle notices each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vsurge.kernels import DecodeBlocks, RaggedBlocks, append_kv, empty_kv_pages, read_kv
from vsurge.kernels.append import mosaic_tpu as append_tpu
from vsurge.kernels.decode import kernel, step
from vsurge.kernels.ragged import columns
from vsurge.kernels.ragged import kernel as ragged_kernel
from vsurge.kernels.ragged import mosaic_tpu as ragged_tpu
from vsurge.kernels.tpu import streams
from vsurge.kernels.tpu.fetcher import FIRST, Fetcher
from vsurge.kernels.tpu.units import Units

from .cases import Setup, check_decode, check_ragged, decode_batch, ragged_batch, sinks_of

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")

Patch = pytest.MonkeyPatch
SETUP = Setup(page_size=32)
QUANTIZED = replace(SETUP, query_dtype="bfloat16", cache_dtype="int8")
OPTIONS: dict[str, Any] = {"sliding_window": 150, "soft_cap": 5.0, "sinks": sinks_of(SETUP)}


def check_decode_kernel() -> None:
    batch = decode_batch(SETUP, (300, 3, 0, 128, 200))
    check_decode(batch, "mosaic_tpu", block_sizes=DecodeBlocks(128, 1, 2), **OPTIONS)


def check_ragged_kernel() -> None:
    batch = ragged_batch(SETUP, (3, 40, 1, 0), (3, 290, 70, 0))
    check_ragged(batch, "mosaic_tpu", block_sizes=RaggedBlocks(16, 128, 2), **OPTIONS)


def check_quantized_decode() -> None:
    batch = decode_batch(QUANTIZED, (300, 3, 0, 128, 200))
    check_decode(batch, "mosaic_tpu", block_sizes=DecodeBlocks(128, 1, 2))


def check_quantized_ragged() -> None:
    batch = ragged_batch(QUANTIZED, (3, 40, 0), (3, 290, 0))
    check_ragged(batch, "mosaic_tpu", block_sizes=RaggedBlocks(16, 128, 2))


def check_quantized_append() -> None:
    keys, values = jnp.arange(1.0, 129.0).reshape(2, 4, 2, 8)
    slots = jnp.asarray([3, 17, -1, 9], jnp.int32)
    got, want = (
        append_kv(empty_kv_pages(2, 16, 2, 8, "int8"), keys, values, slots, implementation=implementation)
        for implementation in ("mosaic_tpu", "reference")
    )
    np.testing.assert_array_equal(got.data, want.data)
    np.testing.assert_array_equal(got.scales, want.scales)


def check_append_kernel() -> None:
    keys, values = jnp.arange(128.0).reshape(2, 4, 2, 8)
    slots = jnp.asarray([3, 17, -1, 9], jnp.int32)
    empty = empty_kv_pages(2, 16, 2, 8, "float32")
    got = read_kv(
        append_kv(empty, keys, values, slots, implementation="mosaic_tpu"), jnp.arange(32, dtype=jnp.int32)
    )
    for rows, new in zip(got, (keys, values), strict=True):
        want = np.zeros(rows.shape)
        want[[3, 17, 9]] = np.asarray(new)[[0, 1, 3]]
        np.testing.assert_array_equal(rows, want)


def changed(patch: Patch, place: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces a function f of a module or class by one that calls change(f, ...)."""
    original = getattr(place, name)
    patch.setattr(place, name, lambda *args, **options: change(original, *args, **options))


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


def wide_units_dropped(patch: Patch) -> None:
    def decode(f: Any, *arguments: Any, **options: Any) -> None:
        *_, fetcher, _, _, _, width = arguments
        if width < fetcher.units.tokens:
            f(*arguments, **options)

    changed(patch, kernel, "compute", decode)
    changed(patch, ragged_kernel, "_widths", lambda f, tokens: f(tokens)[:-1])


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
    def raise_to(f: Any, self: Any, highest: Any, flags: Any) -> Any:
        return f(self, highest, [jnp.bool_(begins) for _ in flags])

    return lambda patch: changed(patch, kernel.Softmax, "raise_to", raise_to)


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


def written(change: Callable[..., tuple[Any, ...]]) -> Callable[[Patch], None]:
    """Other arguments of the cache write."""
    return lambda patch: changed(patch, append_tpu, "_write", lambda f, *arguments: f(*change(*arguments)))


def other_scales(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """`change` gives the scales of keys or values from the right function and its last arguments."""

    def scales_of(f: Any, self: Fetcher, slot: Any, lane: int, kind: int, *which: Any) -> Any:
        return change(lambda kind: f(self, slot, lane, kind, *which), kind)

    return lambda patch: changed(patch, Fetcher, "scales_of", scales_of)


def scaled_weights_summed(patch: Patch) -> None:
    def decode(f: Any, attention: Any, weights: Any, scales: Any, values: Any) -> Any:
        return f(attention, weights * scales, jnp.ones_like(scales), values)

    def ragged(f: Any, values: Any, scales: Any, weights: Any) -> Any:
        return f(values, jnp.ones_like(scales), weights * scales)

    changed(patch, step, "_sums", decode)
    changed(patch, columns, "weighted_sums", ragged)


def unwritten_scales_not_zeroed(patch: Patch) -> None:
    changed(patch, step, "_held", lambda f, *arguments: jnp.ones_like(f(*arguments)))
    patch.setattr(columns, "zero_behind", lambda rows, _: rows)


QUANTIZED_BOTH = {
    "scale of another token": other_scales(lambda right, kind: jnp.roll(right(kind), 1, axis=1)),
    "scale of another head": other_scales(lambda right, kind: jnp.roll(right(kind), 1, axis=0)),
    "key scales ignored": other_scales(lambda right, kind: right(kind) if kind else right(kind) * 0.0 + 0.02),
    "value scales ignored": other_scales(
        lambda right, kind: right(kind) * 0.0 + 0.02 if kind else right(kind)
    ),
    "key and value scales swapped": other_scales(lambda right, kind: right(1 - kind)),
    "scaled weights summed": scaled_weights_summed,
    "unwritten scales not zeroed": unwritten_scales_not_zeroed,
}
BOTH = {
    "neighbouring page": neighbouring_page,
    "table row off by one": table_row_off_by_one,
    "unit begins a page late": unit_begins_a_page_late,
    "keys and values swapped": keys_and_values_swapped,
    "stale buffer": stale_buffer,
    "wide units dropped": wide_units_dropped,
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
RAGGED = {
    "mask skipped": mask_skipped,
    "neighbouring queries": neighbouring_queries,
    "output rows off by one": output_rows_off_by_one,
    "blocks of the next sequence": blocks_of_the_next_sequence,
}
APPEND = {
    "write to the neighbour": written(
        lambda kv, rows, scales, slots: (kv, rows, scales, jnp.where(slots < 0, slots, slots + 1))
    ),
    "padding written": written(lambda kv, rows, scales, slots: (kv, rows, scales, jnp.maximum(slots, 0))),
    "values written as keys": written(lambda kv, rows, scales, slots: (kv, rows[:, ::-1], scales, slots)),
    "rows in another order": written(lambda kv, rows, scales, slots: (kv, rows[::-1], scales, slots)),
}


QUANTIZED_APPEND = {
    "scales of the neighbour": written(lambda kv, rows, scales, slots: (kv, rows, scales[::-1], slots)),
    "scales of values as those of keys": written(
        lambda kv, rows, scales, slots: (kv, rows, scales[:, ::-1], slots)
    ),
    "scales of another head": written(lambda kv, rows, scales, slots: (kv, rows, scales[:, :, ::-1], slots)),
}


SAMPLE = {  # which a run without the slow tests looks at
    *(f"append-{name}" for name in APPEND),
    *("ragged-mask skipped", "ragged-output rows off by one"),
    *("decode-neighbouring page", "decode-one token too many", "decode-window one wider"),
    *("quantized ragged-key scales ignored", "quantized decode-scaled weights summed"),
    "quantized append-scales of the neighbour",
    *("decode-scale one percent off", "decode-sequences run together", "decode-products in bfloat16"),
}


def _cases() -> list[Any]:
    cases = [("append", check_append_kernel, APPEND), ("decode", check_decode_kernel, BOTH | DECODE)]
    cases.append(("ragged", check_ragged_kernel, BOTH | RAGGED))
    cases += [
        ("quantized append", check_quantized_append, QUANTIZED_APPEND),
        ("quantized decode", check_quantized_decode, QUANTIZED_BOTH),
        ("quantized ragged", check_quantized_ragged, QUANTIZED_BOTH),
    ]
    named = [
        (f"{kernel}-{name}", check, fault)
        for kernel, check, faults in cases
        for name, fault in faults.items()
    ]
    return [
        pytest.param(check, fault, id=name, marks=() if name in SAMPLE else pytest.mark.slow)
        for name, check, fault in named
    ]


@pytest.mark.parametrize(
    "check",
    [
        check_decode_kernel,
        check_ragged_kernel,
        check_append_kernel,
        check_quantized_decode,
        check_quantized_ragged,
        check_quantized_append,
    ],
)
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(("check", "fault"), _cases())
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)) as raised:
        check()
    assert isinstance(raised.value, AssertionError) or "Out-of-bounds read" in str(raised.value)
