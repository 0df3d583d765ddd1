"""Arguments of `generate` that are for all prompts, or one per prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .checks import as_integer, as_number
from .sampling_params import SamplingParams

MAX_PRIORITY = 2**31 - 1  # to both sides of 0


def params_of(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    count: int,
    default: Callable[[], SamplingParams],
) -> list[SamplingParams]:
    """Sampling parameters of each of `count` prompts; `default()` where there are none."""
    if sampling_params is None:
        return [default()] * count
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if not isinstance(sampling_params, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"sampling_params={sampling_params!r}: must be a SamplingParams or a list of them")
    listed = list(sampling_params)
    if len(listed) != count:
        raise ValueError(f"sampling_params: {len(listed)} of them for {count} prompts; give one, or one each")
    for params in listed:
        if not isinstance(params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"sampling_params: {params!r} is no SamplingParams")
    return listed


def priorities_of(priority: int | Sequence[int], count: int) -> list[int]:
    """The priority of each of `count` prompts."""
    if not isinstance(priority, Sequence):
        return [as_integer("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)] * count
    if len(priority) != count:
        raise ValueError(f"priority: {len(priority)} of them for {count} prompts; give one, or one each")
    return [
        as_integer(f"priority[{i}]", value, -MAX_PRIORITY, MAX_PRIORITY) for i, value in enumerate(priority)
    ]


def timeouts_of(
    timeout_s: float | int | Sequence[float | int | None] | None, count: int
) -> list[float | None]:
    """The timeout of each of `count` prompts, seconds; None for none."""
    if timeout_s is None:
        return [None] * count
    if isinstance(timeout_s, str) or not isinstance(timeout_s, Sequence):
        return [as_number("timeout_s", timeout_s, 0.0, math.inf, low_open=True)] * count
    if len(timeout_s) != count:
        raise ValueError(f"timeout_s: {len(timeout_s)} of them for {count} prompts; give one, or one each")
    return [
        None if value is None else as_number(f"timeout_s[{i}]", value, 0.0, math.inf, low_open=True)
        for i, value in enumerate(timeout_s)
    ]
