# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Ragged paged attention on a GPU, in Triton through Pallas.

A program takes a block of one sequence's new tokens for one KV head: the query heads that read it times as
many tokens as make up `TritonRaggedBlocks.rows`. It walks the sequence's keys up to the last that one of its
rows sees; masks are made for the blocks on the diagonal alone. Sequences with a single new token are decoded
together, with their context cut into parts.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ..block_sizes import Key
from ..blockwise import LOG2_E, MASKED
from ..decode.triton import attend as attend_decodes
from ..gpu.attend import Cache, Geometry, attend_range, flat_cache, padded_rows
from ..gpu.blocks import (
    TritonDecodeBlocks,
    TritonRaggedBlocks,
    chosen_decode_blocks,
    chosen_ragged_blocks,
)
from ..gpu.launch import call
from ..kv_pages import KVPages


class Blocks(NamedTuple):
    """The blocks of new tokens, each [num_blocks] int32; unused ones have no tokens.

    Attributes:
        sequence: whose they are.
        start: of the block among all new tokens.
        num_tokens: in the block.
        position: of its first token in the sequence.
    """

    sequence: Array
    start: Array
    num_tokens: Array
    position: Array


def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    block_sizes: TritonRaggedBlocks | None = None,
    **options: Any,
) -> tuple[Float[Array, "num_tokens num_q_heads head_dim"], Float[Array, "num_tokens num_q_heads"]]:
    """As `vsurge.kernels.ragged_paged_attention`; output and log-sum-exp in float32."""
    context = page_table.shape[1] * kv_pages.page_size
    blocks = block_sizes or chosen_ragged_blocks(Key.of("ragged", queries, kv_pages), context)
    blocks.check()
    decode_blocks = chosen_decode_blocks(Key.of("decode", queries, kv_pages), context)
    metadata = kv_lens, page_table, query_starts, num_seqs
    sizes = {"blocks": blocks, "decode_blocks": decode_blocks}
    return cast("tuple[Array, Array]", _attend(queries, kv_pages, *metadata, **sizes, **options))


@partial(jax.jit, static_argnames=("blocks", "decode_blocks", "scale", "sliding_window", "soft_cap"))
def _attend(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    blocks: TritonRaggedBlocks,
    decode_blocks: TritonDecodeBlocks,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
) -> tuple[Float[Array, "num_tokens num_q_heads head_dim"], Float[Array, "num_tokens num_q_heads"]]:
    """`ragged_paged_attention` with given block sizes."""
    num_tokens, num_q_heads, _ = queries.shape
    group = num_q_heads // kv_pages.num_kv_heads
    in_use = jnp.arange(kv_lens.shape[0], dtype=jnp.int32) < num_seqs
    new_tokens = jnp.where(in_use, query_starts[1:] - query_starts[:-1], 0)
    decodes = new_tokens == 1
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    geometry = Geometry.of(queries, kv_pages, blocks.kv_tokens, **options)
    tokens = max(1, blocks.rows // group)
    cuts = cut(jnp.where(decodes, 0, new_tokens), kv_lens, query_starts, tokens, num_tokens)
    cache = flat_cache(kv_pages)
    of_heads = jnp.full(num_q_heads, -jnp.inf) if sinks is None else sinks
    output, log_sum_exp = call(
        partial(_attend_block, geometry=geometry, group=group, tokens=tokens, has_scales=len(cache) > 1),
        (
            *cuts, page_table, of_heads.astype(jnp.float32), queries.astype(geometry.product_dtype),
            jnp.zeros(queries.shape, jnp.float32), jnp.full(queries.shape[:2], -jnp.inf, jnp.float32), *cache,
        ),
        (
            jax.ShapeDtypeStruct(queries.shape, jnp.float32),
            jax.ShapeDtypeStruct(queries.shape[:2], jnp.float32),
        ),
        name="ragged_paged_attention",
        grid=(cuts.sequence.shape[0], kv_pages.num_kv_heads),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        input_output_aliases={7: 0, 8: 1},  # what padding and decodes have before
    )  # fmt: skip
    row = jnp.minimum(query_starts[:-1], num_tokens - 1)
    decoded = cast(
        "tuple[Array, Array]",
        attend_decodes(
            queries[row][:, None],
            kv_pages,
            jnp.where(decodes, kv_lens, 0),
            page_table,
            blocks=decode_blocks,
            sinks=sinks,
            **options,
        ),
    )
    row = jnp.where(decodes, row, num_tokens)  # outside: the others' are dropped
    output = output.at[row].set(decoded[0][:, 0], mode="drop")
    return output, log_sum_exp.at[row].set(decoded[1][:, 0], mode="drop")


def cut(
    new_tokens: Int[Array, " max_seqs"],
    kv_lens: Int[Array, " max_seqs"],
    query_starts: Int[Array, " max_seqs+1"],
    tokens: int,
    num_tokens: int,
) -> Blocks:
    """Blocks of up to `tokens` of each sequence's new ones; the last of a sequence may have fewer."""
    until = jnp.cumsum(-(-new_tokens // tokens)).astype(jnp.int32)
    block = jnp.arange(num_tokens // tokens + new_tokens.shape[0], dtype=jnp.int32)
    found = jnp.searchsorted(until, block, side="right", method="compare_all")  # as when decoding
    sequence = jnp.minimum(found, new_tokens.shape[0] - 1)
    before = jnp.where(sequence > 0, until[sequence - 1], 0)
    offset = (block - before) * tokens
    left = jnp.where(block < until[-1], new_tokens[sequence] - offset, 0)
    position = kv_lens[sequence] - new_tokens[sequence] + offset
    return Blocks(
        sequence.astype(jnp.int32), query_starts[sequence] + offset, jnp.clip(left, 0, tokens), position
    )


def _attend_block(
    sequence_ref: Any,  # [num_blocks]
    start_ref: Any,  # [num_blocks]
    num_tokens_ref: Any,  # [num_blocks]
    position_ref: Any,  # [num_blocks]
    table_ref: Any,  # [max_seqs, pages_per_seq]
    sinks_ref: Any,  # [num_q_heads], -inf for none
    queries_ref: Any,  # [num_tokens, num_q_heads, head_dim]
    _output_before_ref: Any,
    _log_sum_exp_before_ref: Any,
    data_ref: Any,  # [cache rows, head_dim]
    *rest: Any,  # scales [cache rows] if any; output as queries; log-sum-exp [num_tokens, num_q_heads]
    geometry: Geometry,
    group: int,
    tokens: int,
    has_scales: bool,
) -> None:
    scales_ref = rest[0] if has_scales else None
    output_ref, log_sum_exp_ref = rest[-2:]
    block, head = pl.program_id(0), pl.program_id(1)
    num_tokens = num_tokens_ref[block]

    @pl.when(num_tokens > 0)
    def _() -> None:
        rows, head_dim = padded_rows(tokens * group), queries_ref.shape[2]
        row, column = (jnp.arange(size, dtype=jnp.int32) for size in (rows, head_dim))
        used = row // group < num_tokens
        in_use = jnp.broadcast_to(used[:, None], (rows, head_dim))
        token, q_head = start_ref[block] + row // group, head * group + row % group
        first_position = position_ref[block]
        # rows that are not used see as much as the first, so that no block needs masks for them
        positions = first_position + jnp.where(used, row // group, 0)
        first = jnp.int32(0)
        if geometry.sliding_window is not None:
            first = jnp.maximum(first_position - geometry.sliding_window + 1, 0)
        softmax = attend_range(
            geometry,
            Cache(data_ref, scales_ref, table_ref),
            plgpu.load(
                queries_ref.at[token[:, None], q_head[:, None], column[None, :]], mask=in_use, other=0
            ),
            positions,
            sequence_ref[block],
            head,
            first,
            first_position + num_tokens,
        )
        sinks = plgpu.load(sinks_ref.at[q_head], mask=used, other=MASKED) * LOG2_E
        highest = jnp.maximum(softmax.highest, sinks)
        keep = jnp.exp2(softmax.highest - highest)
        total = softmax.total * keep + jnp.exp2(sinks - highest)
        output = softmax.weighted * (keep / total)[:, None]
        plgpu.store(output_ref.at[token[:, None], q_head[:, None], column[None, :]], output, mask=in_use)
        log_sum_exp = (highest + jnp.log2(total)) / LOG2_E
        plgpu.store(log_sum_exp_ref.at[token, q_head], log_sum_exp, mask=used)
