# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Paged decode attention on a GPU, in Triton through Pallas.

The context of a batch is cut into parts of equal length, about as many as the GPU runs programs at a time,
and a program takes one part of one sequence for one KV head, with all query heads that read it. So one long
sequence fills the chip as many short ones do (flash decoding). A second kernel merges a sequence's parts by
their log-sum-exp. Where the parts lie follows from the lengths, on the device: nothing waits for the host.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ..block_sizes import Key
from ..blockwise import LOG2_E, MASKED
from ..gpu.attend import Cache, Geometry, attend_range, flat_cache, padded_rows
from ..gpu.blocks import TritonDecodeBlocks, chosen_decode_blocks
from ..gpu.launch import call
from ..kv_pages import KVPages


class Parts(NamedTuple):
    """How the batch's context is cut up, all int32.

    Attributes:
        sequence, first, end: [num_parts], whose it is and which positions; unused parts begin and end at 0.
        starts: [num_seqs + 1], the parts of sequence i are starts[i] to starts[i + 1].
    """

    sequence: Array
    first: Array
    end: Array
    starts: Array


def paged_decode_attention(
    queries: Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    *,
    block_sizes: TritonDecodeBlocks | None = None,
    **options: Any,
) -> tuple[
    Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    Float[Array, "num_seqs num_queries num_q_heads"],
]:
    """As `vsurge.kernels.paged_decode_attention`; output and log-sum-exp in float32."""
    blocks = block_sizes or chosen_decode_blocks(
        Key.of("decode", queries, kv_pages), page_table.shape[1] * kv_pages.page_size
    )
    blocks.check()
    return cast(
        "tuple[Array, Array]", attend(queries, kv_pages, kv_lens, page_table, blocks=blocks, **options)
    )


@partial(jax.jit, static_argnames=("blocks", "scale", "sliding_window", "soft_cap"))
def attend(
    queries: Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    *,
    blocks: TritonDecodeBlocks,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
) -> tuple[
    Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    Float[Array, "num_seqs num_queries num_q_heads"],
]:
    """`paged_decode_attention` with given block sizes."""
    num_seqs, num_queries, num_q_heads, head_dim = queries.shape
    heads = kv_pages.num_kv_heads
    if num_seqs == 0:
        return jnp.zeros(queries.shape, jnp.float32), jnp.zeros(queries.shape[:3], jnp.float32)
    group = num_q_heads // heads
    geometry = Geometry.of(
        queries, kv_pages, blocks.kv_tokens, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap
    )
    most = max(1, blocks.programs // heads)
    parts = cut(kv_lens, num_queries, sliding_window, most=most, block=blocks.kv_tokens)
    rows = by_kv_head(queries, heads).astype(geometry.product_dtype)
    cache = flat_cache(kv_pages)
    num_parts, num_rows = parts.sequence.shape[0], num_queries * group
    launch: dict[str, Any] = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    partial_outputs = call(
        partial(_attend_part, geometry=geometry, group=group, has_scales=len(cache) > 1),
        (parts.sequence, parts.first, parts.end, kv_lens, page_table, rows, *cache),
        (
            jax.ShapeDtypeStruct((num_parts, heads, num_rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, heads, num_rows), jnp.float32),
        ),
        name="paged_decode_attention",
        grid=(num_parts, heads),
        **launch,
    )
    of_rows = jnp.full((heads, group), -jnp.inf) if sinks is None else sinks.reshape(heads, group)
    of_rows = jnp.tile(of_rows.astype(jnp.float32), (1, num_queries))
    output, log_sum_exp = call(
        partial(_merge_parts, group=group, num_queries=num_queries),
        (parts.starts, kv_lens, of_rows, *partial_outputs),
        (
            jax.ShapeDtypeStruct((num_seqs, heads, num_rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_seqs, heads, num_rows), jnp.float32),
        ),
        name="merge_parts",
        grid=(num_seqs, heads),
        **launch,
    )
    return by_q_head(output, num_queries), by_q_head(log_sum_exp, num_queries)


def by_kv_head(
    queries: Float[Array, "num_seqs num_queries num_q_heads head_dim"], num_kv_heads: int
) -> Float[Array, "num_seqs num_kv_heads rows head_dim"]:
    """A KV head's rows: its query heads of the first token, then those of the second, and so on."""
    num_seqs, num_queries, num_q_heads, head_dim = queries.shape
    rows = queries.reshape(num_seqs, num_queries, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    return rows.swapaxes(1, 2).reshape(num_seqs, num_kv_heads, -1, head_dim)


def by_q_head(rows: Array, num_queries: int) -> Array:
    """The inverse: [num_seqs, num_kv_heads, rows, ...] -> [num_seqs, num_queries, num_q_heads, ...]."""
    num_seqs, heads, _, *rest = rows.shape
    split = rows.reshape(num_seqs, heads, num_queries, -1, *rest).swapaxes(1, 2)
    return split.reshape(num_seqs, num_queries, -1, *rest)


def cut(
    kv_lens: Int[Array, " num_seqs"], num_queries: int, window: int | None, *, most: int, block: int
) -> Parts:
    """Parts of equal length, whole blocks, `most` of them or less, and as many more as there are sequences.

    Of a sequence without tokens there is none, of a window what its queries see of the context.
    """
    seen_from = jnp.zeros_like(kv_lens)
    if window is not None:
        seen_from = jnp.maximum(kv_lens - num_queries - window + 1, 0)
    seen_from = seen_from // block * block
    tokens = kv_lens - seen_from
    size = -(-jnp.sum(tokens) // (most * block)) * block
    size = jnp.maximum(size, block)
    until = jnp.cumsum(-(-tokens // size)).astype(jnp.int32)
    starts = jnp.pad(until, (1, 0))
    part = jnp.arange(most + kv_lens.shape[0], dtype=jnp.int32)
    # by comparing all: a search has a loop, which XLA leaves out of a step's command buffers (CUDA graphs)
    found = jnp.searchsorted(until, part, side="right", method="compare_all")
    sequence = jnp.minimum(found, kv_lens.shape[0] - 1)
    first = seen_from[sequence] + (part - starts[sequence]) * size
    end = jnp.minimum(first + size, kv_lens[sequence])
    used = part < until[-1]
    return Parts(sequence.astype(jnp.int32), jnp.where(used, first, 0), jnp.where(used, end, 0), starts)


def _attend_part(
    sequence_ref: Any,  # [num_parts]
    first_ref: Any,  # [num_parts]
    end_ref: Any,  # [num_parts]
    kv_lens_ref: Any,  # [num_seqs]
    table_ref: Any,  # [num_seqs, pages_per_seq]
    queries_ref: Any,  # [num_seqs, num_kv_heads, num_rows, head_dim]
    data_ref: Any,  # [cache rows, head_dim]
    *rest: Any,  # scales [cache rows] if any; output and log-sum-exp to base 2 of the parts
    geometry: Geometry,
    group: int,
    has_scales: bool,
) -> None:
    scales_ref = rest[0] if has_scales else None
    output_ref, log_sum_exp_ref = rest[-2:]
    part, head = pl.program_id(0), pl.program_id(1)
    num_rows, head_dim = queries_ref.shape[2:]
    padded = padded_rows(num_rows)
    row, column = (jnp.arange(size, dtype=jnp.int32) for size in (padded, head_dim))
    first, end = first_ref[part], end_ref[part]

    @pl.when(end > first)
    def _() -> None:
        sequence = sequence_ref[part]
        used = row < num_rows
        in_use = jnp.broadcast_to(used[:, None], (padded, head_dim))
        queries = plgpu.load(
            queries_ref.at[sequence, head, row[:, None], column[None, :]], mask=in_use, other=0
        )
        # rows that are not used see as much as the first, so that no block needs masks for them
        positions = kv_lens_ref[sequence] - num_rows // group + jnp.where(used, row // group, 0)
        softmax = attend_range(
            geometry, Cache(data_ref, scales_ref, table_ref), queries, positions,
            sequence, head, first, end,
        )  # fmt: skip
        # a query that sees nothing of this part has seen MASKED scores alone, and no weight later
        output = softmax.weighted / softmax.total[:, None]
        plgpu.store(output_ref.at[part, head, row[:, None], column[None, :]], output, mask=in_use)
        log_sum_exp = softmax.highest + jnp.log2(softmax.total)
        plgpu.store(log_sum_exp_ref.at[part, head, row], log_sum_exp, mask=used)


def _merge_parts(
    starts_ref: Any,  # [num_seqs + 1]
    kv_lens_ref: Any,  # [num_seqs]
    sinks_ref: Any,  # [num_kv_heads, num_rows], -inf for none
    outputs_ref: Any,  # [num_parts, num_kv_heads, num_rows, head_dim]
    log_sum_exps_ref: Any,  # [num_parts, num_kv_heads, num_rows], to base 2
    output_ref: Any,  # [num_seqs, num_kv_heads, num_rows, head_dim]
    log_sum_exp_ref: Any,  # [num_seqs, num_kv_heads, num_rows], natural
    *,
    group: int,
    num_queries: int,
) -> None:
    sequence, head = pl.program_id(0), pl.program_id(1)
    num_rows, head_dim = outputs_ref.shape[2:]
    padded = padded_rows(num_rows)
    row, column = (jnp.arange(size, dtype=jnp.int32) for size in (padded, head_dim))
    used = row < num_rows
    in_use = jnp.broadcast_to(used[:, None], (padded, head_dim))
    sinks = plgpu.load(sinks_ref.at[head, row], mask=used, other=MASKED) * LOG2_E
    highest = jnp.maximum(sinks, MASKED)
    total = jnp.exp2(sinks - highest)

    def merge(part: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, weighted = sums
        found = plgpu.load(log_sum_exps_ref.at[part, head, row], mask=used, other=MASKED)
        output = plgpu.load(outputs_ref.at[part, head, row[:, None], column[None, :]], mask=in_use, other=0)
        new = jnp.maximum(highest, found)
        keep, weight = jnp.exp2(highest - new), jnp.exp2(found - new)
        return new, total * keep + weight, weighted * keep[:, None] + output * weight[:, None]

    sums = highest, total, jnp.zeros((padded, head_dim), jnp.float32)
    highest, total, weighted = cast(
        "tuple[Array, Array, Array]",
        lax.fori_loop(starts_ref[sequence], starts_ref[sequence + 1], merge, sums),
    )
    sees_some = kv_lens_ref[sequence] - num_queries + row // group >= 0
    total = jnp.where(sees_some, total, 1.0)
    output = jnp.where(sees_some[:, None], weighted / total[:, None], 0.0)
    plgpu.store(output_ref.at[sequence, head, row[:, None], column[None, :]], output, mask=in_use)
    log_sum_exp = jnp.where(sees_some, (highest + jnp.log2(total)) / LOG2_E, -jnp.inf)
    plgpu.store(log_sum_exp_ref.at[sequence, head, row], log_sum_exp, mask=used)
