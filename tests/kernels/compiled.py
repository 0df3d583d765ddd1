"""The kernels through the TPU's compiler, at shapes of one's choice."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vsurge.kernels import (
    KVPages,
    RaggedBlocks,
    append_kv,
    bytes_per_token,
    paged_decode_attention,
    ragged_paged_attention,
)
from vsurge.kernels.kv_pages import scale_tokens
from vsurge.kernels.quantization import is_quantized
from vsurge.kernels.tuning import compile_for

NUM_PAGES = 512


def shape(*sizes: int, dtype: Any = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def cache(num_kv_heads: int, head_dim: int, page_size: int, dtype: Any) -> KVPages:
    """As a TPU keeps it: `empty_kv_pages` knows the device that it runs on."""
    rows = (NUM_PAGES, 2, num_kv_heads, page_size)
    data: Any = shape(*rows, head_dim, dtype=dtype)
    places = scale_tokens(page_size, "tpu")
    scales: Any = shape(*rows[:3], places, dtype="float32") if is_quantized(dtype) else None
    return KVPages(data, scales, jnp.dtype(dtype), page_size)


def query_dtype(cache_dtype: Any) -> Any:
    return "bfloat16" if is_quantized(cache_dtype) else cache_dtype


def compile_decode(
    chip: str,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    page_size: int = 64,
    dtype: Any = "bfloat16",
    *,
    num_seqs: int = 64,
    num_queries: int | None = None,
    context: int = 8192,
    **options: Any,
) -> jax.stages.Compiled:
    several = [] if num_queries is None else [num_queries]
    attend = partial(
        paged_decode_attention, scale=head_dim**-0.5, implementation="mosaic_tpu", return_lse=True, **options
    )
    return compile_for(
        chip,
        attend,
        shape(num_seqs, *several, heads[0], head_dim, dtype=query_dtype(dtype)),
        cache(heads[1], head_dim, page_size, dtype),
        shape(num_seqs),
        shape(num_seqs, -(-context // page_size)),
    )


def compile_fused(
    chip: str,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    page_size: int = 64,
    dtype: Any = "bfloat16",
    *,
    num_seqs: int = 64,
    context: int = 8192,
    **options: Any,
) -> jax.stages.Compiled:
    """Decode attention that writes the cache."""

    def attend(queries: Any, kv_pages: Any, lens: Any, table: Any, rows: Any, slots: Any) -> Any:
        return paged_decode_attention(
            queries,
            kv_pages,
            lens,
            table,
            scale=head_dim**-0.5,
            implementation="mosaic_tpu",
            new_kv=(rows, rows),
            slots=slots,
            **options,
        )

    return compile_for(
        chip,
        attend,
        shape(num_seqs, heads[0], head_dim, dtype=query_dtype(dtype)),
        cache(heads[1], head_dim, page_size, dtype),
        shape(num_seqs),
        shape(num_seqs, -(-context // page_size)),
        shape(num_seqs, heads[1], head_dim, dtype=query_dtype(dtype)),
        shape(num_seqs),
        donate_argnums=(1,),
    )


SMALL = RaggedBlocks(q_tokens=32, kv_tokens=256)  # which compile in seconds


def compile_ragged(
    chip: str,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    page_size: int = 64,
    dtype: Any = "bfloat16",
    *,
    num_seqs: int = 64,
    context: int = 8192,
    block_sizes: RaggedBlocks | None = SMALL,
    **options: Any,
) -> jax.stages.Compiled:
    attend = partial(
        ragged_paged_attention,
        scale=head_dim**-0.5,
        implementation="mosaic_tpu",
        block_sizes=block_sizes,
        **options,
    )
    return compile_for(
        chip,
        attend,
        shape(2048, heads[0], head_dim, dtype=query_dtype(dtype)),
        cache(heads[1], head_dim, page_size, dtype),
        shape(num_seqs),
        shape(num_seqs, -(-context // page_size)),
        shape(num_seqs + 1),
        shape(1),
    )


def compile_append(
    chip: str,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 64,
    dtype: Any = "bfloat16",
    num_tokens: int = 64,
) -> jax.stages.Compiled:
    rows = shape(num_tokens, num_kv_heads, head_dim, dtype=query_dtype(dtype))
    return compile_for(
        chip,
        partial(append_kv, implementation="mosaic_tpu"),
        cache(num_kv_heads, head_dim, page_size, dtype),
        rows,
        rows,
        shape(num_tokens),
        donate_argnums=(0,),
    )


def assert_in_place(program: jax.stages.Compiled, page_size: int = 64, dtype: str = "bfloat16") -> None:
    """The cache, of 8 KV heads, is among what is updated, and nothing of its size is made."""
    memory, num_bytes = program.memory_analysis(), NUM_PAGES * page_size * bytes_per_token(8, 128, dtype)
    assert memory is not None
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < num_bytes // 2
