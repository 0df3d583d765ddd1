# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Matrix products alone, out of vector memory: no kernel that needs them does better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .chips import find_chip
from .schedule import Schedule


def matrix_product(left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """One product, float32."""

    def kernel(left: Any, right: Any, out: Any) -> None:
        out[...] = _dot(left[...], right[...], (1, 0))

    return _in_vmem(kernel, (left.shape[0], right.shape[1]), left, right)


def row_products(
    queries: Float[Array, "num_heads rows head_dim"],
    keys: Float[Array, "num_heads tokens head_dim"],
    values: Float[Array, "num_heads tokens head_dim"],
) -> Float[Array, "num_heads rows head_dim"]:
    """The two products of attention, with queries as rows: scores, and scores times values.

    Heads are independent, so that one head's products can fill the waits of another's.
    """

    def scores(queries: Any, keys: Any) -> Any:
        return _dot(queries, keys, (1, 1))

    def weighted(scores: Any, values: Any) -> Any:
        return _dot(scores, values, (1, 0))

    return _attention(scores, weighted, queries.shape, queries, keys, values)


def column_products(
    queries: Float[Array, "num_heads columns head_dim"],
    keys: Float[Array, "num_heads tokens head_dim"],
    values: Float[Array, "num_heads tokens head_dim"],
) -> Float[Array, "num_heads head_dim columns"]:
    """As `row_products`, with queries as columns."""

    def scores(queries: Any, keys: Any) -> Any:
        return _dot(keys, queries, (1, 1))

    def weighted(scores: Any, values: Any) -> Any:
        return _dot(values, scores, (0, 0))

    num_heads, columns, head_dim = queries.shape
    return _attention(scores, weighted, (num_heads, head_dim, columns), queries, keys, values)


def _attention(
    scores: Callable[..., Any], weighted: Callable[..., Any], shape: tuple[int, ...], *operands: Array
) -> Array:
    def kernel(queries: Any, keys: Any, values: Any, out: Any) -> None:
        coming = scores(queries[0], keys[0])
        for head in range(shape[0]):
            now = coming.astype(values.dtype)
            if head + 1 < shape[0]:
                coming = scores(queries[head + 1], keys[head + 1])
            out[head] = weighted(now, values[head])

    return _in_vmem(kernel, shape, *operands)


def product_cycles(schedule: Schedule, flops: int) -> float:
    """Cycles that a schedule of products takes: never fewer than the matrix units need at their peak.

    Args:
        schedule: of one of the functions here.
        flops: of its bfloat16 products.
    """
    chip = find_chip(schedule.chip)
    return max(float(len(schedule.bundles)), flops / (chip.tflops * 1e3 / chip.clock_ghz))


def _dot(left: Any, right: Any, contracted: tuple[int, int]) -> Any:
    dimensions = ((contracted[:1], contracted[1:]), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _in_vmem(kernel: Callable[..., None], shape: tuple[int, ...], *operands: Array) -> Array:
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(
        kernel,
        in_specs=[vmem] * len(operands),
        out_specs=vmem,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes),
        name="bare_products",
    )(*operands)
