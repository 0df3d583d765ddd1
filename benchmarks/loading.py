"""How fast a checkpoint is loaded, beside copying the same bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ..model import Qwen3Config, load_model
from ..model.config import BFLOAT16
from ..model.config_json import config_to_json
from ..model.params import param_specs

WEIGHTS = "model.safetensors"


def write_checkpoint(config: Qwen3Config, folder: Path) -> None:
    """A checkpoint of a shape, all zeros in bfloat16, in the Hugging Face layout."""
    specs = jax.tree.leaves(param_specs(config))
    save_file({spec.name: np.zeros(spec.shape, ml_dtypes.bfloat16) for spec in specs}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config_to_json(config, BFLOAT16)))


def copy_weights(config: Qwen3Config, folder: Path, *, one_by_one: bool) -> list[jax.Array]:
    """The bytes of that checkpoint as they lie in the file, one device array per tensor, and nothing else.

    Args:
        config: the shape.
        folder: from `write_checkpoint`.
        one_by_one: wait for each, so that the host never holds more than one of them besides, as a loader
            must not; otherwise all are under way at once, which needs them all in the host's memory.
    """
    sizes = [2 * spec.size for spec in jax.tree.leaves(param_specs(config))]
    data = np.memmap(folder / WEIGHTS, np.uint8, "r", offset=(folder / WEIGHTS).stat().st_size - sum(sizes))
    copies: list[jax.Array] = []
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        copies.append(jax.device_put(data[end - size : end], may_alias=False))
        if one_by_one:
            jax.block_until_ready(copies[-1])
    return jax.block_until_ready(copies)


def measure_loading(config: Qwen3Config, folder: Path, *, turns: int) -> list[dict[str, float]]:
    """Seconds of loading and of copying, in turns, from the page cache; two first turns do not count."""
    write_checkpoint(config, folder)
    measured = {
        "load_s": lambda: load_model(folder).params,
        "copy_s": lambda: copy_weights(config, folder, one_by_one=True),
        "copy_all_at_once_s": lambda: copy_weights(config, folder, one_by_one=False),
    }
    samples = [{name: _seconds(run) for name, run in measured.items()} for _ in range(2 + turns)]
    return samples[2:]


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin
