# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""How many pages the cache gets, and what to say where they do not fit."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax

from ..kernels import empty_kv_pages
from ..model import Model
from .errors import OutOfMemory
from .host_memory import available_bytes

logger = logging.getLogger("vsurge.runtime")

# Of a CPU's memory the cache takes this much unless `num_pages` says otherwise: the operating system and
# other programs use that memory too, so "what is left" is no measure.
CPU_CACHE_BYTES = 1 << 30
# Of what is free a setting that is recommended takes this share: steps need memory too.
ADVISED_SHARE = 0.9


def page_bytes(model: Model, page_size: int) -> int:
    """Bytes of one page over all layers, as this device keeps it."""
    config = model.config
    make = partial(empty_kv_pages, 1, page_size, config.num_kv_heads, config.head_dim, config.cache_dtype)
    arrays: list[jax.ShapeDtypeStruct] = jax.tree.leaves(jax.eval_shape(make))
    return config.num_layers * sum(array.size * array.dtype.itemsize for array in arrays)


def choose_num_pages(
    model: Model,
    *,
    page_size: int,
    memory_utilization: float,
    max_useful_pages: int,
) -> int:
    """As many pages as fit, but no more than the engine can ever use.

    On an accelerator `memory_utilization` of what is free after the weights; on a CPU `CPU_CACHE_BYTES`.

    Args:
        model: its weights are on their device already.
        page_size: tokens per page.
        memory_utilization: share of the free memory, in (0, 1].
        max_useful_pages: those of `max_length` tokens in every row of the batch.

    Raises:
        OutOfMemory: not even one page fits.
    """
    device = model.mesh.devices.flat[0]
    stats: dict[str, Any] | None = device.memory_stats()
    if device.platform == "cpu" or not stats:
        budget, source = (
            CPU_CACHE_BYTES,
            f"the default of {CPU_CACHE_BYTES / 2**30:g} GiB on {device.platform}",
        )
    else:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        budget, source = (
            int(free * memory_utilization),
            f"{memory_utilization:g} of {free / 2**30:.2f} GiB free",
        )
    size = page_bytes(model, page_size)
    if budget < size:
        raise OutOfMemory(
            f"one page of {page_size} tokens takes {size / 2**20:.1f} MiB, the cache may take "
            f"{budget / 2**20:.1f} MiB ({source}); use a smaller page_size or a smaller model"
        )
    num_pages = min(budget // size, max_useful_pages)
    logger.info(
        "cache: %d pages of %d tokens, %.2f GiB (%s)", num_pages, page_size, num_pages * size / 2**30, source
    )
    return num_pages


def check_room(device: Any, num_pages: int, page_size: int, num_bytes: int) -> None:
    """Refuses a cache that is larger than what a CPU has left.

    Linux hands out more memory than there is, and kills who uses it, so asking for it is no test. Other
    devices refuse what they do not have.

    Args:
        device: which one.
        num_pages: of the cache.
        page_size: tokens per page.
        num_bytes: of a page over all layers.

    Raises:
        OutOfMemory: it is.
    """
    if device.platform == "cpu":
        free = available_bytes()
        if free is not None and num_pages * num_bytes > free:
            raise out_of_memory(device, num_pages, page_size, num_bytes)


def out_of_memory(device: Any, num_pages: int, page_size: int, num_bytes: int) -> OutOfMemory:
    """The error for a cache that does not fit: its size, what there is, and a `num_pages` that would fit."""
    stats: dict[str, Any] | None = device.memory_stats()
    if stats and "bytes_limit" in stats:
        free = int(stats["bytes_limit"] - stats["bytes_in_use"])
    else:
        free = available_bytes() if device.platform == "cpu" else None
    asked = (
        f"num_pages={num_pages}: a cache of {num_pages * num_bytes / 2**30:.2f} GiB does not fit, "
        f"at {num_bytes} bytes a page of {page_size} tokens; "
    )
    if free is None:
        return OutOfMemory(f"{asked}the {device.platform} does not say how much is free; use fewer pages")
    fitting = int(free * ADVISED_SHARE) // num_bytes
    if num_pages * num_bytes <= free:  # it is in pieces
        fitting = min(fitting, num_pages // 2)
    advice = f"num_pages={fitting} would fit" if fitting else "not one page does: use a smaller page_size"
    return OutOfMemory(f"{asked}{free / 2**30:.2f} GiB are free; {advice}")
