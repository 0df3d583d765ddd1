"""Many matrices of a checkpoint on their way into one parameter, each transposed and put behind the last one.

The host holds no more of them than `Copying` lets it: each is read by itself, and of it only what a device of
this process keeps. The parameter grows on the devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .safetensors_file import StoredTensor
from .sharding import device_parts

UINTS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def stacked_on_devices(
    tensors: Sequence[StoredTensor],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: jax.sharding.Sharding,
    make_room: Callable[[int], None],
    add: Callable[[jax.Array, int], None],
) -> jax.Array:
    """Begins to copy some matrices to their devices, as one array. If that fails, nothing is left there.

    Args:
        tensors: the matrices, [out, in], or vectors.
        shape: [len(tensors), in, out], or of vectors [len(tensors), size].
        dtype: of the result; what is stored in another is converted.
        sharding: where it goes.
        make_room: called with the bytes of a piece before the host holds it.
        add: called with an array that is ready when the host need not hold the piece any longer, and its
            bytes.
    """
    parts = device_parts(sharding, shape)
    pieces: dict[Any, jax.Array] = {}
    on_device: jax.Array | None = None
    written: jax.Array | None = None
    try:
        for part, devices in parts.items():
            size = [stop - start for start, stop in part]
            pieces |= {each: jnp.zeros(size, _bits(each, dtype), device=each) for each in devices}
        for number, tensor in enumerate(tensors):
            make_room(math.prod(tensor.shape) * dtype.itemsize)
            for ((first, end), *of_matrix), devices in parts.items():
                if not first <= number < end:
                    continue
                values = np.ascontiguousarray(tensor.read(tuple(of_matrix[::-1]), dtype))
                for device in devices:
                    on_device = jax.device_put(values.view(pieces[device].dtype), device)
                    stack, done = _put(pieces[device], on_device, np.int32(number - first))
                    pieces[device], written = stack, done
                    add(done, values.nbytes)
        for device, piece in pieces.items():
            pieces[device] = _with_dtype(piece, dtype)
        return jax.make_array_from_single_device_arrays(shape, sharding, list(pieces.values()))
    except BaseException:  # an interrupt too; the traceback would keep the arrays alive
        for array in (*pieces.values(), on_device, written):
            if array is not None:
                array.delete()
        raise


def _bits(device: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """On a CPU, XLA converts all of a bfloat16 array to float32 and back to write a part of it."""
    return UINTS[dtype.itemsize] if device.platform == "cpu" else dtype


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, matrix: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stack with a matrix's transpose in it, and something that is there when it is."""
    starts = (number, *[jnp.zeros_like(number)] * matrix.ndim)
    return lax.dynamic_update_slice(stack, matrix.T[None], starts), matrix[(0,) * matrix.ndim]


@partial(jax.jit, static_argnames="dtype")
def _with_dtype(stack: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    return stack if stack.dtype == dtype else lax.bitcast_convert_type(stack, dtype)
