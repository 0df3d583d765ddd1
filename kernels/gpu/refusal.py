# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Caches that Triton's kernels cannot have.

jax's lowering for Triton counts offsets into an array of up to 2^32 bytes in 32 bits with a sign, and into a
larger one in 64. Those into an array of one-byte numbers between 2^31 and 2^32 overflow: a kernel would read
and write elsewhere. There is no view of such an array, without a copy, that has fewer numbers.
"""

from __future__ import annotations

from typing import Any, cast

import jax

from ..kv_pages import KVPages
from ..quantization import FLOAT8

WRONGLY_ADDRESSED = range(2**31 + 1, 2**32 + 1)  # one-byte numbers in an array
CONVERTS_FLOAT8 = (8, 9)  # compute capability


def why_refused(kv_pages: KVPages) -> str | None:
    """Why the attention kernels cannot have a cache; None if they can."""
    return out_of_reach(kv_pages) or not_converted(kv_pages)


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


def not_converted(kv_pages: KVPages) -> str | None:
    """Why attention on the GPU that is here cannot have the cache's dtype; None if it can, or without one."""
    found = compute_capability() if kv_pages.dtype == FLOAT8 else None
    if found is None or found >= CONVERTS_FLOAT8:
        return None
    return (
        f"kv_pages: {kv_pages.dtype.name} needs a GPU of compute capability "
        f"{'.'.join(map(str, CONVERTS_FLOAT8))} or later for Triton's kernels, this one has "
        f"{'.'.join(map(str, found))}; int8 is as small, or implementation='xla'"
    )


def compute_capability() -> tuple[int, ...] | None:
    """Of jax's default device, like (9, 0); None if it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    devices = cast("list[Any]", jax.devices())
    said = str(getattr(devices[0], "compute_capability", ""))
    return tuple(map(int, said.split("."))) if said.replace(".", "").isdigit() else None
