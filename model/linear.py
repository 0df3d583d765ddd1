"""x @ weight.T, as every layer asks for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .config import Qwen3Config


def linear(
    config: Qwen3Config,
    x: Float[Array, "rows in_dim"],
    weight: Float[Array, "out_dim in_dim"],
    bias: Float[Array, " out_dim"] | None = None,
) -> Float[Array, "rows out_dim"]:
    """x @ weight.T + bias, operands in `config.dtype`, float32 result.

    A single row is computed as two: with one row, XLA's CPU backend takes a path for bfloat16 that is ten
    times slower. Asking for a float32 result keeps it off another such path.
    """
    rows = x.shape[0]
    x = x.astype(config.dtype)
    if rows == 1:
        x = jnp.concatenate([x, x])
    product = jax.lax.dot_general(
        x,
        weight.astype(config.dtype),
        (((1,), (1,)), ((), ())),
        precision=precision(config),
        preferred_element_type=jnp.float32,
    )[:rows]
    return product if bias is None else product + broadcast(bias.astype(jnp.float32), 2)


def precision(config: Qwen3Config) -> jax.lax.Precision:
    """A float32 product at DEFAULT is one bfloat16 pass on a TPU; whoever wants that asks for it."""
    if config.matmul_precision is not None:
        return config.matmul_precision
    return jax.lax.Precision.HIGHEST if config.dtype == np.float32 else jax.lax.Precision.DEFAULT


def broadcast(vector: Float[Array, " dim"], ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
