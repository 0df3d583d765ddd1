# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (jax's signatures are only partly typed)
"""Timing a kernel call on the TPU or GPU that is here. It has not run on one yet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..quantization import FLOAT8
from .calls import Batch, Call


def time_call(call: Call, batch: Batch, *, repeats: int = 9, calls: tuple[int, int] = (2, 12)) -> float:
    """Microseconds that a call takes on jax's default device: the median of several runs.

    A run is two programs that make different numbers of calls, each on the output of the one before; the
    difference is theirs alone, without what starting a program costs. Each run has its own page table, so
    that it reads other memory, and its own queries.

    Args:
        call: "decode" or "ragged".
        batch: lengths.
        repeats: runs that count, after one that does not.
        calls: of the two programs.
    """
    chained: Any = jax.jit(_chained, static_argnums=(0, 1))
    function = call.function()
    shapes, structure = jax.tree.flatten(call.arguments())
    metadata = call.metadata(batch)
    key = jax.random.key(0)
    kept = [
        random_array(key, shape.shape, shape.dtype) if given is None else None
        for given, shape in zip(metadata, shapes, strict=True)
    ]

    def seconds(count: int, arguments: Any) -> float:
        start = time.perf_counter()
        jax.block_until_ready(chained(function, count, *arguments))
        return time.perf_counter() - start

    samples = list[float]()
    for run in range(repeats + 1):
        rng = np.random.default_rng(run)
        filled: list[Any] = [
            array if given is None else jnp.asarray(_shuffled(given, rng))
            for given, array in zip(metadata, kept, strict=True)
        ]
        filled[0] = random_array(jax.random.fold_in(key, run), shapes[0].shape, shapes[0].dtype)
        arguments: Any = jax.tree.unflatten(structure, filled)
        jax.block_until_ready(arguments)
        few, many = (seconds(count, arguments) for count in calls)
        samples.append((many - few) / (calls[1] - calls[0]))
    return statistics.median(samples[1:]) * 1e6


def _chained(function: Callable[..., Any], count: int, queries: Any, *others: Any) -> Any:
    def step(_: Any, rows: Any) -> Any:
        return function(rows, *others)

    return lax.fori_loop(0, count, step, queries)


def _shuffled(given: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A page table with its pages in another order; anything else as it is."""
    return rng.permutation(given.reshape(-1)).reshape(given.shape) if given.ndim == 2 else given


@partial(jax.jit, static_argnames=("shape", "dtype"))
def random_array(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Random numbers, none of them NaN, made in `dtype` itself: a cache has no room beside it for wider ones.

    Numbers of 8 bits are random bits, others are normal.
    """
    dtype = np.dtype(dtype)
    if dtype.itemsize > 1:
        return jax.random.normal(key, shape, dtype)
    bits = jax.random.bits(key, shape, jnp.uint8)
    if dtype == FLOAT8:
        bits &= jnp.uint8(0xF7)  # NaN has all bits set but the sign's
    return lax.bitcast_convert_type(bits, dtype)
