"""What the kernels are run on, and the one comparison with the oracle that the tests here use."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import Implementation, paged_decode_attention, ragged_paged_attention
from vsurge.kernels.decode import reference as decode_reference
from vsurge.kernels.ragged import reference as ragged_reference

from .batches import DecodeBatch, RaggedBatch, Setup

# What is compared with the reference on this machine. An implementation for another device adds its name.
INTERPRETED: tuple[Implementation, ...] = ("mosaic_tpu", "triton")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", *INTERPRETED)

TOLERANCES = {
    "float32": 1e-5,
    "bfloat16": 8e-3,
}  # of an output row, relative to its norm; by the queries' dtype
LSE_TOLERANCE = 1e-5  # relative, or absolute below 1: scores are float32 whatever the inputs are
ROUNDED_LSE_TOLERANCE = 2.0**-9  # where weights are summed that were rounded to bfloat16


OPTIONS: dict[str, dict[str, Any]] = {  # KV blocks have 128 tokens
    "window of 1": {"sliding_window": 1},
    "window of 7": {"sliding_window": 7},
    "window of a block": {"sliding_window": 128},
    "window beyond everything": {"sliding_window": 5000},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 100, "soft_cap": 2.0, "sinks": True},
}

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Interpreters of kernels are slow: what other tests show as well they run with the slow tests only.
each_implementation_slowly = pytest.mark.parametrize(
    "implementation", ["xla", *(pytest.param(name, marks=pytest.mark.slow) for name in INTERPRETED)]
)


def every_option() -> list[Any]:
    """Implementation, dtype and entry of OPTIONS; what is interpreted runs each alone with the slow tests."""
    cases = [
        (implementation, dtype, options)
        for implementation in IMPLEMENTATIONS
        for dtype, options in [*(("float32", options) for options in OPTIONS), ("bfloat16", "all")]
    ]
    return [
        pytest.param(*case, marks=pytest.mark.slow if case[0] in INTERPRETED and case[1] == "float32" else ())
        for case in cases
    ]


DTYPES = [  # of queries and cache
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("float32", "float8_e4m3fn"),
]
SWEEP = [
    Setup(num_kv_heads * group, num_kv_heads, head_dim, page_size, *dtypes)
    for (num_kv_heads, group), head_dim, page_size, dtypes in itertools.product(
        [(2, 1), (2, 2), (1, 4), (1, 8)], [64, 128], [16, 64, 256], DTYPES
    )
]
QUANTIZED = (
    Setup(page_size=16, query_dtype="bfloat16", cache_dtype="int8"),
    Setup(num_q_heads=8, num_kv_heads=1, page_size=256, query_dtype="float32", cache_dtype="int8"),
    Setup(num_q_heads=3, num_kv_heads=3, page_size=64, query_dtype="float32", cache_dtype="float8_e4m3fn"),
    Setup(num_q_heads=4, num_kv_heads=1, page_size=32, query_dtype="bfloat16", cache_dtype="float8_e4m3fn"),
)

# Heads twice as wide as a register's row, or half of it; groups of 5 query heads (14B) and of 16 (235B).
GEOMETRIES = (
    Setup(num_q_heads=5, num_kv_heads=1, head_dim=256, page_size=32),
    Setup(num_q_heads=32, num_kv_heads=2, head_dim=64, page_size=64),
    Setup(num_q_heads=16, num_kv_heads=1, head_dim=256, query_dtype="bfloat16", cache_dtype="bfloat16"),
    Setup(num_q_heads=10, num_kv_heads=2, head_dim=64, query_dtype="bfloat16", cache_dtype="bfloat16"),
    Setup(num_q_heads=5, num_kv_heads=1, head_dim=256, query_dtype="bfloat16", cache_dtype="int8"),
    Setup(num_q_heads=16, num_kv_heads=1, head_dim=64, page_size=256, cache_dtype="int8"),
)

each_geometry = pytest.mark.parametrize(
    ("implementation", "setup"),
    [
        pytest.param(
            implementation,
            setup,
            marks=pytest.mark.slow if i > (0 if implementation in INTERPRETED else 3) else (),
        )
        for implementation in IMPLEMENTATIONS
        for i, setup in enumerate(GEOMETRIES)
    ],
    ids=str,
)

each_quantized = pytest.mark.parametrize(
    ("implementation", "setup"),
    [
        pytest.param(implementation, setup, marks=() if sampled else pytest.mark.slow)
        for implementation in IMPLEMENTATIONS
        for setup in QUANTIZED
        for sampled in [implementation == "xla" and setup == QUANTIZED[0]]
    ],
    ids=str,
)


def check_ragged(batch: RaggedBatch, implementation: Implementation, **options: Any) -> None:
    """Fails unless output and log-sum-exp of `implementation` are the reference's, within the tolerances."""
    scale = batch.setup.scale
    got = ragged_paged_attention(
        *batch.arguments, scale=scale, return_lse=True, implementation=implementation, **options
    )
    want = ragged_reference.ragged_paged_attention(*batch.arguments, scale=scale, **_all(options))
    in_bfloat16 = batch.setup.query_dtype == "bfloat16" and batch.setup.cache_dtype != "float32"
    rounded = in_bfloat16 and implementation == "mosaic_tpu"
    _check(
        batch.setup,
        [np.asarray(a)[batch.owned] for a in got],
        [a[batch.owned] for a in want],
        lse_tolerance=ROUNDED_LSE_TOLERANCE if rounded else LSE_TOLERANCE,
    )


def check_decode(batch: DecodeBatch, implementation: Implementation, **options: Any) -> None:
    """As `check_ragged`."""
    scale = batch.setup.scale
    got = paged_decode_attention(
        *batch.arguments, scale=scale, return_lse=True, implementation=implementation, **options
    )
    queries, *cache = batch.arguments
    by_query = queries if queries.ndim == 4 else queries[:, None]
    want = decode_reference.paged_decode_attention(by_query, *cache, scale=scale, **_all(options))
    want = (want[0].reshape(queries.shape), want[1].reshape(queries.shape[:-1]))
    _check(batch.setup, [np.asarray(a) for a in got], list(want))


def _all(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options.get(name) for name in ("sliding_window", "soft_cap", "sinks")}


def _check(setup: Setup, got: list[Any], want: list[Any], *, lse_tolerance: float = LSE_TOLERANCE) -> None:
    assert got[0].dtype == setup.query_dtype
    assert got[1].dtype == jnp.float32
    assert_rows_close(got[0], want[0], TOLERANCES[setup.query_dtype])
    assert_lse_close(got[1], want[1], lse_tolerance)


def assert_rows_close(got: Any, want: Any, tolerance: float) -> None:
    """Each row (last axis) differs by at most `tolerance` of its norm; where `want` is zero, not at all."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    difference, norm = np.linalg.norm(got - want, axis=-1), np.linalg.norm(want, axis=-1)
    within = difference <= tolerance * norm  # false for NaN
    worst = np.max(np.divide(difference, norm, out=np.zeros_like(norm), where=norm > 0), initial=0.0)
    assert within.all(), f"{np.sum(~within)} of {within.size} rows differ, by {worst:.1e} > {tolerance:.0e}"


def assert_lse_close(got: Any, want: Any, tolerance: float = LSE_TOLERANCE) -> None:
    """Log-sum-exps agree, -inf included."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], rtol=tolerance, atol=tolerance)


def chosen(options: str, setup: Setup) -> dict[str, Any]:
    """Keywords for a kernel: an entry of OPTIONS, with the sinks themselves."""
    keywords = dict(OPTIONS[options])
    if "sinks" in keywords:
        keywords["sinks"] = sinks_of(setup)
    return keywords


def sinks_of(setup: Setup) -> jax.Array:
    """One sink per query head, of the size of a score."""
    return jnp.linspace(-1.0, 3.0, setup.num_q_heads, dtype=jnp.float32)
