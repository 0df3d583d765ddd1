"""Random weights of any shape, made on the device in the time it takes to write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from .config import Qwen3Config
from .params import Params, TensorSpec, param_specs
from .quantization import Method, QuantizedMatrix, quantize, quantize_stack
from .quantized_specs import Quantization, parts_of
from .sharding import Layout

INITIALIZER_RANGE = 0.02  # standard deviation of the matrices, as Qwen3's config.json says


def random_params(
    config: Qwen3Config,
    *,
    seed: int,
    dtype: np.dtype[Any],
    layout: Layout,
    quantization: Quantization | None = None,
) -> Params:
    """Parameters: matrices uniform with standard deviation INITIALIZER_RANGE, norms one, biases zero.

    What is quantized is so in the program that makes it.
    """
    specs, structure = jax.tree.flatten(param_specs(config))
    leaves: list[Array | QuantizedMatrix] = []
    for index, spec in enumerate(specs):
        keys = np.random.SeedSequence([seed, index]).generate_state(2)
        method, parts = None, spec
        if quantization is not None and quantization.applies_to(spec):
            method, parts = quantization.method, parts_of(spec, quantization.method)
        sharding = jax.tree.map(lambda part: layout.sharding(*part.axes), parts)
        make = _maker(_kind(spec), spec.shape, dtype, sharding, method, stacked=spec.parts is not None)
        leaves.append(make(jnp.asarray(keys, jnp.uint32)))
    return jax.block_until_ready(jax.tree.unflatten(structure, leaves))


def _kind(spec: TensorSpec) -> str:
    if spec.name.endswith("norm.weight"):
        return "ones"
    return "zeros" if spec.name.endswith(".bias") else "uniform"


@cache  # one compilation per shape, not per tensor
def _maker(
    kind: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: Any,
    method: Method | None,
    *,
    stacked: bool,
) -> Callable[[Array], Array | QuantizedMatrix]:
    def make(keys: Array) -> Array | QuantizedMatrix:
        if kind == "uniform":
            matrix = uniform(keys, shape).astype(dtype)
            if method is None:
                return matrix
            return (quantize_stack if stacked else quantize)(matrix, method)
        return jnp.full(shape, 1 if kind == "ones" else 0, dtype)

    return jax.jit(make, out_shardings=sharding)


def uniform(keys: UInt32[Array, 2], shape: tuple[int, ...]) -> Float[Array, ...]:
    """Numbers of mean 0 and standard deviation INITIALIZER_RANGE, float32.

    A hash of each element's index: MurmurHash3's 32-bit finalizer, twice, with a key each time. Weights need
    no more, and XLA fuses it into one pass, where jax's generators take ten times as long on a CPU.
    """
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = _mix(_mix(index ^ keys[0]) ^ keys[1])
    bound = INITIALIZER_RANGE * math.sqrt(3)  # a uniform distribution on [-b, b] deviates by b / sqrt(3)
    return (bits >> 8).astype(jnp.float32) * (2 * bound / 2**24) - bound


def _mix(x: UInt32[Array, ...]) -> UInt32[Array, ...]:
    """MurmurHash3's fmix32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
