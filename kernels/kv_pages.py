"""The paged cache of keys and values of one layer, and the only code that knows how it is laid out.

The cache is a pool of pages. A page holds `page_size` consecutive tokens of one sequence, head by head:

    data    [num_pages, 2, num_kv_heads, page_size, head_dim]      0 = keys, 1 = values

so that one head's part of a page is whole tiles on a TPU and one contiguous block on a GPU, and sharding
over heads is one axis. A token's place in the pool is its slot, `page * page_size + offset`.

On a CPU a bfloat16 cache is stored as uint16 bit patterns: XLA's CPU backend scatters into a bfloat16 array
by converting the whole array to float32 and back, which costs a thousand times the write itself. The field
`dtype` says what the bits mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Num

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a pytree's leaf may also be a ShapeDtypeStruct, a sharding or None, which a runtime type checker must let pass
    Leaf = Any

SUPPORTED_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(np.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """One layer's paged cache of keys and values; `empty_kv_pages` builds it.

    Attributes:
        data: [num_pages, 2, num_kv_heads, page_size, head_dim], of `dtype` or the same bits as uint16.
        scales: None; a quantized cache keeps its scales here.
        dtype: what the numbers in `data` mean (static).
        page_size: tokens per page (static).
    """

    data: Leaf
    scales: Leaf | None
    dtype: np.dtype[Any] = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})

    @property
    def num_pages(self) -> int:
        return self.data.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[2]

    @property
    def head_dim(self) -> int:
        return self.data.shape[4]


def bytes_per_token(num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of one layer's cache that one token takes: its keys and its values."""
    return 2 * num_kv_heads * head_dim * np.dtype(dtype).itemsize


def empty_kv_pages(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
) -> KVPages:
    """A cache of zeros for one layer.

    Args:
        num_pages: pages in the pool.
        page_size: tokens per page.
        num_kv_heads: key/value heads.
        head_dim: numbers per head.
        dtype: bfloat16 or float32.

    Raises:
        ValueError: a size is not positive, or the dtype is not supported.
    """
    sizes = {
        "num_pages": num_pages,
        "page_size": page_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")
    dtype = np.dtype(dtype)
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype={dtype.name}: a cache can hold {[d.name for d in SUPPORTED_DTYPES]}")
    data = jnp.zeros((num_pages, 2, num_kv_heads, page_size, head_dim), storage_dtype(dtype))
    return KVPages(data=data, scales=None, dtype=dtype, page_size=page_size)


def storage_dtype(dtype: DTypeLike, platform: str | None = None) -> np.dtype[Any]:
    """The dtype in which `platform` (default: JAX's default backend) keeps a cache of `dtype`."""
    if (platform or jax.default_backend()) == "cpu" and np.dtype(dtype) == np.dtype(jnp.bfloat16):
        return np.dtype(np.uint16)
    return np.dtype(dtype)


def decode_bits(kv_pages: KVPages, stored: Array) -> Array:
    """Values of `kv_pages.dtype` from what was gathered out of `kv_pages.data`."""
    if stored.dtype == kv_pages.dtype:
        return stored
    return jax.lax.bitcast_convert_type(stored, kv_pages.dtype)


def encode_bits(kv_pages: KVPages, values: Array) -> Array:
    """What `kv_pages.data` stores for `values`: cast to the cache's dtype, as bits where it keeps bits."""
    values = values.astype(kv_pages.dtype)
    if kv_pages.data.dtype == kv_pages.dtype:
        return values
    return jax.lax.bitcast_convert_type(values, kv_pages.data.dtype)


def gather_pages(kv_pages: KVPages, pages: Int[Array, "*index"]) -> Array:
    """[*index, 2, num_kv_heads, page_size, head_dim] of `kv_pages.dtype`; page numbers are clipped."""
    return decode_bits(kv_pages, kv_pages.data.at[pages].get(mode="clip"))


@jax.jit
def read_kv(
    kv_pages: KVPages, slots: Int[Array, " num_tokens"]
) -> tuple[
    Num[Array, "num_tokens num_kv_heads head_dim"],
    Num[Array, "num_tokens num_kv_heads head_dim"],
]:
    """Keys and values at `slots`, the inverse of `append_kv`; for tests and tools.

    Args:
        kv_pages: one layer's cache.
        slots: [num_tokens] int32, `page * page_size + offset`; must lie in the pool (they are clipped).

    Returns:
        keys and values, each [num_tokens, num_kv_heads, head_dim] of `kv_pages.dtype`.
    """
    page, offset = slots // kv_pages.page_size, slots % kv_pages.page_size
    rows = decode_bits(kv_pages, kv_pages.data.at[page, :, :, offset].get(mode="clip"))
    return rows[:, 0], rows[:, 1]
