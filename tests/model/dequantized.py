"""The oracle of quantization: the matrix that a quantized one stands for, as a whole."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vsurge.model.quantization import NF4_BLOCK, QuantizedMatrix, fp8_values, nf4_halves


def dequantize(matrix: QuantizedMatrix, dtype: DTypeLike) -> Float[Array, "*rest out_dim in_dim"]:
    """The matrix that a quantized one stands for, in bfloat16 or float32."""
    if matrix.method == "a8bit":
        return (matrix.data.astype(jnp.float32) * matrix.scales[..., None]).astype(dtype)
    if matrix.method == "fp8":
        return fp8_values(matrix).astype(dtype)
    *rest, rows, columns = matrix.shape
    halves = [half.reshape(*rest, -1, NF4_BLOCK // 2, rows) for half in nf4_halves(matrix)]
    whole = jnp.concatenate(halves, axis=-2).reshape(*rest, columns, rows)
    return jnp.swapaxes(whole, -1, -2).astype(dtype)
