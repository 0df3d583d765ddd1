"""How the kernels for TPU compute, and what they refuse before anything is traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vsurge.kernels import (
    DecodeBlocks,
    RaggedBlocks,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)
from vsurge.kernels.decode import blocks as decode_blocks
from vsurge.kernels.decode.rows import seq_bytes
from vsurge.kernels.ragged.blocks import Sizes, default_blocks
from vsurge.kernels.ragged.heads import Heads
from vsurge.kernels.ragged.query_blocks import cut_queries, most_blocks
from vsurge.kernels.tpu.shapes import padded
from vsurge.kernels.tpu.units import SMEM_BYTES, SMEM_TILE, TABLES, Units, most_seqs
from vsurge.kernels.tuning import Call
from vsurge.kernels.tuning.compiler import trace_for

from .geometries import HEADS
from .jaxprs import equations

BLOCKS: dict[str, Any] = {"decode": DecodeBlocks(128), "ragged": RaggedBlocks(16, 128)}


MUCH = r"groups of \d+ sequences \(lanes=2 x depth=\d\) .* bytes of scalar memory, which has 1048576"


def attend(kernel: str, query_dtype: str, cache_dtype: str, page_size: int = 16, **options: Any) -> Any:
    cache = empty_kv_pages(16, page_size, 2, 64, cache_dtype)
    queries = jnp.ones((5, 4, 64), query_dtype)
    lens, table = jnp.ones((5,), jnp.int32), jnp.ones((5, 8), jnp.int32)
    options |= {"implementation": "mosaic_tpu", "scale": 1.0}
    if kernel == "decode":
        return paged_decode_attention(queries, cache, lens, table, **options)
    starts, one = jnp.arange(6, dtype=jnp.int32), jnp.ones((1,), jnp.int32)
    return ragged_paged_attention(queries, cache, lens, table, starts, one, **options)


def products(kernel: str, query_dtype: str, cache_dtype: str) -> list[Any]:
    traced = jax.make_jaxpr(lambda: attend(kernel, query_dtype, cache_dtype, block_sizes=BLOCKS[kernel]))()
    found = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    assert len(found) >= 4  # of queries with keys and of weights with values, masked and not
    return found


@pytest.mark.parametrize("kernel", BLOCKS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")], ids=str)
def test_float32_products_are_at_the_highest_precision(kernel: str, dtypes: tuple[str, str]) -> None:
    """Which the interpreter would not show: it computes exactly, a TPU by default in one bfloat16 pass."""
    for dot in products(kernel, *dtypes):
        assert {v.aval.dtype for v in dot.invars} == {jnp.dtype("float32")}
        assert set(dot.params["precision"]) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("kernel", BLOCKS)
def test_bfloat16_products_are_summed_in_float32(kernel: str) -> None:
    for dot in products(kernel, "bfloat16", "bfloat16"):
        assert {v.aval.dtype for v in dot.invars} == {jnp.dtype("bfloat16")}
        assert dot.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(
    ("kernel", "blocks", "message"),
    [
        ("decode", DecodeBlocks(100), r"kv_tokens=100 must be a multiple of page_size=16 and of 128"),
        ("decode", DecodeBlocks(128, depth=1), r"depth=1 must be at least 2"),
        ("decode", DecodeBlocks(128, lanes=0), r"lanes=0 must be at least 1"),
        (
            "decode",
            DecodeBlocks(2**20),
            r"needs \d+ bytes of vector memory \(\d+ of them for the cache\), which has",
        ),
        ("ragged", RaggedBlocks(24, 128), r"q_tokens=24 must be a power of two, at least 16"),
        ("ragged", RaggedBlocks(16, 0), r"kv_tokens=0 must be a multiple of page_size=16 and of 128"),
        ("ragged", RaggedBlocks(16, 128, 9), r"depth=9 must lie in 2\.\.8"),
        ("ragged", RaggedBlocks(2**15, 128), r"holds \d+ bytes in vector memory, which has \d+"),
    ],
    ids=str,
)
def test_block_sizes_are_refused(kernel: str, blocks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(kernel, "float32", "float32", block_sizes=blocks)


def test_what_sequences_take_of_vector_memory_counts_for_block_sizes() -> None:
    """The cache's 2^27 bytes are all of v6e's, and queries, outputs and softmaxes come on top."""
    call = Call(kernel="decode", num_q_heads=32, num_kv_heads=8, block_sizes=DecodeBlocks(1024, 1, 32))
    with pytest.raises(ValueError, match=r"needs 138117120 .* \(134217728 of them .* which has 134217728"):
        trace_for("v6e", call.function(), *call.arguments())
    trace_for("v6e", replace(call, block_sizes=DecodeBlocks(1024, 1, 24)).function(), *call.arguments())


def test_scalar_memory_bounds_the_sequences_of_a_group() -> None:
    """A long page table's rows, of three groups, next to the lengths."""
    call = Call(kernel="decode", num_q_heads=8, num_kv_heads=1, max_context=2**17, max_seqs=256, page_size=16)
    most = most_seqs(call.pages_per_seq, call.max_seqs)
    assert most == 8
    few, many = (replace(call, block_sizes=DecodeBlocks(128, lanes=2, depth=depth)) for depth in (4, 5))
    trace_for("v6e", few.function(), *few.arguments())
    with pytest.raises(ValueError, match=MUCH):
        trace_for("v6e", many.function(), *many.arguments())


@pytest.mark.parametrize("num_groups", [1, 2**10])
def test_units_that_need_more_scalar_memory_than_there_is_are_refused_with_the_bytes(num_groups: int) -> None:
    units = Units(8, num_groups, 8192, 2, 8, 16, 4, None)
    table = 4 * (TABLES * 8 * 8192 + 8)
    lengths = 4 * padded(8 * num_groups, SMEM_TILE)
    assert table + lengths <= SMEM_BYTES
    units.check()
    wider = replace(units, table_row=8192 + 1024 * 3)
    with pytest.raises(ValueError, match=MUCH) as refused:
        wider.check()
    needed = table + lengths + 4 * TABLES * 8 * 3 * 1024
    assert f"up to {8192 + 3072} pages need {needed} bytes" in str(refused.value)
    with pytest.raises(ValueError, match=MUCH):
        replace(units, num_groups=2**15).check()  # of lengths


@pytest.mark.parametrize("kernel", BLOCKS)
def test_pages_that_are_no_whole_tiles_are_refused(kernel: str) -> None:
    with pytest.raises(ValueError, match="page_size=12, must be a multiple of 8 on a TPU"):
        attend(kernel, "float32", "float32", page_size=12)


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(("kernel", "other"), [("decode", "ragged"), ("ragged", "decode")])
def test_block_sizes_of_another_kernel_are_refused(kernel: str, other: str) -> None:
    with pytest.raises(TypeError, match=f"must be a {type(BLOCKS[kernel]).__name__}"):
        attend(kernel, "float32", "float32", block_sizes=BLOCKS[other])


@pytest.mark.parametrize("vmem_bytes", [2**24, 2**26, 2**27])
@pytest.mark.parametrize("heads", [(64, 8), (32, 8), (16, 8), (8, 2), (8, 1), (64, 1)], ids=str)
def test_default_block_sizes_fit_and_serve_the_context(heads: tuple[int, int], vmem_bytes: int) -> None:
    token_bytes = 2 * heads[1] * 128 * 2
    sizes = Sizes(*heads, 128, 64, 2, token_bytes, return_lse=False)
    blocks = default_blocks(sizes, pages_per_seq=100, vmem_bytes=vmem_bytes)
    blocks.check(sizes, vmem_bytes)
    assert blocks.scratch_bytes(sizes) + blocks.step_bytes(sizes) <= vmem_bytes * 3 // 4
    assert default_blocks(sizes, pages_per_seq=2, vmem_bytes=vmem_bytes).kv_tokens == 128


@pytest.mark.parametrize("num_queries", [1, 4, 8])
@pytest.mark.parametrize("vmem_bytes", [2**24, 2**25, 2**26, 2**27])
def test_default_block_sizes_of_decoding_fit_every_shard(vmem_bytes: int, num_queries: int) -> None:
    """With a cache write of one token, whose rows and tiles take room as well."""
    for num_q_heads, num_kv_heads in HEADS:
        token_bytes, written = 2 * num_kv_heads * 128 * 2, 0
        each = seq_bytes(num_queries * num_q_heads, 128, 2)
        if num_queries == 1:
            each, written = each + 2 * max(token_bytes, 1024), 8 * 16 * token_bytes
        sizes = {"page_size": 64, "token_bytes": token_bytes, "seq_bytes": each}
        blocks = decode_blocks.default_blocks(
            **sizes,
            num_kv_heads=num_kv_heads,
            pages_per_seq=128,
            most_seqs=64,
            vmem_bytes=vmem_bytes if num_queries == 1 else vmem_bytes * 3 // 4,
        )
        blocks.check(**sizes, vmem_bytes=vmem_bytes - written, num_queries=num_queries)
        assert blocks.scratch_bytes(token_bytes, each, num_queries) + written <= vmem_bytes


def test_queries_are_cut_at_the_ends_of_sequences_and_at_multiples_of_a_block() -> None:
    new, lens, starts = (
        jnp.asarray(a, jnp.int32) for a in ([0, 33, 16, 0, 5], [9, 40, 16, 0, 0], [0, 0, 33, 49, 49])
    )
    blocks, sequences = cut_queries(new, lens, starts, 16, 8)
    assert blocks.used.tolist() == [5]
    assert blocks.counts.tolist() == [9, 16, 8, 16, 5, 0, 0, 0]
    assert blocks.starts.tolist() == [0, 9, 25, 33, 49, 0, 0, 0]
    assert blocks.kv_lens.tolist() == [16, 32, 40, 16, 0, 0, 0, 0]
    assert sequences.tolist()[:5] == [1, 1, 1, 2, 4]


@pytest.mark.parametrize("place", range(16))
def test_there_are_no_more_blocks_than_most_blocks(place: int) -> None:
    new = jnp.asarray([2, 17, 18, 3], jnp.int32)
    blocks, _ = cut_queries(new, new + place, jnp.asarray([0, 2, 19, 37, 40], jnp.int32), 16, 20)
    assert blocks.used[0] <= most_blocks(40, 4, 16)
    assert int(blocks.counts.sum()) == 40


@pytest.mark.parametrize("packed", [1, 2])
def test_a_column_holds_the_token_that_it_says(packed: int) -> None:
    heads = Heads(num_kv_heads=3, group=4, q_tokens=16, packed=packed)
    dtype = jnp.bfloat16 if packed == 2 else jnp.float32
    rows = jnp.arange(16.0 * 12).reshape(16, 12, 1) * jnp.ones((1, 1, 128))

    def kernel(rows: Any, columns: Any, back: Any, words: Any) -> None:
        heads.take(rows, words)
        everything = slice(0, heads.columns)
        for head in range(3):
            columns[head] = heads.columns_of(head, everything, words)
        heads.put(lambda head, part: columns[head, part], words, back)

    columns, back = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((3, 64, 128), dtype), jax.ShapeDtypeStruct(rows.shape, dtype)],
        scratch_shapes=[heads.scratch(128)],
        interpret=pltpu.InterpretParams(),
    )(rows.astype(dtype))
    np.testing.assert_array_equal(back.astype(jnp.float32), rows)
    numbers = np.asarray(columns[:, :, 0].astype(jnp.int32))
    np.testing.assert_array_equal(numbers // 12, np.tile(heads.token(jnp.arange(64)), (3, 1)))
    by_head = np.asarray(heads.by_column(jnp.arange(12)))[:, 0]
    np.testing.assert_array_equal(numbers % 12, by_head)
