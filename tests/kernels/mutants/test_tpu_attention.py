"""Faults put into the attention kernels for TPU: the comparison with the oracle notices each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

from vsurge.kernels import DecodeBlocks, RaggedBlocks

from ..batches import Setup, decode_batch, ragged_batch
from ..cases import check_decode, check_ragged, sinks_of
from .attention_faults import BOTH, DECODE, DECODE_IN_WHOLE_STEPS, RAGGED, RAGGED_WIDE
from .faults import Patch, named

pytestmark = pytest.mark.usefixtures("traced_anew", "small_units")

SETUP = Setup(page_size=32)
OPTIONS: dict[str, Any] = {"sliding_window": 150, "soft_cap": 5.0, "sinks": sinks_of(SETUP)}

SAMPLE_OF_DECODE = {
    *("neighbouring page", "one token too many", "window one wider", "scale one percent off"),
    *("sequences run together", "products in bfloat16"),
}


def check_decode_kernel() -> None:
    batch = decode_batch(SETUP, (300, 3, 0, 128, 200))
    check_decode(batch, "mosaic_tpu", block_sizes=DecodeBlocks(128, 1, 2), **OPTIONS)


def check_ragged_kernel() -> None:
    batch = ragged_batch(SETUP, (3, 40, 1, 0), (3, 290, 70, 0))
    check_ragged(batch, "mosaic_tpu", block_sizes=RaggedBlocks(16, 128, 2), **OPTIONS)


def check_whole_steps() -> None:
    """Long sequences, without a window: units of 256 tokens that are whole, nearly, or less than half."""
    batch = decode_batch(SETUP, (900, 3, 0, 256, 640, 200))
    check_decode(batch, "mosaic_tpu", block_sizes=DecodeBlocks(256, 1, 2))


def check_wide_blocks() -> None:
    batch = ragged_batch(SETUP, (40, 3), (290, 512))
    check_ragged(batch, "mosaic_tpu", block_sizes=RaggedBlocks(16, 256, 2))


@pytest.mark.parametrize(
    "check",
    [
        check_decode_kernel,
        check_ragged_kernel,
        check_whole_steps,
        pytest.param(check_wide_blocks, marks=pytest.mark.slow),
    ],
)
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("check", "fault"),
    [
        *named("decode", check_decode_kernel, BOTH | DECODE, SAMPLE_OF_DECODE),
        *named(
            "decode",
            check_whole_steps,
            DECODE_IN_WHOLE_STEPS,
            {"last partial unit dropped", "masked steps dropped"},
        ),
        *named("ragged", check_ragged_kernel, BOTH | RAGGED, {"mask skipped"}),
        *named("ragged", check_wide_blocks, RAGGED_WIDE, set()),
    ],
)
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)) as raised:
        check()
    assert isinstance(raised.value, AssertionError) or "Out-of-bounds read" in str(raised.value)
