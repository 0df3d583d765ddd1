"""Matrices of weights in 8 or 4 bits, and the scales that make numbers of them.

Three forms, all symmetric, a weight being a stored number times a scale:

- "a8bit": int8, with a float32 scale per output channel (row) that brings the row's largest weight to 127.
- "nf4": 4-bit NormalFloat (arXiv 2305.14314): for each block of 64 weights along the input dimension a
  float32 scale, the largest magnitude, and for each weight the nearest of 16 levels. Scales stay float32.
- "fp8": float8_e4m3fn, with a float32 scale per block of 128 x 128 that brings the block's largest weight to
  448, as the published FP8 checkpoints have it.

Which matrices of a model they are made of is in `quantized_specs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..kernels.quantization import FLOAT8, INT8, LARGEST, SMALLEST_SCALE
from ..kernels.quantization import quantize as quantize_rows

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a leaf may also be a TensorSpec, a sharding or a ShapeDtypeStruct
    Leaf = Any

Method = Literal["a8bit", "nf4", "fp8"]
METHODS: tuple[Method, ...] = get_args(Method)
NF4_BLOCK = 64
FP8_BLOCK = 128
DATA_DTYPE: dict[Method, np.dtype[Any]] = {"a8bit": INT8, "nf4": np.dtype(np.uint8), "fp8": FLOAT8}
FLOAT32 = np.dtype(np.float32)

# arXiv 2305.14314, appendix E: quantiles of the normal distribution, eight above zero and seven below it,
# divided by the largest.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [..., out, in] in fewer bits, in the place of its array in a `Params`.

    Attributes:
        data: a8bit: int8 [..., out, in]. fp8: float8_e4m3fn [..., out, in]. nf4: uint8 [..., in / 2, out];
            the low halves of a block's 32 bytes are its first 32 codes, the high halves the others. So the
            scales of nf4 are spread, and codes taken apart, over rows, which no processor is slow at.
        scales: float32. a8bit: [..., out]. fp8: [..., ceil(out / 128), ceil(in / 128)]. nf4:
            [..., in / 64, out].
        method: which of them (static under jit).

    A layer's experts are stacked, their parts transposed: see `quantize_stack`.
    """

    data: Leaf
    scales: Leaf
    method: Method = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that this stands for."""
        if self.method != "nf4":
            return self.data.shape
        *rest, half, rows = self.data.shape
        return (*rest, rows, 2 * half)

    @property
    def ndim(self) -> int:
        return len(self.data.shape)


def parse_method(name: Any, argument: str) -> Method:
    """A quantization method by its name.

    Raises:
        ValueError: no such method; the message calls the argument `argument`.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"{argument}={name!r}: must be None or one of {list(METHODS)}")
    return name


def check_shape(shape: tuple[int, ...], method: Method, name: str) -> None:
    """Checks that a matrix can be quantized.

    Raises:
        ValueError: its rows are no whole number of blocks.
    """
    if method == "nf4" and shape[-1] % NF4_BLOCK:
        raise ValueError(
            f"{name}: rows of {shape[-1]} numbers, nf4 needs a multiple of {NF4_BLOCK}; a8bit takes any"
        )


def part_shapes(shape: tuple[int, ...], method: Method) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the data and of the scales of a matrix [..., out, in]."""
    *rest, rows, columns = shape
    if method == "a8bit":
        return shape, (*rest, rows)
    if method == "nf4":
        return (*rest, columns // 2, rows), (*rest, columns // NF4_BLOCK, rows)
    return shape, (*rest, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))


def quantize(matrix: Float[Array, "*rest out_dim in_dim"], method: Method) -> QuantizedMatrix:
    """A matrix of bfloat16 or float32 in fewer bits.

    A block (a8bit: a row) of zeros has scale 0 and comes back as zeros; one with a NaN or an infinity has
    scale NaN and comes back as NaN, so that a fault shows.

    Raises:
        ValueError: nf4 of rows that are no multiple of 64.
    """
    check_shape(matrix.shape, method, "matrix")
    if method == "a8bit":
        data, scales = quantize_rows(matrix, INT8)
        return QuantizedMatrix(data, scales, method)
    return _quantize_nf4(matrix) if method == "nf4" else _quantize_fp8(matrix)


def _quantize_nf4(matrix: Array) -> QuantizedMatrix:
    *rest, rows, columns = matrix.shape
    transposed = jnp.swapaxes(matrix, -1, -2).astype(jnp.float32)
    blocks = transposed.reshape(*rest, columns // NF4_BLOCK, NF4_BLOCK, rows)
    scales, factors = _largest(blocks, (-2,), 1.0)
    scaled = blocks * factors
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for below, above in pairwise(NF4_LEVELS):  # to the nearest level
        codes = codes + (scaled > jnp.float32((below + above) / 2)).astype(jnp.uint8)
    low, high = codes[..., : NF4_BLOCK // 2, :], codes[..., NF4_BLOCK // 2 :, :]
    return QuantizedMatrix((low | (high << 4)).reshape(*rest, columns // 2, rows), scales[..., 0, :], "nf4")


def _quantize_fp8(matrix: Array) -> QuantizedMatrix:
    *rest, rows, columns = matrix.shape
    padding = [(0, 0)] * len(rest) + [(0, -rows % FP8_BLOCK), (0, -columns % FP8_BLOCK)]
    padded = jnp.pad(matrix.astype(jnp.float32), padding)
    shape = padded.shape
    blocks = padded.reshape(*rest, shape[-2] // FP8_BLOCK, FP8_BLOCK, shape[-1] // FP8_BLOCK, FP8_BLOCK)
    scales, factors = _largest(blocks, (-3, -1), LARGEST[FLOAT8])
    data = jnp.clip(blocks * factors, -LARGEST[FLOAT8], LARGEST[FLOAT8]).reshape(shape)
    return QuantizedMatrix(data[..., :rows, :columns].astype(FLOAT8), scales[..., 0, :, 0], "fp8")


def _largest(blocks: Array, axes: tuple[int, ...], becomes: float) -> tuple[Array, Array]:
    """Scales that bring the blocks' largest magnitude to `becomes`, and what to multiply the blocks with."""
    scales = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True) * np.float32(1 / becomes)
    scales = jnp.where(scales < SMALLEST_SCALE, 0.0, scales)
    finite = jnp.all(jnp.isfinite(blocks), axis=axes, keepdims=True)  # the maximum may pass over a NaN
    usable = finite & (scales > 0)
    factors = jnp.where(usable, 1.0 / jnp.where(usable, scales, 1.0), 0.0)
    return jnp.where(finite, scales, jnp.nan), factors


def quantize_stack(stack: Float[Array, "num in_dim out_dim"], method: Method) -> QuantizedMatrix:
    """Transposed matrices, each as `quantize` makes it but for that: data and scales are transposed, too.

    Returns:
        a8bit: data [num, in, out], scales [num, out]. fp8: data [num, in, out], scales [num, in / 128,
        out / 128] (rounded up). nf4: data [num, out, in / 2], scales [num, out, in / 64].

    Raises:
        ValueError: as `quantize`.
    """
    return untransposed(quantize(jnp.swapaxes(stack, -1, -2), method), num_dims=3)


def untransposed(matrix: QuantizedMatrix, num_dims: int = 2) -> QuantizedMatrix:
    """One matrix [out, in] of what `quantize_stack` gives.

    Args:
        matrix: its transposed parts.
        num_dims: of the parts that are matrices; scales of a8bit, which are none, have one dimension less.
    """
    return jax.tree.map(lambda part: jnp.swapaxes(part, -1, -2) if part.ndim == num_dims else part, matrix)


@cache  # one compilation per shape, not per matrix
def quantizer(
    method: Method, shardings: QuantizedMatrix, *, stacked: bool
) -> Callable[[Array], QuantizedMatrix]:
    """`quantize` or `quantize_stack` on the devices.

    Args:
        method: which.
        shardings: a `QuantizedMatrix` of the shardings of its parts.
        stacked: whether it is a stack of transposed matrices.
    """

    def quantize_matrix(matrix: Array) -> QuantizedMatrix:
        return (quantize_stack if stacked else quantize)(matrix, method)

    return jax.jit(quantize_matrix, out_shardings=shardings)


def fp8_values(matrix: QuantizedMatrix) -> Float[Array, "*rest out_dim in_dim"]:
    """The weights of an fp8 matrix, float32."""
    *rest, rows, columns = matrix.shape
    scales = jnp.repeat(matrix.scales, FP8_BLOCK, axis=-1)[..., :columns]
    if rows % FP8_BLOCK:
        return matrix.data.astype(jnp.float32) * jnp.repeat(scales, FP8_BLOCK, axis=-2)[..., :rows, :]
    # Spread over rows within the product: the TPU's compiler would write scales spread both ways to memory.
    blocks = matrix.data.reshape(*rest, rows // FP8_BLOCK, FP8_BLOCK, columns).astype(jnp.float32)
    return (blocks * scales[..., None, :]).reshape(*rest, rows, columns)


def nf4_halves(
    matrix: QuantizedMatrix,
) -> tuple[Float[Array, "*rest half out_dim"], Float[Array, "*rest half out_dim"]]:
    """The first and the second 32 weights of each block of an nf4 matrix, [..., in / 2, out], float32."""
    *rest, half_columns, rows = matrix.data.shape

    def half(codes: Array) -> Array:
        blocks = nf4_level(codes).reshape(*rest, -1, NF4_BLOCK // 2, rows)
        return (blocks * matrix.scales[..., None, :]).reshape(*rest, half_columns, rows)

    return half(matrix.data & 15), half(matrix.data >> 4)


def nf4_level(codes: Array) -> Array:
    """The levels [...] of codes [...] of 0 to 15, float32; by selects, which no platform is slow at."""
    levels: list[Any] = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        levels = [jnp.where(is_set, levels[i + 1], levels[i]) for i in range(0, len(levels), 2)]
    return levels[0]
