# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The cache write, one row at a time in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages


def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """As `vsurge.kernels.append_kv`, but on a copy; outside jit only."""
    data = np.array(kv_pages.data)
    stored_as = data.dtype
    if stored_as != kv_pages.dtype:
        data = data.view(kv_pages.dtype)
    scales = None if kv_pages.scales is None else np.array(kv_pages.scales)
    new = np.asarray(keys), np.asarray(values)
    for token, slot in enumerate(np.asarray(slots).tolist()):
        if 0 <= slot < kv_pages.num_pages * kv_pages.page_size:
            page, offset = divmod(slot, kv_pages.page_size)
            for kind, rows in enumerate(new):
                row = rows[token]
                if scales is not None:
                    row, scales[page, kind, :, offset] = quantize(row, kv_pages.dtype)
                data[page, kind, :, offset] = row.astype(data.dtype)
    stored = jax.device_put(jnp.asarray(data.view(stored_as)))
    stored_scales = None if scales is None else jax.device_put(jnp.asarray(scales))
    return KVPages(stored, stored_scales, kv_pages.dtype, kv_pages.page_size)


def quantize(rows: npt.NDArray[Any], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """As `kernels.quantization.quantize`: [heads, head_dim] as they are stored, and their scales [heads]."""
    largest = np.float32({"int8": 127, "float8_e4m3fn": 448}[dtype.name])
    rows = rows.astype(np.float32)
    stored = np.zeros(rows.shape, dtype)
    scales = np.zeros(rows.shape[0], np.float32)
    for head, row in enumerate(rows):
        if not np.isfinite(row).all():
            scales[head] = np.nan
            continue
        scale = np.abs(row).max() * (np.float32(1) / largest)
        if scale >= np.finfo(np.float32).tiny:
            scales[head] = scale
            scaled = np.clip(row * (np.float32(1) / scale), -largest, largest)
            stored[head] = (np.rint(scaled) if dtype == np.int8 else scaled).astype(dtype)
    return stored, scales
