# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Pallas kernels for TPU on whatever device there is: compiled for a TPU, interpreted on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..kv_pages import KVPages
from .shapes import SUBLANES

INTERPRETER = pltpu.InterpretParams()
INTERPRETED_VMEM = 32 * 2**20  # bytes that the interpreter's vector memory is taken to have


def tpu_call(kernel: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call` for the device that is traced for.

    That is the mesh's of `jax.set_mesh`, so that a machine without a TPU can compile for one, else JAX's
    default device.
    """
    return pl.pallas_call(kernel, **options, interpret=False if pltpu.is_tpu_device() else INTERPRETER)


def vmem_bytes() -> int:
    """Bytes of vector memory of the device that is traced for."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else INTERPRETED_VMEM


def check_pages(kv_pages: KVPages) -> None:
    """Checks that pages are whole tiles, which copies move.

    Raises:
        ValueError: they are not.
    """
    if kv_pages.page_size % SUBLANES:
        raise ValueError(
            f"kv_pages: page_size={kv_pages.page_size}, must be a multiple of {SUBLANES} on a TPU"
        )


Tree = TypeVar("Tree")


def in_hbm(inputs: Tree) -> Tree:
    """The specifications of arrays that a kernel copies from, in the form of `inputs`."""

    def anywhere(_: Any) -> pl.BlockSpec:
        return pl.BlockSpec(memory_space=pl.ANY)

    return cast(Tree, jax.tree.map(anywhere, inputs))
