"""Faults put into the xla implementation on purpose: the comparison with the oracle notices each of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vsurge.kernels import append, append_kv, blockwise, decode, empty_kv_pages, kv_pages, ragged, read_kv
from vsurge.kernels.append import xla as append_xla
from vsurge.kernels.decode import xla as decode_xla
from vsurge.kernels.ragged import xla as ragged_xla

from ..batches import Setup, decode_batch, ragged_batch
from ..cases import check_decode, check_ragged, sinks_of
from .faults import Patch, changed


def check_ragged_kernel() -> None:
    setup = Setup()
    batch = ragged_batch(setup, (3, 135, 1, 0), (3, 300, 270, 0))
    check_ragged(batch, "xla", sliding_window=200, soft_cap=5.0, sinks=sinks_of(setup))


def check_decode_kernel() -> None:
    setup = Setup()
    batch = decode_batch(setup, (270, 3, 0, 128, 400))
    check_decode(batch, "xla", sliding_window=200, soft_cap=5.0, sinks=sinks_of(setup))


def check_quantized_kernel() -> None:
    setup = Setup(cache_dtype="int8")
    check_decode(decode_batch(setup, (270, 3, 0, 128, 400)), "xla", sliding_window=200)


def check_quantized_append() -> None:
    keys, values = jnp.arange(1.0, 129.0).reshape(2, 4, 2, 8)
    slots = jnp.asarray([3, 17, -1, 9], jnp.int32)
    got, want = (
        append_kv(empty_kv_pages(2, 16, 2, 8, "int8"), keys, values, slots, implementation=implementation)
        for implementation in ("xla", "reference")
    )
    assert (got.data == want.data).all()
    assert (jnp.asarray(got.scales) == jnp.asarray(want.scales)).all()


def check_append_kernel() -> None:
    keys, values = jnp.arange(128.0).reshape(2, 4, 2, 8)
    written = append_kv(
        empty_kv_pages(2, 16, 2, 8, "float32"), keys, values, jnp.asarray([3, 17, -1, 9], jnp.int32)
    )
    got = read_kv(written, jnp.arange(32, dtype=jnp.int32))
    for rows, new in zip(got, (keys, values), strict=True):
        want = jnp.zeros_like(rows).at[jnp.asarray([3, 17, 9])].set(new[jnp.asarray([0, 1, 3])])
        assert (rows == want).all()


def neighbouring_page(patch: Patch) -> None:
    changed(patch, blockwise, "load_block", lambda f, kv, pages, *rest, **o: f(kv, pages + 1, *rest, **o))


def stale_first_page(patch: Patch) -> None:
    changed(
        patch,
        blockwise,
        "load_block",
        lambda f, kv, pages, *a, **o: f(kv, pages.at[:, 0].set(pages[:, 1]), *a, **o),
    )


def keys_and_values_swapped(patch: Patch) -> None:
    changed(patch, blockwise, "load_block", lambda f, kv, pages, kind, **o: f(kv, pages, 1 - kind, **o))


def unwritten_values_not_zeroed(patch: Patch) -> None:
    changed(patch, blockwise, "load_block", lambda f, kv, pages, kind, **_: f(kv, pages, kind))


def shifted_positions(patch: Patch, shift: int) -> None:
    def change(f: Any, queries: Any, positions: Any, *rest: Any, **options: Any) -> Any:
        return f(queries, positions + shift, *rest, **options)

    changed(patch, decode_xla, "attend_pages", change)
    changed(patch, ragged_xla, "attend_pages", change)


def one_key_too_many(patch: Patch) -> None:
    shifted_positions(patch, 1)


def one_key_too_few(patch: Patch) -> None:
    shifted_positions(patch, -1)


def changed_option(patch: Patch, name: str, change: Callable[[Any], Any]) -> None:
    def changed_call(f: Any, *arguments: Any, **options: Any) -> Any:
        return f(*arguments, **options | {name: change(options[name])})

    changed(patch, decode_xla, "attend_pages", changed_call)
    changed(patch, ragged_xla, "attend_pages", changed_call)


def window_one_wider(patch: Patch) -> None:
    changed_option(patch, "sliding_window", lambda window: window + 1)


def window_one_narrower(patch: Patch) -> None:
    changed_option(patch, "sliding_window", lambda window: window - 1)


def scale_one_percent_off(patch: Patch) -> None:
    changed_option(patch, "scale", lambda scale: scale * 0.99)


def soft_cap_ignored(patch: Patch) -> None:
    changed_option(patch, "soft_cap", lambda _: None)


def sinks_ignored(patch: Patch) -> None:
    changed_option(patch, "sinks", lambda _: None)


def rows_beyond_the_end_written(patch: Patch) -> None:
    changed(
        patch, ragged_xla, "_put", lambda f, result, rows, start, _: f(result, rows, start, rows.shape[0])
    )


def last_block_dropped(patch: Patch) -> None:
    lax = SimpleNamespace(**vars(jax.lax))
    lax.fori_loop = lambda lower, upper, body, start: jax.lax.fori_loop(lower, upper - 1, body, start)
    patch.setattr(blockwise, "lax", lax)


def earlier_blocks_not_rescaled(patch: Patch) -> None:
    def change(f: Any, softmax: Any, *rest: Any, **options: Any) -> Any:
        new = f(softmax, *rest, **options)
        missing = 1.0 - jnp.exp(softmax.highest - new.highest)
        return new._replace(weighted=new.weighted + missing[..., None] * softmax.weighted)

    changed(patch, blockwise, "update", change)


def products_in_bfloat16(patch: Patch) -> None:
    low = jnp.bfloat16
    changed(patch, blockwise, "_dot", lambda f, left, right, **o: f(left.astype(low), right.astype(low), **o))


def heads_swapped(patch: Patch) -> None:
    def change(f: Any, *arguments: Any) -> Any:
        tokens = f(*arguments)
        return tokens.at[:, :, :2].set(tokens[:, :, 1::-1])

    changed(patch, blockwise, "_tokens_by_q_head", change)


def write_to_the_neighbour(patch: Patch) -> None:
    changed(
        patch,
        append_xla,
        "write_rows",
        lambda f, kv, k, v, slots: f(kv, k, v, jnp.where(slots < 0, slots, slots + 1)),
    )


def padding_written(patch: Patch) -> None:
    changed(patch, append_xla, "write_rows", lambda f, kv, k, v, slots: f(kv, k, v, jnp.maximum(slots, 0)))


def values_written_as_keys(patch: Patch) -> None:
    changed(patch, append_xla, "write_rows", lambda f, kv, k, v, slots: f(kv, v, k, slots))


def other_scales(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """`change` gives the scales of keys or values from the right function and its last arguments."""

    def load(f: Any, kv: Any, pages: Any, kind: int, **options: Any) -> Any:
        return change(lambda kind: f(kv, pages, kind, **options), kind)

    return lambda patch: changed(patch, blockwise, "load_scales", load)


def unwritten_scales_not_zeroed(patch: Patch) -> None:
    changed(patch, blockwise, "load_scales", lambda f, kv, pages, kind, **_: f(kv, pages, kind))


def scaled_weights_summed(patch: Patch) -> None:
    def change(f: Any, softmax: Any, queries: Any, keys: Any, values: Any, *rest: Any, **options: Any) -> Any:
        totals = jnp.broadcast_to(softmax.total[..., None], softmax.weighted.shape)
        ones = jnp.ones_like(values)
        scaled = f(softmax._replace(weighted=totals), queries, keys, ones, *rest, **options)
        return f(softmax, queries, keys, values, *rest, **options)._replace(total=scaled.weighted[..., 0])

    changed(patch, blockwise, "update", change)


def numbers_of_another_scale(patch: Patch) -> None:
    changed(patch, kv_pages, "quantize", lambda f, rows, dtype: f(rows * 1.01, dtype))


SCALE_FAULTS = {
    "scale of another token": other_scales(lambda right, kind: jnp.roll(right(kind), 1, axis=2)),
    "scale of another head": other_scales(lambda right, kind: jnp.roll(right(kind), 1, axis=1)),
    "key scales ignored": other_scales(lambda right, kind: right(kind) if kind else right(kind) * 0.0 + 0.02),
    "value scales ignored": other_scales(
        lambda right, kind: right(kind) * 0.0 + 0.02 if kind else right(kind)
    ),
    "key and value scales swapped": other_scales(lambda right, kind: right(1 - kind)),
    "unwritten scales not zeroed": unwritten_scales_not_zeroed,
    "scaled weights summed": scaled_weights_summed,
}
ATTENTION_FAULTS = [
    neighbouring_page,
    stale_first_page,
    keys_and_values_swapped,
    unwritten_values_not_zeroed,
    one_key_too_many,
    one_key_too_few,
    window_one_wider,
    window_one_narrower,
    scale_one_percent_off,
    soft_cap_ignored,
    sinks_ignored,
    last_block_dropped,
    earlier_blocks_not_rescaled,
    products_in_bfloat16,
    heads_swapped,
]
APPEND_FAULTS = [write_to_the_neighbour, padding_written, values_written_as_keys]
FAULTS = [  # both attention kernels walk the same blocks, so that half of the faults need a look at one only
    *((check_ragged_kernel, fault) for fault in ATTENTION_FAULTS[1::2]),
    *((check_decode_kernel, fault) for fault in ATTENTION_FAULTS[::2]),
    *(pytest.param(check_ragged_kernel, fault, marks=pytest.mark.slow) for fault in ATTENTION_FAULTS[::2]),
    *(pytest.param(check_decode_kernel, fault, marks=pytest.mark.slow) for fault in ATTENTION_FAULTS[1::2]),
    *((check_append_kernel, fault) for fault in APPEND_FAULTS),
    *(
        pytest.param(
            check_quantized_kernel, fault, id=name, marks=() if "swapped" in name else pytest.mark.slow
        )
        for name, fault in SCALE_FAULTS.items()
    ),
    (check_quantized_append, numbers_of_another_scale),
    (check_ragged_kernel, rows_beyond_the_end_written),
]


@pytest.fixture(autouse=True)
def traced_anew(monkeypatch: Patch) -> None:
    """Calls the functions under their jit, which would answer with what it compiled before the fault."""
    for room in (ragged, decode, append):
        jitted: Any = room.IMPLEMENTATIONS["xla"]
        monkeypatch.setitem(room.IMPLEMENTATIONS, "xla", jitted.__wrapped__)


@pytest.mark.parametrize(
    "check",
    [
        check_ragged_kernel,
        check_decode_kernel,
        check_append_kernel,
        check_quantized_kernel,
        check_quantized_append,
    ],
)
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(("check", "fault"), FAULTS)
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
