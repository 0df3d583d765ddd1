"""Pallas kernels for TPU under the interpreter that looks for races."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public name tells of races
from jax.experimental.pallas import tpu as pltpu

from vsurge.kernels import append, decode, ragged
from vsurge.kernels.append.mosaic_tpu import append_kv
from vsurge.kernels.decode import mosaic_tpu as decode_tpu
from vsurge.kernels.ragged import mosaic_tpu as ragged_tpu
from vsurge.kernels.tpu import launch

DmaMode = Literal["eager", "on_wait"]  # copies happen when they are started, or when they are waited for
DMA_MODES = get_args(DmaMode)


def races_in(run: Callable[[], Any], mode: DmaMode, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a kernel, which must not have been compiled before, with race detection; whether it has races.

    Scratch memory holds NaN at first, or the largest integer.
    """
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode)
    monkeypatch.setattr(launch, "INTERPRETER", parameters)
    pltpu.reset_tpu_interpret_mode_state()
    jax.block_until_ready(run())
    races = interpret_pallas_call.races
    assert races is not None, "nothing was interpreted"
    found = races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    return found


@pytest.fixture(autouse=True)
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls the functions under their jit, which would answer with what it compiled before."""
    under: Any = decode_tpu.paged_decode_attention
    monkeypatch.setitem(decode.IMPLEMENTATIONS, "mosaic_tpu", under.__wrapped__)
    monkeypatch.setattr(ragged_tpu, "paged_decode_attention", under.__wrapped__)
    for room, kernel in ((ragged, ragged_tpu.ragged_paged_attention), (append, append_kv)):
        jitted: Any = kernel
        monkeypatch.setitem(room.IMPLEMENTATIONS, "mosaic_tpu", jitted.__wrapped__)
    yield
    pltpu.reset_tpu_interpret_mode_state()  # what a run that failed has left
