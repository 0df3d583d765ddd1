"""Kernels traced anew for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from vsurge.kernels import append, decode, ragged
from vsurge.kernels.append.mosaic_tpu import append_kv
from vsurge.kernels.decode import mosaic_tpu as decode_tpu
from vsurge.kernels.ragged import mosaic_tpu as ragged_tpu

MAPPINGS = Path("/proc/self/maps")  # a line each


@pytest.fixture(autouse=True)
def interpreted_programs_are_let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """An interpreted Triton kernel takes a thousand mappings of memory, and a process has 65,530 on Linux."""
    yield
    if "triton" in request.node.nodeid and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 32_000:
        jax.clear_caches()


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls the functions under their jit, which would answer with what it compiled before."""
    under: Any = decode_tpu.paged_decode_attention
    monkeypatch.setitem(decode.IMPLEMENTATIONS, "mosaic_tpu", under.__wrapped__)
    fused: Any = decode_tpu.append_and_attend
    monkeypatch.setitem(decode.FUSED, "mosaic_tpu", fused.__wrapped__)
    monkeypatch.setattr(ragged_tpu, "paged_decode_attention", under.__wrapped__)
    for room, kernel in ((ragged, ragged_tpu.ragged_paged_attention), (append, append_kv)):
        jitted: Any = kernel
        monkeypatch.setitem(room.IMPLEMENTATIONS, "mosaic_tpu", jitted.__wrapped__)
    yield
    pltpu.reset_tpu_interpret_mode_state()  # what a run that failed has left
