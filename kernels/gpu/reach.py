"""How far Triton's kernels reach into a cache.

jax's lowering for Triton counts offsets into an array of up to 2^32 bytes in 32 bits with a sign, and into a
larger one in 64. Those into an array of one-byte numbers between 2^31 and 2^32 overflow: a kernel would read
and write elsewhere. There is no view of such an array, without a copy, that has fewer numbers.
"""

from __future__ import annotations

from ..kv_pages import KVPages

WRONGLY_ADDRESSED = range(2**31 + 1, 2**32 + 1)  # one-byte numbers in an array


def out_of_reach(kv_pages: KVPages) -> str | None:
    """Why Triton's kernels cannot have a cache of this size; None if they can."""
    size, within = kv_pages.data.size, WRONGLY_ADDRESSED
    if kv_pages.data.dtype.itemsize > 1 or size not in within:
        return None
    page = size // kv_pages.num_pages
    most, least = (within.start - 1) // page, (within.stop - 1) // page + 1
    return (
        f"kv_pages: {kv_pages.num_pages} pages of {page} bytes of {kv_pages.dtype.name} in a layer, {size} "
        f"bytes, of which Triton's kernels reach {within.start - 1} only; up to {most} pages or {least} and "
        "more are allowed, or implementation='xla'"
    )
