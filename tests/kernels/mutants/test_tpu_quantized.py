"""Faults in what the attention kernels for TPU do with the scales of a quantized cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from vsurge.kernels import DecodeBlocks, RaggedBlocks
from vsurge.kernels.decode import step
from vsurge.kernels.ragged import columns
from vsurge.kernels.tpu.fetcher import Fetcher

from ..batches import Setup, decode_batch, ragged_batch
from ..cases import check_decode, check_ragged
from .faults import Patch, changed, named

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")

QUANTIZED = Setup(page_size=32, query_dtype="bfloat16", cache_dtype="int8")


def check_decode_kernel() -> None:
    batch = decode_batch(QUANTIZED, (300, 3, 0, 128, 200))
    check_decode(batch, "mosaic_tpu", block_sizes=DecodeBlocks(128, 1, 2))


def check_ragged_kernel() -> None:
    batch = ragged_batch(QUANTIZED, (3, 40, 0), (3, 290, 0))
    check_ragged(batch, "mosaic_tpu", block_sizes=RaggedBlocks(16, 128, 2))


def other_scales(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """`change` gives the scales of keys or values from the right function and its last arguments."""

    def scales_of(f: Any, self: Fetcher, slot: Any, lane: int, kind: int, *which: Any) -> Any:
        return change(lambda kind: f(self, slot, lane, kind, *which), kind)

    return lambda patch: changed(patch, Fetcher, "scales_of", scales_of)


def scaled_weights_summed(patch: Patch) -> None:
    def decode(f: Any, attention: Any, weights: Any, scales: Any, values: Any) -> Any:
        return f(attention, weights * scales, jnp.ones_like(scales), values)

    changed(patch, step, "_sums", decode)


def unwritten_scales_not_zeroed(patch: Patch) -> None:
    changed(patch, step, "_held", lambda f, *arguments: jnp.ones_like(f(*arguments)))
    patch.setattr(columns, "zero_behind", lambda rows, _: rows)


FAULTS = {
    "scale of another token": other_scales(lambda right, kind: jnp.roll(right(kind), 1, axis=1)),
    "scale of another head": other_scales(lambda right, kind: jnp.roll(right(kind), 1, axis=0)),
    "key scales ignored": other_scales(lambda right, kind: right(kind) if kind else right(kind) * 0.0 + 0.02),
    "value scales ignored": other_scales(
        lambda right, kind: right(kind) * 0.0 + 0.02 if kind else right(kind)
    ),
    "key and value scales swapped": other_scales(lambda right, kind: right(1 - kind)),
    "unwritten scales not zeroed": unwritten_scales_not_zeroed,
}
DECODE_FAULTS = {**FAULTS, "scaled weights summed": scaled_weights_summed}
SAMPLE = {"scaled weights summed", "key scales ignored"}


@pytest.mark.parametrize(
    "check", [check_decode_kernel, pytest.param(check_ragged_kernel, marks=pytest.mark.slow)]
)
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        *named(
            "quantized decode",
            check_decode_kernel,
            DECODE_FAULTS,
            {"scaled weights summed", "key scales ignored"},
        ),
        *named("quantized ragged", check_ragged_kernel, FAULTS, set()),
    ],
)
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
