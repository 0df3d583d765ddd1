# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The entry for a call that is being traced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import jax

from .table import Entry, Key, Tuned, read_table, table_path, user_table_path

Blocks = TypeVar("Blocks")

logger = logging.getLogger("vsurge.kernels")


def device_here() -> str | None:
    """The name of the table of the device that is traced for; None for one that has none.

    Of a TPU that is its chip, like "v6e", of a GPU what jax calls it, like "nvidia-h200".
    """
    from jax.experimental.pallas import tpu as pltpu  # importing Pallas takes longer than all else here

    if pltpu.is_tpu_device():
        return str(pltpu.get_tpu_info().chip_version)
    if jax.default_backend() == "gpu":
        kind = str(cast(Any, jax.devices()[0]).device_kind)
        return kind.lower().replace(" ", "-").replace("/", "-")
    return None


def tuned_implementation(key: Key, context: int) -> Tuned | None:
    """The implementation that the tables name for a call on the device that is here.

    Args:
        key, context: as of `tuned_blocks`.

    Returns:
        None if there is no entry, which is logged once per key and context.

    Raises:
        ValueError: a table's file is corrupt.
    """
    device = device_here()
    if device is None:
        return None
    for _, entry in _in_order(device, key, context):
        return entry.implementation
    how = f"vsurge tune --chip {device} would time them"
    _log_once(logging.WARNING, f"{device}: no kernel was timed for {key}, {context=}, 'xla' runs; {how}")
    return None


def tuned_blocks(
    key: Key,
    context: int,
    kind: Callable[..., Blocks],
    check: Callable[[Blocks], None],
    implementation: Tuned = "mosaic_tpu",
) -> Blocks | None:
    """The block sizes that the tables hold for a call, for the device that is traced for.

    An entry whose range holds the context is taken, the user's (`user_table_path`) before the committed one;
    else the one whose range ends last before the context. An entry that does not fit the call (a larger page
    table may need more scalar memory than what was tuned, say) is passed over with a warning.

    Args:
        key: of the call.
        context: tokens of the longest sequence that the call has room for.
        kind: makes block sizes of an entry's `blocks`.
        check: raises ValueError for block sizes that do not fit the call.
        implementation: whose.

    Returns:
        None if there is no entry that fits, which is logged once per key and context; or no such device.

    Raises:
        ValueError: a table's file is corrupt.
    """
    device = device_here()
    if device is None:
        return None
    for path, entry in _in_order(device, key, context):
        if entry.implementation != implementation:
            continue
        try:
            blocks = kind(**entry.blocks)
        except TypeError as error:
            raise ValueError(f"{path}: {dict(entry.blocks)} of {key}: {error}") from error
        try:
            check(blocks)
        except ValueError as error:
            _log_once(logging.WARNING, f"{path}: not for a call with {key}, {context=}: {error}")
            continue
        return blocks
    _log_once(logging.INFO, f"{device}: no tuned block sizes, a heuristic chooses them for {key}, {context=}")
    return None


def log_untuned(key: Key, context: int, what: str) -> None:
    """Logs once that the tables hold nothing for a call of a kind, if the device has one.

    Args:
        key, context: as of `tuned_blocks`.
        what: sets the call apart, like "4 queries per sequence".
    """
    if (device := device_here()) is not None:
        message = f"{device}: no tuned block sizes for {what}, a heuristic chooses them for {key}, {context=}"
        _log_once(logging.INFO, message)


def _in_order(device: str, key: Key, context: int) -> list[tuple[Path, Entry]]:
    """The entries for a call, the best one first."""
    paths = (user_table_path(device), table_path(device))
    known = [(path, entry) for path in paths for entry in _entries(path) if entry.key == key]
    holding = [(path, entry) for path, entry in known if entry.more_than < context <= entry.up_to]
    shorter = [(path, entry) for path, entry in known if entry.up_to < context]
    return holding + sorted(shorter, key=lambda found: -found[1].up_to)


def _entries(path: Path) -> tuple[Entry, ...]:
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return ()
    return _read(path, changed)


@cache
def _read(path: Path, changed: int) -> tuple[Entry, ...]:  # noqa: ARG001  (a key of the cache)
    return read_table(path)


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)
