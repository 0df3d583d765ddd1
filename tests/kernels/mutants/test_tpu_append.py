"""Faults in the cache write for TPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import append_kv, empty_kv_pages, read_kv
from vsurge.kernels.append import mosaic_tpu as append_tpu

from .faults import Patch, changed, named

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")


def check_quantized() -> None:
    keys, values = jnp.arange(1.0, 129.0).reshape(2, 4, 2, 8)
    slots = jnp.asarray([3, 17, -1, 9], jnp.int32)
    got, want = (
        append_kv(empty_kv_pages(2, 16, 2, 8, "int8"), keys, values, slots, implementation=implementation)
        for implementation in ("mosaic_tpu", "reference")
    )
    np.testing.assert_array_equal(got.data, want.data)
    np.testing.assert_array_equal(got.scales, want.scales)


def check() -> None:
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


def written(change: Callable[..., tuple[Any, ...]]) -> Callable[[Patch], None]:
    """Other arguments of the cache write."""
    return lambda patch: changed(patch, append_tpu, "_write", lambda f, *arguments: f(*change(*arguments)))


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


@pytest.mark.parametrize("check", [check, check_quantized])
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        *named("append", check, APPEND),
        *named("quantized append", check_quantized, QUANTIZED_APPEND, {"scales of the neighbour"}),
    ],
)
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
