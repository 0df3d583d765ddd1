"""Every kernel is lowered for CUDA, on a machine without a GPU, at the shapes of the published models."""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from vsurge.kernels import (
    KVPages,
    append_kv,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)

from .geometries import HEADS

SEQS, TOKENS = 16, 512
# Of queries and cache.
DTYPES = (
    ("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "int8"), ("bfloat16", "float8_e4m3fn"),
)  # fmt: skip
MIXED = (
    ("float32", "bfloat16"), ("float32", "int8"), ("float32", "float8_e4m3fn"), ("bfloat16", "float32"),
)  # fmt: skip
SHAPES = [  # all heads, and all widths and page sizes of one
    *itertools.product(HEADS, (128,), (64,), DTYPES),
    *itertools.product([(32, 8)], (64, 256), (16, 32, 64, 128, 256), DTYPES),
    *itertools.product([(32, 8)], (128,), (16, 32, 128, 256), DTYPES),
    *itertools.product([(32, 8)], (128,), (16, 64), MIXED),
]
SAMPLE = {
    ((32, 8), 128, 64, ("bfloat16", "bfloat16")), ((5, 1), 128, 64, ("float32", "float32")),
    ((32, 8), 256, 256, ("bfloat16", "int8")), ((8, 1), 128, 64, ("bfloat16", "float8_e4m3fn")),
}  # fmt: skip


def shaped(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(function: Any, *arguments: Any) -> str:
    device = AbstractDevice("NVIDIA H200", 132, "gpu")  # from jax 0.11 on Triton's kernels have to know it
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "dtypes"),
    [pytest.param(*shape, marks=() if shape in SAMPLE else pytest.mark.slow) for shape in SHAPES],
)
def test_every_kernel_is_lowered_for_cuda(
    heads: tuple[int, int], head_dim: int, page_size: int, dtypes: tuple[str, str]
) -> None:
    (num_q_heads, num_kv_heads), (queries, cache) = heads, dtypes
    pages: KVPages = jax.eval_shape(
        partial(empty_kv_pages, 100, page_size, num_kv_heads, head_dim, cache, platform="cuda")
    )
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


@pytest.mark.parametrize("kernel", ["decode", "ragged"])
def test_between_the_kernels_there_is_no_loop_which_would_split_a_cuda_graph(kernel: str) -> None:
    function, *arguments = call_of(kernel, cache_of(100 * PAGE_BYTES, "bfloat16"))
    text = lowered(function, *arguments)
    assert "__gpu$xla.gpu.triton" in text
    assert "stablehlo.while" not in text


def test_rows_are_written_into_the_cache_that_is_given() -> None:
    """The kernel's outputs are its operands, of the same layouts; else XLA would copy the cache."""
    for dtype, arrays in (("bfloat16", 1), ("int8", 2)):
        function, *arguments = call_of("append", cache_of(100 * PAGE_BYTES, dtype))
        text = lowered(function, *arguments)
        [call] = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
        aliases = re.findall(r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", call)
        operands = 1 + 2 * arrays  # slots, the new rows and then the cache's arrays
        want = [("" if arrays == 1 else str(i), str(operands - arrays + i)) for i in range(arrays)]
        assert aliases == want
        given, returned = (
            re.search(rf"{which}_layouts = \[(.*?>)\]", call) for which in ("operand", "result")
        )
        assert given
        assert returned
        assert given[1].endswith(returned[1])


PAGE_BYTES = 2 * 8 * 64 * 128


def call_of(kernel: str, cache: KVPages) -> tuple[Any, ...]:
    """A function and its arguments."""
    queries = shaped(SEQS, 32, 128, dtype=jnp.bfloat16)
    rows = shaped(SEQS, 8, 128, dtype=jnp.bfloat16)
    metadata = shaped(SEQS), shaped(SEQS, 64)
    if kernel == "append":
        return partial(append_kv, implementation="triton"), cache, rows, rows, shaped(SEQS)
    if kernel == "decode":
        attend = partial(paged_decode_attention, scale=0.1, implementation="triton")
        return attend, queries, cache, *metadata
    attend = partial(ragged_paged_attention, scale=0.1, implementation="triton")
    return attend, queries, cache, *metadata, shaped(SEQS + 1), shaped(1)


def cache_of(num_bytes: int, dtype: str) -> KVPages:
    make = partial(empty_kv_pages, num_bytes // PAGE_BYTES, 64, 8, 128, dtype, platform="cuda")
    return jax.eval_shape(make)


@pytest.mark.parametrize("kernel", ["decode", "ragged", "append"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_cache_of_bytes_that_offsets_of_32_bits_do_not_reach_is_refused(dtype: str, kernel: str) -> None:
    """Between 2 and 4 GiB a layer, where jax's lowering for Triton counts offsets in 32 bits all the same."""
    for num_bytes in (2**31 + PAGE_BYTES, 2**32):
        function, *arguments = call_of(kernel, cache_of(num_bytes, dtype))
        complaint = (
            f"kv_pages: {num_bytes // PAGE_BYTES} pages of 131072 bytes of {dtype} in a layer, {num_bytes} "
            "bytes, .* reach 2147483648 only; up to 16384 pages or 32769 and more"
        )
        with pytest.raises(ValueError, match=complaint):
            jax.jit(function).trace(*arguments)
    for num_bytes in (2**31, 2**32 + PAGE_BYTES):  # the last offset is 2^31 - 1; they have 64 bits
        function, *arguments = call_of(kernel, cache_of(num_bytes, dtype))
        jax.jit(function).trace(*arguments)
    function, *arguments = call_of(kernel, cache_of(2**32, "bfloat16"))  # half as many numbers
    jax.jit(function).trace(*arguments)


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
