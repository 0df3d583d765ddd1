"""What a cache in fewer bits does to attention: `python -m vsurge.benchmarks.kv_error`.

Decode attention with caches of each dtype against the float64 oracle on the unrounded keys and values: the
error of an output row, relative to its norm. Inputs are standard normal; with outliers, two channels of the
keys are 8 times as large, and every 13th token's values 50 times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import SUPPORTED_DTYPES, append_kv, empty_kv_pages, paged_decode_attention
from .machine import describe_machine

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 128, 64
LENGTHS = (1024, 300, 77, 640)
RESULTS = Path(__file__).parent / "results" / "kv-cache-error.json"


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    rows = [
        {"inputs": inputs, "cache": str(dtype), **errors(dtype, outliers=inputs == "outliers")}
        for inputs in ("normal", "outliers")
        for dtype in SUPPORTED_DTYPES
    ]
    print("error of an output row, median (largest); products in float64, and as the engine computes")
    for row in rows:
        exact, engine = (f"{row[k]['median']:.2%} ({row[k]['max']:.2%})" for k in ("float64", "bfloat16"))
        print(f"{row['inputs']:10}{row['cache']:16}{exact:>18}{engine:>18}")
    RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {RESULTS}")


def errors(dtype: np.dtype[Any], *, outliers: bool) -> dict[str, dict[str, float]]:
    """Median and largest error, of products in float64 and of bfloat16 queries in `xla`."""
    rng = np.random.default_rng(0)
    pages_per_seq = -(-max(LENGTHS) // PAGE_SIZE)
    table = rng.permutation(len(LENGTHS) * pages_per_seq).reshape(len(LENGTHS), -1)
    rows = (table.size * PAGE_SIZE, KV_HEADS, HEAD_DIM)
    keys, values = rng.standard_normal((2, *rows), np.float32)
    if outliers:
        keys[:, :, :: HEAD_DIM // 2] *= 8.0
        values[::13] *= 50.0
    queries = jnp.asarray(rng.standard_normal((len(LENGTHS), HEADS, HEAD_DIM)), jnp.bfloat16)

    def attend(cache_dtype: Any, implementation: Any, precise: bool) -> np.ndarray:
        empty = empty_kv_pages(table.size, PAGE_SIZE, KV_HEADS, HEAD_DIM, cache_dtype)
        slots = jnp.arange(rows[0], dtype=jnp.int32)
        cache = append_kv(empty, jnp.asarray(keys), jnp.asarray(values), slots)
        output = paged_decode_attention(
            queries.astype(jnp.float32) if precise else queries,
            cache,
            jnp.asarray(LENGTHS, jnp.int32),
            jnp.asarray(table, jnp.int32),
            scale=HEAD_DIM**-0.5,
            implementation=implementation,
        )
        return np.asarray(output, np.float64)

    want = attend(np.dtype(np.float32), "reference", True)

    def compared(got: np.ndarray) -> dict[str, float]:
        error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
        return {"median": float(np.median(error)), "max": float(error.max())}

    return {
        "float64": compared(attend(dtype, "reference", True)),
        "bfloat16": compared(attend(dtype, "xla", False)),
    }


if __name__ == "__main__":
    main()
