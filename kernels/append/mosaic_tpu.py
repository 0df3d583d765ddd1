# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The cache write as a Pallas kernel for TPU.

A row of bfloat16 is half of a register's row, and a copy to HBM moves whole tiles: what is written is a
tile, 8 or 16 tokens of all heads. So the tile comes to VMEM, gets its new rows, and goes back. The tokens are
sorted by slot first, so that every tile is handled once, whatever the order of the tokens, and no two copies
that are under way touch the same tile. (Every layer of a model sorts the same slots: XLA does it once.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages, bytes_per_token, encode_bits
from ..tpu.control import for_each
from ..tpu.launch import check_pages, tpu_call
from ..tpu.shapes import padded

BUFFERS = 16  # tiles in VMEM
AHEAD = 8  # of these, tiles whose fetch has been started before they are needed
ROW_BYTES = 4 * 2**20  # of new rows that lie in VMEM at once


def _kernel(
    starts: Any,
    rows_of: Any,
    slots: Any,
    counts: Any,
    rows_hbm: Any,
    _: Any,
    data: Any,
    rows: Any,
    rows_arrived: Any,
    tiles: Any,
    fetched: Any,
    written: Any,
    *,
    page_size: int,
) -> None:
    """Writes all rows.

    Args:
        starts: [num_tokens] int32 in scalar memory, where a tile's tokens begin in the order of slots.
        rows_of, slots: [num_tokens] int32 in scalar memory: in that order, each token's row and slot.
        counts: [2] int32 in scalar memory: the tokens to write, and the tiles that they lie in.
        rows_hbm: [num_tokens, 2, num_kv_heads, head_dim], keys and values, as the cache stores them.
        data: the cache's data in HBM, [num_pages, 2, num_kv_heads, page_size, head_dim].
        rows: as `rows_hbm`, in VMEM.
        tiles: [BUFFERS, 2, num_kv_heads, tile, head_dim] in VMEM.
        rows_arrived, fetched, written: DMA semaphores, the last two [BUFFERS].
    """
    num_tokens, num_tiles = counts[0], counts[1]
    tile = tiles.shape[3]

    def place(i: Any) -> Any:
        """A tile's part of the cache."""
        slot = slots[starts[i]]
        return data.at[slot // page_size, :, :, pl.ds(slot % page_size // tile * tile, tile)]

    def fetch(i: Any) -> Any:
        buffer = lax.rem(i, BUFFERS)
        return pltpu.make_async_copy(place(i), tiles.at[buffer], fetched.at[buffer])

    def write(i: Any) -> Any:
        buffer = lax.rem(i, BUFFERS)
        return pltpu.make_async_copy(tiles.at[buffer], place(i), written.at[buffer])

    all_rows = pltpu.make_async_copy(rows_hbm, rows, rows_arrived)
    all_rows.start()
    for_each(0, jnp.minimum(AHEAD, num_tiles), lambda i: fetch(i).start())
    all_rows.wait()

    def change(i: Any) -> None:
        coming = i + AHEAD

        @pl.when(coming < num_tiles)
        def _() -> None:
            pl.when(coming >= BUFFERS)(lambda: write(coming - BUFFERS).wait())
            fetch(coming).start()

        fetch(i).wait()
        buffer = tiles.at[lax.rem(i, BUFFERS)]
        end = jnp.where(i + 1 < num_tiles, starts[jnp.minimum(i + 1, starts.shape[0] - 1)], num_tokens)

        def insert(j: Any) -> None:
            new = rows[rows_of[j]][:, :, None]
            offset = lax.broadcasted_iota(jnp.int32, buffer.shape, 2)
            buffer[...] = jnp.where(offset == lax.rem(slots[j], tile), new, buffer[...])

        for_each(starts[i], end, insert)
        write(i).start()

    for_each(0, num_tiles, change)
    for_each(jnp.maximum(num_tiles - BUFFERS, 0), num_tiles, lambda i: write(i).wait())


@partial(jax.jit, donate_argnums=0)
def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """As `vsurge.kernels.append_kv`.

    Raises:
        ValueError: the pages hold no whole tiles.
    """
    check_pages(kv_pages)
    rows = encode_bits(kv_pages, jnp.stack([keys, values], axis=1))
    most = ROW_BYTES // bytes_per_token(kv_pages.num_kv_heads, padded(kv_pages.head_dim), kv_pages.dtype)
    for begin in range(0, slots.shape[0], most):
        kv_pages = _write(kv_pages, rows[begin : begin + most], slots[begin : begin + most])
    return kv_pages


def _write(kv_pages: KVPages, rows: Array, slots: Array) -> KVPages:
    """Writes [num_tokens, 2, num_kv_heads, head_dim] as the cache stores them."""
    data = kv_pages.data
    num_tokens, page_size = slots.shape[0], kv_pages.page_size
    tile = math.gcd(page_size, 32 // kv_pages.dtype.itemsize)
    order = jnp.argsort(jnp.where(slots < 0, jnp.int32(2**31 - 1), slots)).astype(jnp.int32)
    ordered = slots[order]
    valid = (ordered >= 0) & (ordered < kv_pages.num_pages * page_size)
    tile_of = ordered // tile
    begins = valid & (tile_of != jnp.roll(tile_of, 1)).at[0].set(True)
    starts = jnp.nonzero(begins, size=num_tokens, fill_value=0)[0].astype(jnp.int32)
    counts = jnp.stack([valid.sum(dtype=jnp.int32), begins.sum(dtype=jnp.int32)])
    new_data = tpu_call(
        partial(_kernel, page_size=page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM(rows.shape, rows.dtype),
                pltpu.SemaphoreType.DMA,
                pltpu.VMEM((BUFFERS, 2, kv_pages.num_kv_heads, tile, kv_pages.head_dim), data.dtype),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(data.shape, data.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="append_kv",
    )(starts, order, ordered, counts, rows, data)
    return replace(kv_pages, data=new_data)
