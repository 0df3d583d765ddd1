"""The kernels under pytest-benchmark: `python -m pytest benchmarks/kernels --benchmark-json=out.json`.

Each call's bytes and operations, and what they come to a second, are in the report's `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest

from vsurge.benchmarks.kernels.cases import KernelCase, cases
from vsurge.model import PUBLISHED

SHAPE = PUBLISHED["Qwen/Qwen3-0.6B" if jax.default_backend() == "cpu" else "Qwen/Qwen3-8B"]
CASES = list(cases(jax.default_backend(), (SHAPE.num_q_heads, SHAPE.num_kv_heads), thorough=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.implementation}-{case.case}")
def test_kernel(case: KernelCase, measure: Callable[..., None]) -> None:
    count = case.num_calls(jax.default_backend())
    run = case.build(jax.default_backend())
    if not case.whose.startswith("vSurge"):
        try:
            jax.block_until_ready(run())
        except Exception as error:  # noqa: BLE001  (jax's kernels refuse in many ways)
            pytest.skip(f"{case.whose} refuses: {error}")
    measure(
        run,
        calls=count,
        bytes=count * case.num_bytes,
        operations=count * case.operations,
    )
