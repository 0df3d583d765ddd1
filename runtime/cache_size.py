# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""How many pages the cache gets, and what to say where they do not fit."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax
import numpy as np

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
    """Bytes of one page over all layers, on a device that has a share of it."""
    config, layout = model.config, model.layout
    heads = config.num_kv_heads // layout.size("kv_heads")
    platform = layout.mesh.devices.flat[0].platform
    make = partial(
        empty_kv_pages, 1, page_size, heads, config.head_dim, config.cache_dtype, platform=platform
    )
    arrays: list[jax.ShapeDtypeStruct] = jax.tree.leaves(jax.eval_shape(make))
    return config.num_layers * sum(array.size * array.dtype.itemsize for array in arrays)


def row_state_bytes(model: Model, num_rows: int) -> int:
    """Bytes that a device remembers of the rows of the batch: a bias and a count of each token."""
    layout = model.layout
    tokens = model.config.vocab_size // layout.size("vocab")
    return (
        num_rows
        // layout.size("rows")
        * tokens
        * (np.dtype(np.float32).itemsize + np.dtype(np.int32).itemsize)
    )


def bytes_per_page(model: Model, page_size: int) -> int:
    """Bytes that each page of the cache takes of one memory.

    A device has only the pages of its replica. The devices of a CPU share one memory.
    """
    mesh, replicas = model.mesh, model.layout.size("pages")
    sharing = mesh.size if mesh.devices.flat[0].platform == "cpu" else 1
    return page_bytes(model, page_size) * sharing // replicas


def choose_num_pages(
    model: Model,
    *,
    page_size: int,
    memory_utilization: float,
    max_useful_pages: int,
    num_rows: int,
) -> int:
    """As many pages as fit, as many in each replica, but no more than the engine can ever use.

    On an accelerator `memory_utilization` of what is free after the weights and what is remembered of the
    rows; on a CPU `CPU_CACHE_BYTES`.

    Args:
        model: its weights are on their device already.
        page_size: tokens per page.
        memory_utilization: share of the free memory, in (0, 1].
        max_useful_pages: beyond which more would never be used.
        num_rows: of the batch.

    Raises:
        OutOfMemory: not even one page, in each replica, fits.
    """
    device = model.mesh.devices.flat[0]
    stats: dict[str, Any] | None = device.memory_stats()
    if device.platform == "cpu" or not stats:
        budget, source = (
            CPU_CACHE_BYTES,
            f"the default of {CPU_CACHE_BYTES / 2**30:g} GiB on {device.platform}",
        )
    else:
        free = stats["bytes_limit"] - stats["bytes_in_use"] - row_state_bytes(model, num_rows)
        budget, source = (
            int(free * memory_utilization),
            f"{memory_utilization:g} of {free / 2**30:.2f} GiB free",
        )
    size, replicas = bytes_per_page(model, page_size), model.layout.size("pages")
    if budget < size * replicas:
        each = f" in each of {replicas} replicas" if replicas > 1 else ""
        raise OutOfMemory(
            f"one page of {page_size} tokens{each} takes {size * replicas / 2**20:.1f} MiB, the cache may "
            f"take {budget / 2**20:.1f} MiB ({source}); use a smaller page_size or a smaller model"
        )
    num_pages = min(budget // size, max_useful_pages) // replicas * replicas
    logger.info(
        "cache: %d pages of %d tokens, %.2f GiB (%s)", num_pages, page_size, num_pages * size / 2**30, source
    )
    return num_pages


def check_room(model: Model, num_pages: int, page_size: int) -> None:
    """Refuses a cache that is larger than what a CPU has left.

    Linux hands out more memory than there is, and kills who uses it, so asking for it is no test. Other
    devices refuse what they do not have.

    Args:
        model: whose cache.
        num_pages: of the cache.
        page_size: tokens per page.

    Raises:
        OutOfMemory: it is.
    """
    if model.mesh.devices.flat[0].platform == "cpu":
        free = available_bytes()
        if free is not None and num_pages * bytes_per_page(model, page_size) > free:
            raise out_of_memory(model, num_pages, page_size)


def out_of_memory(model: Model, num_pages: int, page_size: int) -> OutOfMemory:
    """The error for a cache that does not fit: its size, what there is, and a `num_pages` that would fit."""
    device, num_bytes = model.mesh.devices.flat[0], bytes_per_page(model, page_size)
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
