"""What a cache in fewer bits does to attention: `python -m vsurge.benchmarks.kv_error`.

Attention with caches of each dtype against the float64 oracle on the unrounded keys and values: the error of
an output row, relative to its norm. Inputs are standard normal; with outliers, two channels of the keys are 8
times as large, and every 13th token's values 50 times. Interpreting the kernels for TPU takes some minutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import (
    SUPPORTED_DTYPES,
    Implementation,
    append_kv,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)
from .machine import describe_machine

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 128, 64
LENGTHS = (1024, 300, 77, 640)
NEW_TOKENS = 32  # of each sequence, where prompts are attended to
RESULTS = Path(__file__).parent / "results" / "kv-cache-error.json"

# Implementation, dtype of the queries and new tokens per sequence. Kernels for TPU are interpreted.
WAYS: dict[str, tuple[Implementation, str, int]] = {
    "float64": ("reference", "float32", 1),
    "xla": ("xla", "bfloat16", 1),
    "mosaic_tpu": ("mosaic_tpu", "bfloat16", 1),
    "mosaic_tpu_prompts": ("mosaic_tpu", "bfloat16", NEW_TOKENS),
}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    rows = [
        {"inputs": inputs, "cache": str(dtype), **errors(dtype, outliers=inputs == "outliers")}
        for inputs in ("normal", "outliers")
        for dtype in SUPPORTED_DTYPES
    ]
    print("error of an output row, median (largest)")
    print(f"{'':26}" + "".join(f"{way:>20}" for way in WAYS))
    for row in rows:
        shown = (f"{row[way]['median']:.2%} ({row[way]['max']:.2%})" for way in WAYS)
        print(f"{row['inputs']:10}{row['cache']:16}" + "".join(f"{each:>20}" for each in shown))
    RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {RESULTS}")


def errors(dtype: np.dtype[Any], *, outliers: bool) -> dict[str, dict[str, float]]:
    """Median and largest error, of each of `WAYS`."""
    rng = np.random.default_rng(0)
    pages_per_seq = -(-max(LENGTHS) // PAGE_SIZE)
    table = rng.permutation(len(LENGTHS) * pages_per_seq).reshape(len(LENGTHS), -1)
    rows = (table.size * PAGE_SIZE, KV_HEADS, HEAD_DIM)
    keys, values = rng.standard_normal((2, *rows), np.float32)
    if outliers:
        keys[:, :, :: HEAD_DIM // 2] *= 8.0
        values[::13] *= 50.0
    all_queries = jnp.asarray(rng.standard_normal((len(LENGTHS), NEW_TOKENS, HEADS, HEAD_DIM)), jnp.bfloat16)

    def attend(cache_dtype: Any, implementation: Implementation, query_dtype: str, count: int) -> np.ndarray:
        empty = empty_kv_pages(table.size, PAGE_SIZE, KV_HEADS, HEAD_DIM, cache_dtype)
        slots = jnp.arange(rows[0], dtype=jnp.int32)
        cache = append_kv(empty, jnp.asarray(keys), jnp.asarray(values), slots)
        queries = all_queries[:, :count].astype(query_dtype).reshape(-1, HEADS, HEAD_DIM)
        metadata = jnp.asarray(LENGTHS, jnp.int32), jnp.asarray(table, jnp.int32)
        options: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "implementation": implementation}
        if count == 1:
            output: Any = paged_decode_attention(queries, cache, *metadata, **options)
        else:
            starts = count * jnp.arange(len(LENGTHS) + 1, dtype=jnp.int32)
            num_seqs = jnp.asarray([len(LENGTHS)], jnp.int32)
            output = ragged_paged_attention(queries, cache, *metadata, starts, num_seqs, **options)
        return np.asarray(output, np.float64)

    exact = np.dtype(np.float32), "reference", "float32"
    wanted = {count: attend(*exact, count) for count in (1, NEW_TOKENS)}

    def compared(implementation: Implementation, query_dtype: str, count: int) -> dict[str, float]:
        got, want = attend(dtype, implementation, query_dtype, count), wanted[count]
        error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
        return {"median": float(np.median(error)), "max": float(error.max())}

    return {name: compared(*way) for name, way in WAYS.items()}


if __name__ == "__main__":
    main()
