# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The paged cache of keys and values of one layer, and the only code that knows how it is laid out.

The cache is a pool of pages. A page holds `page_size` consecutive tokens of one sequence, head by head:

    data    [num_pages, 2, num_kv_heads, page_size, head_dim]      0 = keys, 1 = values
    scales  [num_pages, 2, num_kv_heads, page_size]                float32, of a quantized cache alone

so that one head's part of a page is whole tiles on a TPU and one contiguous block on a GPU, and sharding
over heads is one axis. A token's place in the pool is its slot, `page * page_size + offset`.

On a CPU a bfloat16 or float8 cache is stored as unsigned bit patterns: XLA's CPU backend scatters into such
an array by converting the whole array to float32 and back, which costs a thousand times the write itself
(int8 and float32 it scatters as they are). The field `dtype` says what the bits mean.

On a TPU the scales of a page fill 128 lanes whatever the page's size. Tiles would be padded so anyway; but
with a smaller last axis XLA makes another one the last in memory, and copies all scales before each kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from .quantization import FLOAT8, INT8, SCALE_BYTES, is_quantized, quantize

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a leaf may also be a ShapeDtypeStruct, a sharding or None, which a runtime type checker must let pass
    Leaf = Any

BFLOAT16 = np.dtype(jnp.bfloat16)
SUPPORTED_DTYPES = (BFLOAT16, np.dtype(np.float32), INT8, FLOAT8)
BITS = {BFLOAT16: np.dtype(np.uint16), FLOAT8: np.dtype(np.uint8)}  # in which a CPU keeps these
KEYS, VALUES = 0, 1  # the second axis of the data

TPU_LANES = 128

# How XLA's CPU backend copies pages fastest (measured): large ones slice by slice, few at a time (beyond
# four slices the concatenation becomes slow), small ones by one gather.
SLICED_FROM = 64  # tokens in a page
MAX_SLICES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """One layer's paged cache of keys and values; `empty_kv_pages` builds it.

    Attributes:
        data: [num_pages, 2, num_kv_heads, page_size, head_dim], of `dtype` or the same bits as an unsigned
            integer.
        scales: [num_pages, 2, num_kv_heads, page_size or more] float32, what a token's keys and values in
            `data` are multiplied with, and numbers that mean nothing; None unless `dtype` is int8 or
            float8_e4m3fn.
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

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The name of each axis of each array, for whoever spreads a cache over devices."""
        axes: dict[str, tuple[str, ...]] = {
            "data": ("pages", "keys_values", "kv_heads", "page_tokens", "head_dim")
        }
        return axes if self.scales is None else axes | {"scales": axes["data"][:-1]}


def bytes_per_token(num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of one layer's cache that one token takes: keys, values and, if it is quantized, their scales.

    (On a TPU the scales of a page of less than 128 tokens take as much as those of 128.)
    """
    scale_bytes = SCALE_BYTES if is_quantized(dtype) else 0
    return 2 * num_kv_heads * (head_dim * np.dtype(dtype).itemsize + scale_bytes)


def empty_kv_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    *,
    platform: str | None = None,
) -> KVPages:
    """A cache of zeros for one layer.

    Args:
        num_pages: pages in the pool.
        page_size: tokens per page.
        num_kv_heads: key/value heads.
        head_dim: numbers per head.
        dtype: bfloat16, float32, int8 or float8_e4m3fn. The last two are quantized as they are written
            (`quantization.quantize`). Int8 is more exact, and faster than bfloat16 by as much as the README's
            table says for each TPU. Float8 is about as fast as int8 on 7x, slower on v5e, and on v6e
            no faster than bfloat16.
        platform: of the device that will keep it, "cpu" or "tpu", say; None for JAX's default backend.

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
    rows = (num_pages, 2, num_kv_heads, page_size)
    return KVPages(
        data=jnp.zeros((*rows, head_dim), storage_dtype(dtype, platform)),
        scales=jnp.zeros((*rows[:3], scale_tokens(page_size, platform)), jnp.float32)
        if is_quantized(dtype)
        else None,
        dtype=dtype,
        page_size=page_size,
    )


def storage_dtype(dtype: DTypeLike, platform: str | None = None) -> np.dtype[Any]:
    """The dtype in which `platform` (default: JAX's default backend) keeps a cache of `dtype`."""
    dtype = np.dtype(dtype)
    return BITS.get(dtype, dtype) if (platform or jax.default_backend()) == "cpu" else dtype


def scale_tokens(page_size: int, platform: str | None = None) -> int:
    """Places for scales in a page per head on `platform` (default: JAX's default backend)."""
    on_tpu = (platform or jax.default_backend()) == "tpu"
    return -(-page_size // TPU_LANES) * TPU_LANES if on_tpu else page_size


def decode_bits(kv_pages: KVPages, stored: Array) -> Array:
    """Values of `kv_pages.dtype` from what was gathered out of `kv_pages.data`."""
    if stored.dtype == kv_pages.dtype:
        return stored
    return jax.lax.bitcast_convert_type(stored, kv_pages.dtype)


def encode(kv_pages: KVPages, rows: Float[Array, "*rows head_dim"]) -> tuple[Array, Array | None]:
    """What `kv_pages` keeps of rows: in its dtype, as bits where it keeps bits; and their scales if any.

    Returns:
        [..., head_dim] for `data`, [...] for `scales`.
    """
    scales = None
    if is_quantized(kv_pages.dtype):
        rows, scales = quantize(rows, kv_pages.dtype)
    stored = rows.astype(kv_pages.dtype)
    if kv_pages.data.dtype != kv_pages.dtype:
        stored = jax.lax.bitcast_convert_type(stored, kv_pages.data.dtype)
    return stored, scales


def pages_per_block(kv_pages: KVPages, num_seqs: int, block_tokens: int) -> int:
    """How many pages of each of `num_seqs` sequences to load at once, to get about `block_tokens`."""
    if _copies_whole_pages(kv_pages):
        block_tokens = min(block_tokens, kv_pages.page_size * MAX_SLICES // num_seqs)
    return max(1, block_tokens // kv_pages.page_size)


def load_block(
    kv_pages: KVPages,
    pages: Int[Array, "num_seqs pages_per_block"],
    kind: int,
    valid: Bool[Array, "num_seqs block"] | None = None,
) -> Num[Array, "num_seqs num_kv_heads block head_dim"]:
    """Some pages' keys or values, the tokens of a sequence one after another.

    The bits are copied as they are stored and decoded in the copy: no other part of the cache is touched.

    Args:
        kv_pages: one layer's cache.
        pages: [num_seqs, pages_per_block] int32; a page outside the pool yields some other page.
        kind: KEYS or VALUES.
        valid: [num_seqs, block], block = pages_per_block * page_size: tokens where this is false become zero.

    Returns:
        [num_seqs, num_kv_heads, block, head_dim] of `kv_pages.dtype`, without their scales.
    """
    stored = _slice_pages(kv_pages, pages, kind)
    if valid is not None:
        stored = jnp.where(valid[:, None, :, None], stored, jnp.zeros((), stored.dtype))
    return decode_bits(kv_pages, stored)


def load_scales(
    kv_pages: KVPages,
    pages: Int[Array, "num_seqs pages_per_block"],
    kind: int,
    valid: Bool[Array, "num_seqs block"] | None = None,
) -> Float[Array, "num_seqs num_kv_heads block"]:
    """The scales of what `load_block` loads."""
    assert kv_pages.scales is not None
    scales = _gather_pages(kv_pages, kv_pages.scales[..., : kv_pages.page_size], pages, kind)
    return scales if valid is None else jnp.where(valid[:, None], scales, 0.0)


def _slice_pages(kv_pages: KVPages, pages: Array, kind: int) -> Array:
    if not _copies_whole_pages(kv_pages):
        return _gather_pages(kv_pages, kv_pages.data, pages, kind)
    size = (1, 1, kv_pages.num_kv_heads, kv_pages.page_size, kv_pages.head_dim)

    def copy_page(page: Array) -> Array:
        return jax.lax.dynamic_slice(kv_pages.data, (page, kind, 0, 0, 0), size)[0]

    sequences = [jnp.concatenate([copy_page(page) for page in row], axis=2) for row in pages]
    return jnp.concatenate(sequences, axis=0)


def _gather_pages(kv_pages: KVPages, array: Any, pages: Array, kind: int) -> Array:
    num_seqs, heads, per_head = pages.shape[0], kv_pages.num_kv_heads, array.shape[3:]
    head = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    head_pages = (
        2 * pages[:, None, :] + kind
    ) * heads + head  # the order wanted: no transposition afterwards
    found = array.reshape(-1, *per_head).at[head_pages].get(mode="clip")
    return found.reshape(num_seqs, heads, -1, *per_head[1:])


def _copies_whole_pages(kv_pages: KVPages) -> bool:
    return kv_pages.page_size >= SLICED_FROM


def write_rows(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """The cache with one row of keys and of values written per head and token; slots outside are skipped.

    One scatter of rows into the flat view [rows, head_dim]: in place if `kv_pages` is donated, and then as
    cheap as the rows' bytes.
    """
    heads, page_size, head_dim = kv_pages.num_kv_heads, kv_pages.page_size, kv_pages.head_dim
    new, scales = encode(kv_pages, jnp.stack([keys, values], axis=1))  # [num_tokens, 2, num_kv_heads, ...]
    head = jnp.arange(2 * heads, dtype=jnp.int32).reshape(1, 2, heads)
    page, offset = (part[:, None, None] for part in (slots // page_size, slots % page_size))
    flat = kv_pages.data.reshape(-1, head_dim)
    rows = (page * (2 * heads) + head) * page_size + offset
    outside = (slots < 0) | (slots >= kv_pages.num_pages * page_size)
    rows = jnp.where(outside[:, None, None], flat.shape[0], rows)  # out of range: dropped
    flat = flat.at[rows.reshape(-1)].set(new.reshape(-1, head_dim), mode="drop")
    written = replace(kv_pages, data=flat.reshape(kv_pages.data.shape))
    if kv_pages.scales is None or scales is None:
        return written
    flat_scales = kv_pages.scales.reshape(-1)
    places = (page * (2 * heads) + head) * kv_pages.scales.shape[3] + offset
    places = jnp.where(outside[:, None, None], flat_scales.shape[0], places)
    flat_scales = flat_scales.at[places.reshape(-1)].set(scales.reshape(-1), mode="drop")
    return replace(written, scales=flat_scales.reshape(kv_pages.scales.shape))


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
        keys and values, each [num_tokens, num_kv_heads, head_dim]: of `kv_pages.dtype`, or float32 if the
        cache is quantized.
    """
    page, offset = slots // kv_pages.page_size, slots % kv_pages.page_size
    rows = decode_bits(kv_pages, kv_pages.data.at[page, :, :, offset].get(mode="clip"))
    if kv_pages.scales is not None:
        scales = kv_pages.scales.at[page, :, :, offset].get(mode="clip")
        rows = rows.astype(jnp.float32) * scales[..., None]
    return rows[:, 0], rows[:, 1]
