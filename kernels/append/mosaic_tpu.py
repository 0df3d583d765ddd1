# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The cache write as a Pallas kernel for TPU.

A row of bfloat16 is half of a register's row, and a copy to HBM moves whole tiles: what is written is a
tile, 8 to 32 tokens of all heads. So the tile comes to VMEM, gets its new rows, and goes back. The tokens are
sorted by slot first, so that every tile is handled once, whatever the order of the tokens, and no two copies
that are under way touch the same tile. (Every layer of a model sorts the same slots: XLA does it once.)

The scales of a quantized cache come and go in the same way, but those of a page's tokens share their tiles:
their pieces are pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages, bytes_per_token, encode
from ..tpu.control import for_each
from ..tpu.fetcher import vmem_bytes_per_row
from ..tpu.launch import check_pages, in_hbm, tpu_call, vmem_bytes
from ..tpu.shapes import LANES, SUBLANES, padded
from ..tpu.units import SMEM_BYTES, SMEM_TILE

BUFFERS = 16  # pieces in VMEM
AHEAD = 8  # of these, pieces whose fetch has been started before they are needed
ROW_BYTES = 4 * 2**20  # of new rows that lie in VMEM at once


@dataclass(frozen=True)
class _Pieces:
    """The pieces of an array in HBM that get new rows: each is fetched, changed and written back.

    Attributes:
        array: [num_pages, 2, num_kv_heads, page_size or more, …] in HBM.
        page_size, tokens: tokens in a page and in a piece.
        starts: [num_tokens] int32 in scalar memory, where a piece's tokens begin in the order of slots.
        slots: [num_tokens] int32 in scalar memory, in that order.
        num_tokens, num_pieces: of those to write.
        buffers: [BUFFERS, 2, num_kv_heads, tokens or more, …] in VMEM.
        fetched, written: [BUFFERS] DMA semaphores.
    """

    array: Any
    page_size: int
    tokens: int
    starts: Any
    slots: Any
    num_tokens: Any
    num_pieces: Any
    buffers: Any
    fetched: Any
    written: Any

    def begin(self) -> None:
        """Starts the first fetches."""
        for_each(0, jnp.minimum(AHEAD, self.num_pieces), lambda i: self._fetch(i).start())

    def change(self, new: Callable[[Any], Any]) -> None:
        """Changes all; `new` gives a token's row, [2, num_kv_heads, 1, …], by its place in the order."""
        for_each(0, self.num_pieces, partial(self._change, new))

    def end(self) -> None:
        """Waits for the last writes."""
        first = jnp.maximum(self.num_pieces - BUFFERS, 0)
        for_each(first, self.num_pieces, lambda i: self._write(i).wait())

    def _change(self, new: Callable[[Any], Any], i: Any) -> None:
        coming = i + AHEAD

        @pl.when(coming < self.num_pieces)
        def _() -> None:
            pl.when(coming >= BUFFERS)(lambda: self._write(coming - BUFFERS).wait())
            self._fetch(coming).start()

        self._fetch(i).wait()
        buffer = self.buffers.at[lax.rem(i, BUFFERS)]
        following = self.starts[jnp.minimum(i + 1, self.starts.shape[0] - 1)]
        end = jnp.where(i + 1 < self.num_pieces, following, self.num_tokens)

        def insert(j: Any) -> None:
            offset = lax.broadcasted_iota(jnp.int32, buffer.shape, 2)
            buffer[...] = jnp.where(offset == lax.rem(self.slots[j], self.tokens), new(j), buffer[...])

        for_each(self.starts[i], end, insert)
        self._write(i).start()

    def _place(self, i: Any) -> Any:
        """A piece's part of the array."""
        slot = self.slots[self.starts[i]]
        page = self.array.at[slot // self.page_size]
        if self.tokens == self.page_size:
            return page
        return page.at[:, :, pl.ds(slot % self.page_size // self.tokens * self.tokens, self.tokens)]

    def _fetch(self, i: Any) -> Any:
        buffer = lax.rem(i, BUFFERS)
        return pltpu.make_async_copy(self._place(i), self.buffers.at[buffer], self.fetched.at[buffer])

    def _write(self, i: Any) -> Any:
        buffer = lax.rem(i, BUFFERS)
        return pltpu.make_async_copy(self.buffers.at[buffer], self._place(i), self.written.at[buffer])


def _kernel(
    starts: Any,
    rows_of: Any,
    slots: Any,
    counts: Any,
    rows_hbm: Any,
    scales: Any,
    _: Any,
    kv_pages: KVPages,
    rows: Any,
    rows_arrived: Any,
    *pieces: Any,
) -> None:
    """Writes all rows.

    Args:
        starts: see `_Pieces`, of the data and, in a quantized cache, of the scales.
        rows_of, slots: [num_tokens] int32 in scalar memory: in the order of slots, each token's row and slot.
        counts: in scalar memory: the tokens to write, and the pieces that they lie in, as `starts`.
        rows_hbm: [num_tokens, 2, num_kv_heads, head_dim], keys and values, as the cache stores them.
        scales: [2, num_kv_heads, tokens] float32 in VMEM, in the order of slots; None without scales.
        kv_pages: the cache in HBM.
        rows: as `rows_hbm`, in VMEM.
        rows_arrived: a DMA semaphore.
        pieces: per array of the cache the buffers and semaphores of `_Pieces`.
    """

    page_size = kv_pages.page_size

    def pieces_of(i: int, array: Any, tokens: int) -> _Pieces:
        return _Pieces(
            array,
            page_size,
            tokens,
            starts[i],
            slots,
            counts[0],
            counts[1 + i],
            *pieces[3 * i : 3 * i + 3],
        )

    def new_row(j: Any) -> Any:
        return rows[rows_of[j]][:, :, None]

    def new_scales(j: Any) -> Any:
        chunk = scales[:, :, pl.ds(pl.multiple_of(j // LANES * LANES, LANES), LANES)]
        here = lax.broadcasted_iota(jnp.int32, chunk.shape, 2) == lax.rem(j, LANES)
        return jnp.sum(jnp.where(here, chunk, 0.0), axis=2, keepdims=True)

    all_rows = pltpu.make_async_copy(rows_hbm, rows, rows_arrived)
    all_rows.start()
    parts = [(pieces_of(0, kv_pages.data, pieces[0].shape[3]), new_row)]
    if kv_pages.scales is not None:
        parts.append((pieces_of(1, kv_pages.scales, page_size), new_scales))
    for part, _new in parts:
        part.begin()
    all_rows.wait()
    for part, new in parts:
        part.change(new)
    for part, _new in parts:
        part.end()


@partial(jax.jit, donate_argnums=0)
def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """As `vsurge.kernels.append_kv`.

    Raises:
        ValueError: the pages hold no whole tiles, or there is no room for those of all heads.
    """
    check_pages(kv_pages)
    rows, scales = encode(kv_pages, jnp.stack([keys, values], axis=1))
    most = ROW_BYTES // bytes_per_token(kv_pages.num_kv_heads, padded(kv_pages.head_dim), kv_pages.dtype)
    for begin in range(0, slots.shape[0], most):
        these = slice(begin, begin + most)
        kv_pages = _write(kv_pages, rows[these], None if scales is None else scales[these], slots[these])
    return kv_pages


def check_memory(kv_pages: KVPages, num_tokens: int, pieces: list[int], vmem: int) -> None:
    """Checks what a call takes of vector and of scalar memory.

    Args:
        kv_pages: the cache.
        num_tokens: that are written at once.
        pieces: bytes in vector memory of a piece of each array of the cache.
        vmem: bytes of vector memory.

    Raises:
        ValueError: too much; the message says how much and of what.
    """
    heads, head_dim = kv_pages.num_kv_heads, kv_pages.head_dim
    needed = BUFFERS * sum(pieces) + num_tokens * vmem_bytes_per_row(kv_pages)
    if needed > vmem:
        raise ValueError(
            f"kv_pages: {BUFFERS} pieces of {heads} KV heads with head_dim {head_dim} and the new rows need "
            f"{needed} bytes of vector memory, which has {vmem}; share the heads among more devices"
        )
    scalars = 4 * ((2 + len(pieces)) * padded(num_tokens, SMEM_TILE) + SMEM_TILE)
    if scalars > SMEM_BYTES:
        raise ValueError(
            f"slots: {num_tokens} tokens at once need {scalars} bytes of scalar memory, "
            f"which has {SMEM_BYTES}"
        )


def _write(kv_pages: KVPages, rows: Array, scales: Array | None, slots: Array) -> KVPages:
    """Writes [num_tokens, 2, num_kv_heads, head_dim] as the cache stores them, and their scales."""
    num_tokens, page_size = slots.shape[0], kv_pages.page_size
    order = jnp.argsort(jnp.where(slots < 0, jnp.int32(2**31 - 1), slots)).astype(jnp.int32)
    ordered = slots[order]
    valid = (ordered >= 0) & (ordered < kv_pages.num_pages * page_size)
    counts, starts, scratch = [valid.sum(dtype=jnp.int32)], list[Array](), list[Any]()
    sizes, vmem = list[int](), vmem_bytes()
    for array in jax.tree.leaves(kv_pages):
        tokens = page_size if array is kv_pages.scales else math.gcd(page_size, 32 // array.dtype.itemsize)
        piece_of = ordered // tokens
        begins = valid & (piece_of != jnp.roll(piece_of, 1)).at[0].set(True)
        counts.append(begins.sum(dtype=jnp.int32))
        starts.append(jnp.nonzero(begins, size=num_tokens, fill_value=0)[0].astype(jnp.int32))
        tail = (tokens, *array.shape[4:]) if array is kv_pages.data else array.shape[3:]
        piece = (BUFFERS, 2, kv_pages.num_kv_heads, *tail)
        *_, rows_in, numbers = piece
        sizes.append(
            math.prod(piece[1:-2]) * padded(rows_in, SUBLANES) * padded(numbers) * array.dtype.itemsize
        )
        scratch += [pltpu.VMEM(piece, array.dtype), *[pltpu.SemaphoreType.DMA((BUFFERS,))] * 2]
    check_memory(kv_pages, num_tokens, sizes, vmem)
    if scales is not None:
        by_lane = jnp.moveaxis(scales[order], 0, 2)
        scales = jnp.pad(by_lane, ((0, 0), (0, 0), (0, padded(num_tokens) - num_tokens)))
    arguments = (tuple(starts), order, ordered, jnp.stack(counts), rows, scales)
    before = len(jax.tree.leaves(arguments))
    written = tpu_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                None if scales is None else pl.BlockSpec(memory_space=pltpu.VMEM),
                in_hbm(kv_pages),
            ],
            out_specs=in_hbm(kv_pages),
            scratch_shapes=[pltpu.VMEM(rows.shape, rows.dtype), pltpu.SemaphoreType.DMA, *scratch],
        ),
        out_shape=jax.eval_shape(lambda: kv_pages),
        input_output_aliases={before + i: i for i in range(len(starts))},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=vmem),
        name="append_kv",
    )(*arguments, kv_pages)
    return cast(KVPages, written)
