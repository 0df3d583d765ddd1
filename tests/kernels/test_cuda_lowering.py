"""Every kernel is lowered for CUDA, on a machine without a GPU, at the shapes of the published models."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vsurge.kernels import (
    KVPages,
    append_kv,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)

from .geometries import HEADS

SEQS, TOKENS = 16, 512
CACHES = ("bfloat16", "float32", "int8", "float8_e4m3fn")
SHAPES = [  # all heads, and all widths and page sizes of one
    *itertools.product(HEADS, (128,), (64,), CACHES),
    *itertools.product([(32, 8)], (64, 256), (16, 32, 64, 128, 256), CACHES),
    *itertools.product([(32, 8)], (128,), (16, 32, 128, 256), CACHES),
]
SAMPLE = {
    ((32, 8), 128, 64, "bfloat16"), ((5, 1), 128, 64, "float32"), ((32, 8), 256, 256, "int8"),
    ((8, 1), 128, 64, "float8_e4m3fn"),
}  # fmt: skip


def shaped(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(function: Any, *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "cache"),
    [pytest.param(*shape, marks=() if shape in SAMPLE else pytest.mark.slow) for shape in SHAPES],
)
def test_every_kernel_is_lowered_for_cuda(
    heads: tuple[int, int], head_dim: int, page_size: int, cache: str
) -> None:
    num_q_heads, num_kv_heads = heads
    pages: KVPages = jax.eval_shape(
        partial(empty_kv_pages, 100, page_size, num_kv_heads, head_dim, cache, platform="cuda")
    )
    queries = jnp.float32 if cache == "float32" else jnp.bfloat16
    options: dict[str, Any] = {"scale": head_dim**-0.5, "implementation": "triton", "return_lse": True}
    metadata = shaped(SEQS), shaped(SEQS, 64)
    decode = lowered(
        partial(paged_decode_attention, **options, soft_cap=30.0),
        shaped(SEQS, num_q_heads, head_dim, dtype=queries), pages, *metadata,
    )  # fmt: skip
    ragged = lowered(
        partial(ragged_paged_attention, **options, sliding_window=1024),
        shaped(TOKENS, num_q_heads, head_dim, dtype=queries), pages, *metadata, shaped(SEQS + 1), shaped(1),
    )  # fmt: skip
    rows = shaped(TOKENS, num_kv_heads, head_dim, dtype=queries)
    append = lowered(partial(append_kv, implementation="triton"), pages, rows, rows, shaped(TOKENS))
    found = {"decode": decode, "ragged": ragged, "append": append}
    calls = {name: text.count("__gpu$xla.gpu.triton") for name, text in found.items()}
    assert calls == {"decode": 2, "ragged": 3, "append": 1}


def test_several_queries_and_sinks_are_lowered_too() -> None:
    pages: KVPages = jax.eval_shape(partial(empty_kv_pages, 100, 64, 8, 128, "bfloat16", platform="cuda"))
    function = partial(paged_decode_attention, scale=0.1, implementation="triton")
    queries = shaped(SEQS, 4, 32, 128, dtype=jnp.bfloat16)
    sinks = shaped(32, dtype=jnp.float32)
    text = lowered(
        lambda q, pages, lens, table, sinks: function(q, pages, lens, table, sinks=sinks),
        queries, pages, shaped(SEQS), shaped(SEQS, 64), sinks,
    )  # fmt: skip
    assert text.count("__gpu$xla.gpu.triton") == 2
