"""x @ weight.T, for weights in any form that a checkpoint or `quantize` gives them.

Quantized weights are made numbers of within the product. On a TPU that is part of the matrix multiplication's
own loop over `a8bit` weights, and over `fp8` weights where there are few rows: memory is read in 8 bits per
weight. Other forms are written to memory first, or their scales are; docs/quantization.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from ..kernels.quantization import INT8
from ..kernels.quantization import quantize as quantize_rows
from .config import BFLOAT16, FLOAT32, Qwen3Config
from .quantization import FP8_BLOCK, NF4_BLOCK, QuantizedMatrix, fp8_values, nf4_halves

FEW_ROWS = 256  # up to here a product takes as long as reading its weights does, on a TPU


def linear(
    config: Qwen3Config,
    x: Float[Array, "rows in_dim"],
    weight: Float[Array, "out_dim in_dim"] | QuantizedMatrix,
    bias: Float[Array, " out_dim"] | None = None,
    *,
    over_devices: bool = False,
) -> Float[Array, "rows out_dim"]:
    """x @ weight.T + bias, operands in `config.dtype`, float32 result.

    A single row is computed as two: with one row, XLA's CPU backend takes a path for bfloat16 that is ten
    times slower. Asking for a float32 result keeps it off another such path.

    With a8bit weights the operands may also be int8, see `Qwen3Config.int8_activations`.

    With `over_devices`, in_dim is split over devices: each one's part of the sum is rounded to
    `Qwen3Config.all_reduce_dtype` before it is sent. Not so with int8 operands, whose sums are int32, and
    with nf4 weights, where a part is the sum of two products.
    """
    rows = x.shape[0]
    if rows == 1:
        x = jnp.concatenate([x, x])
    if over_devices:
        product = in_all_reduce_dtype(config, partial(_any_product, config), x, weight)[:rows]
    else:
        product = _any_product(config, x, weight, FLOAT32)[:rows]
    return product if bias is None else product + broadcast(bias.astype(jnp.float32), 2)


def in_all_reduce_dtype(config: Qwen3Config, function: Callable[..., Array], *operands: Any) -> Array:
    """`function(*operands, dtype)` with `Qwen3Config.all_reduce_dtype`, or what None stands for here."""
    if config.all_reduce_dtype is not None:
        return function(*operands, config.all_reduce_dtype)
    if config.dtype == FLOAT32:
        return function(*operands, FLOAT32)
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *given: function(*given, FLOAT32),
        default=lambda *given: function(*given, BFLOAT16),
    )


def _any_product(
    config: Qwen3Config,
    x: Float[Array, "rows in_dim"],
    weight: Float[Array, "out_dim in_dim"] | QuantizedMatrix,
    dtype: np.dtype[Any],
) -> Float[Array, "rows out_dim"]:
    if isinstance(weight, QuantizedMatrix):
        return _quantized(config, x, weight, dtype)
    return _product(config, x, weight, dtype=dtype)


def _product(
    config: Qwen3Config,
    x: Float[Array, "rows in_dim"],
    weight: Num[Array, "dim_0 dim_1"],
    dim: int = 1,
    dtype: np.dtype[Any] = FLOAT32,
) -> Float[Array, "rows out_dim"]:
    """The sum of products over a dimension of the weights, rounded to a dtype, in float32."""
    return jax.lax.dot_general(
        x.astype(config.dtype),
        weight.astype(config.dtype),
        (((1,), (dim,)), ((), ())),
        precision=precision(config),
        preferred_element_type=dtype,
    ).astype(jnp.float32)


def _quantized(
    config: Qwen3Config, x: Float[Array, "rows in_dim"], weight: QuantizedMatrix, dtype: np.dtype[Any]
) -> Float[Array, "rows out_dim"]:
    if weight.method == "a8bit":
        return _a8bit(config, x, weight, dtype)
    if weight.method == "fp8":
        whole = partial(_fp8_whole, config, dtype)
        if weight.shape[0] % FP8_BLOCK or x.shape[0] > FEW_ROWS:
            return whole(x, weight)
        scaled_rows = partial(_fp8_scaled_rows, config, dtype)
        return jax.lax.platform_dependent(x, weight, tpu=scaled_rows, default=whole)
    rows, columns = x.shape
    halves = x.reshape(rows, columns // NF4_BLOCK, 2, NF4_BLOCK // 2)
    first, second = (halves[:, :, half].reshape(rows, columns // 2) for half in range(2))
    weights = nf4_halves(weight)
    return _product(config, first, weights[0], dim=0) + _product(config, second, weights[1], dim=0)


def _fp8_whole(
    config: Qwen3Config, dtype: np.dtype[Any], x: Float[Array, "rows in_dim"], weight: QuantizedMatrix
) -> Float[Array, "rows out_dim"]:
    return _product(config, x, fp8_values(weight), dtype=dtype)


def _fp8_scaled_rows(
    config: Qwen3Config, dtype: np.dtype[Any], x: Float[Array, "rows in_dim"], weight: QuantizedMatrix
) -> Float[Array, "rows out_dim"]:
    """The scales of 128 rows of the weights go to x instead, once for each 128 of them.

    Given the weights times their scales, the TPU's compiler writes the scales, as many as there are weights
    and in float32, to memory first. Here it reads the weights in 8 bits and nothing else of that size.
    """
    rows, columns = x.shape
    blocks = weight.data.reshape(-1, FP8_BLOCK, columns)
    scales = jnp.repeat(weight.scales, FP8_BLOCK, axis=-1)[:, None, :columns]
    product = jax.lax.dot_general(
        (x.astype(jnp.float32)[None] * scales).astype(config.dtype),
        blocks.astype(config.dtype),
        (((2,), (2,)), ((0,), (0,))),
        precision=precision(config),
        preferred_element_type=dtype,
    ).astype(jnp.float32)
    return jnp.swapaxes(product, 0, 1).reshape(rows, weight.shape[0])


def _a8bit(
    config: Qwen3Config, x: Float[Array, "rows in_dim"], weight: QuantizedMatrix, dtype: np.dtype[Any]
) -> Float[Array, "rows out_dim"]:
    """The scale is the same for all of a row of the weights, so that it can wait for the product."""
    mixed = partial(_mixed_product, config, dtype)
    if config.int8_activations is None and config.dtype == BFLOAT16:
        return jax.lax.platform_dependent(x, weight, cpu=_int8_product, default=mixed)
    return _int8_product(x, weight) if config.int8_activations else mixed(x, weight)


def _mixed_product(
    config: Qwen3Config, dtype: np.dtype[Any], x: Float[Array, "rows in_dim"], weight: QuantizedMatrix
) -> Float[Array, "rows out_dim"]:
    """Every int8 is a bfloat16, too."""
    return _product(config, x, weight.data, dtype=dtype) * broadcast(weight.scales, 2)


def _int8_product(x: Float[Array, "rows in_dim"], weight: QuantizedMatrix) -> Float[Array, "rows out_dim"]:
    """Each row of x in int8 with a scale of its own; exact but for that."""
    numbers, scales = quantize_rows(x, INT8)
    product = jax.lax.dot_general(
        numbers, weight.data, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    return product.astype(jnp.float32) * scales[:, None] * broadcast(weight.scales, 2)


def precision(config: Qwen3Config) -> jax.lax.Precision:
    """A float32 product at DEFAULT is one bfloat16 pass on a TPU; whoever wants that asks for it."""
    if config.matmul_precision is not None:
        return config.matmul_precision
    return jax.lax.Precision.HIGHEST if config.dtype == np.float32 else jax.lax.Precision.DEFAULT


def broadcast(vector: Float[Array, " dim"], ndim: int) -> Array:
    """The vector as the last dimension of `ndim`."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
