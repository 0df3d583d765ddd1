"""Pallas kernels for TPU under the interpreter that looks for races."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public name tells of races
from jax.experimental.pallas import tpu as pltpu

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
