"""Shared by the pytest-benchmark suites: `python -m pytest benchmarks --benchmark-json=out.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """Times a call until its result is there; `counts` (bytes, operations, tokens) go into the report."""

    def run(call: Callable[[], Any], **counts: float) -> None:
        def wait() -> None:
            jax.block_until_ready(call())

        wait()  # compiles
        benchmark.pedantic(wait, rounds=20, warmup_rounds=2)
        seconds = benchmark.stats.stats.median
        for name, count in counts.items():
            benchmark.extra_info[name] = count
            benchmark.extra_info[f"giga_{name}_per_s"] = count / seconds / 1e9

    return run
