# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The cache write on a GPU, in Triton through Pallas: a program writes one token's rows, in place."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ..gpu.attend import flat_cache
from ..gpu.launch import call
from ..kv_pages import KVPages, encode


@partial(jax.jit, donate_argnums=0)
def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """As `vsurge.kernels.append_kv`."""
    if keys.shape[0] == 0:
        return kv_pages
    num_tokens, heads, head_dim = keys.shape
    rows, scales = encode(kv_pages, jnp.stack([keys, values], axis=1))
    arrays = flat_cache(kv_pages)
    if rows.dtype != arrays[0].dtype:
        rows = lax.bitcast_convert_type(rows, arrays[0].dtype)
    new: list[Any] = [rows.reshape(num_tokens, 2 * heads, head_dim)]
    if scales is not None:
        new.append(scales.reshape(num_tokens, 2 * heads))
    written = call(
        partial(
            _write_token, page_size=kv_pages.page_size, num_slots=kv_pages.num_pages * kv_pages.page_size
        ),
        (slots, *new, *arrays),
        [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        name="append_kv",
        grid=(num_tokens,),
        num_warps=1,
        num_stages=1,
        input_output_aliases={1 + len(new) + i: i for i in range(len(arrays))},
    )
    written_data = written[0].reshape(kv_pages.data.shape)
    if written_data.dtype != kv_pages.data.dtype:
        written_data = lax.bitcast_convert_type(written_data, kv_pages.data.dtype)
    kv_pages = replace(kv_pages, data=written_data)
    if kv_pages.scales is None:
        return kv_pages
    return replace(kv_pages, scales=written[1].reshape(kv_pages.scales.shape))


def _write_token(slots_ref: Any, *refs: Any, page_size: int, num_slots: int) -> None:
    """References to the slots; new rows [num_tokens, 2 * num_kv_heads, head_dim] and, of a quantized cache,
    their scales [num_tokens, 2 * num_kv_heads]; the cache's arrays as they were, and as they become."""
    count = len(refs) // 3
    token, rows_ref, written = pl.program_id(0), refs[0], refs[2 * count :]
    num_rows, head_dim = rows_ref.shape[1:]
    slot = slots_ref[token]

    @pl.when((slot >= 0) & (slot < num_slots))
    def _() -> None:
        row = jnp.arange(1 << (num_rows - 1).bit_length(), dtype=jnp.int32)
        column = jnp.arange(head_dim, dtype=jnp.int32)
        used = row < num_rows
        in_use = jnp.broadcast_to(used[:, None], (row.shape[0], head_dim))
        place = (slot // page_size * num_rows + row) * page_size + slot % page_size
        new = plgpu.load(rows_ref.at[token, row[:, None], column[None, :]], mask=in_use, other=0)
        plgpu.store(written[0].at[place[:, None], column[None, :]], new, mask=in_use)
        if count > 1:
            plgpu.store(
                written[1].at[place], plgpu.load(refs[1].at[token, row], mask=used, other=0), mask=used
            )
