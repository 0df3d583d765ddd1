"""Rotary position embedding (arXiv 2104.09864), and YaRN for longer contexts (arXiv 2309.00071)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from .config import Qwen3Config, Yarn


def rotary_frequencies(config: Qwen3Config) -> tuple[npt.NDArray[np.float32], float]:
    """Angle per position of each of the head_dim / 2 rotated pairs, and the factor on cosine and sine."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / config.rope_theta**exponents).astype(np.float32)
    if config.yarn is None:
        return frequencies, 1.0
    return _stretch(frequencies, config.yarn, config.head_dim, config.rope_theta)


def _stretch(
    frequencies: npt.NDArray[np.float32], yarn: Yarn, head_dim: int, theta: float
) -> tuple[npt.NDArray[np.float32], float]:
    """YaRN: fast pairs keep their frequency, slow ones are divided by the factor, with a ramp between."""

    def pair_with_rotations(rotations: float) -> float:
        """The (fractional) pair that turns this often over the trained context."""
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_with_rotations(yarn.beta_fast), pair_with_rotations(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    stretched = frequencies * (1 - ramp) + frequencies / yarn.factor * ramp
    attention_factor = yarn.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return stretched.astype(np.float32), attention_factor


def rotary_tables(
    config: Qwen3Config, positions: Int[Array, " num_tokens"]
) -> tuple[Float[Array, "num_tokens 1 half_dim"], Float[Array, "num_tokens 1 half_dim"]]:
    """Cosine and sine for each position, in float32, with an axis for the heads."""
    frequencies, factor = rotary_frequencies(config)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "num_tokens heads head_dim"],
    tables: tuple[Float[Array, "num_tokens 1 half_dim"], Float[Array, "num_tokens 1 half_dim"]],
) -> Float[Array, "num_tokens heads head_dim"]:
    """Rotates each pair (x[i], x[i + head_dim / 2]) by its position's angle."""
    cosine, sine = tables
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
