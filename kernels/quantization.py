# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Keys and values in 8 bits: a row of a head's numbers and one float32 scale, row = stored * scale.

The scale brings the row's largest number to the largest one of the dtype, 127 for int8 and 448 for
float8_e4m3fn. Int8 keeps each number within 1/254 of the row's largest, float8 within 1/16 of itself: on
normally distributed rows int8 is the more exact by far. Both are exact in bfloat16, so that products with
bfloat16 queries lose nothing. Scales are applied to scores and to probabilities and not to keys and values,
but for the values of prompts on a TPU, where hundreds of queries share a value (`ragged/columns.py`).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

INT8, FLOAT8 = np.dtype(np.int8), np.dtype(jnp.float8_e4m3fn)
LARGEST: dict[np.dtype[Any], float] = {INT8: 127.0, FLOAT8: 448.0}  # what a row's largest number becomes
SMALLEST_SCALE = 2.0**-126  # below it is what processors flush to zero
SCALE_BYTES = 4


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a cache of this dtype has scales."""
    return np.dtype(dtype) in LARGEST


def quantize(
    rows: Float[Array, "*rows head_dim"], dtype: DTypeLike
) -> tuple[Num[Array, "*rows head_dim"], Float[Array, " *rows"]]:
    """Rows in 8 bits, symmetrically.

    Args:
        rows: [..., head_dim], bfloat16 or float32.
        dtype: int8 (rounded to nearest, ties to even) or float8_e4m3fn.

    Returns:
        The numbers [..., head_dim] of `dtype` and the scales [...] in float32. A row of zeros, or of numbers
        too small for a scale, has scale 0 and comes back as zeros. A row with a NaN or an infinity has scale
        NaN and comes back as NaN: so a fault shows, as it does in a cache that is not quantized.
    """
    dtype = np.dtype(dtype)
    rows = rows.astype(jnp.float32)
    # By factors, as XLA would make them of divisions: so every implementation rounds alike.
    scales = jnp.max(jnp.abs(rows), axis=-1) * np.float32(1 / LARGEST[dtype])
    scales = jnp.where(scales < SMALLEST_SCALE, 0.0, scales)
    finite = jnp.all(jnp.isfinite(rows), axis=-1)  # the maximum may pass over a NaN
    usable = finite & (scales > 0)
    factors = jnp.where(usable, 1.0 / jnp.where(usable, scales, 1.0), 0.0)
    scaled = jnp.where(usable[..., None], rows * factors[..., None], 0.0)
    scales = jnp.where(finite, scales, jnp.nan)
    if dtype == INT8:
        scaled = jnp.round(scaled)
    return jnp.clip(scaled, -LARGEST[dtype], LARGEST[dtype]).astype(dtype), scales
