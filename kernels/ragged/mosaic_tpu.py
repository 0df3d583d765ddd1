# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Ragged paged attention as Pallas kernels for TPU.

Sequences with a single new token go through the decode kernel. The new tokens of all others are cut into
query blocks of `q_tokens`, and what a block sees into units of `kv_tokens` (see `tpu/units.py`), which come
from HBM while earlier ones are computed, across the ends of blocks and sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..block_sizes import Key
from ..blockwise import LOG2_E, MASKED, product_dtype
from ..decode.mosaic_tpu import paged_decode_attention
from ..kv_pages import KVPages
from ..tpu.fetcher import fetcher_scratch, vmem_bytes_per_token
from ..tpu.launch import check_pages, in_hbm, tpu_call, vmem_bytes
from ..tpu.shapes import LANES, SUBLANES, padded
from ..tpu.units import TABLE_TILE, Units
from .blocks import RaggedBlocks, Sizes, tuned_or_default_blocks
from .columns import Attention
from .heads import Heads
from .items import waiting_rows
from .kernel import kernel
from .query_blocks import cut_queries, most_blocks

BLOCKS_PER_GROUP = 8


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "return_lse", "block_sizes"))
def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
    return_lse: bool = True,
    block_sizes: RaggedBlocks | None = None,
) -> tuple[Float[Array, "num_tokens num_q_heads head_dim"], Float[Array, "num_tokens num_q_heads"] | None]:
    """As `vsurge.kernels.ragged_paged_attention`; the log-sum-exp in float32, or None if unwanted.

    Raises:
        ValueError: the pages hold no whole tiles, or the block sizes fit neither cache nor device.
    """
    num_tokens, num_q_heads, head_dim = queries.shape
    max_seqs, pages_per_seq = page_table.shape
    if num_tokens == 0:
        return queries, jnp.zeros((0, num_q_heads), jnp.float32)
    check_pages(kv_pages)
    num_kv_heads, page_size = kv_pages.num_kv_heads, kv_pages.page_size
    sizes = Sizes(
        num_q_heads,
        num_kv_heads,
        head_dim,
        page_size,
        queries.dtype.itemsize,
        vmem_bytes_per_token(kv_pages),
        return_lse,
    )
    blocks = block_sizes or tuned_or_default_blocks(
        Key.of("ragged", queries, kv_pages),
        sizes,
        pages_per_seq=pages_per_seq,
        vmem_bytes=vmem_bytes(),
    )
    blocks.check(sizes, vmem_bytes())
    units = Units(
        seqs=BLOCKS_PER_GROUP,
        num_groups=-(-most_blocks(num_tokens, max_seqs, blocks.q_tokens) // BLOCKS_PER_GROUP),
        table_row=padded(pages_per_seq, TABLE_TILE // math.gcd(TABLE_TILE, BLOCKS_PER_GROUP)),
        lanes=1,
        pages=blocks.kv_tokens // page_size,
        page_size=page_size,
        depth=blocks.depth,
        sliding_window=sliding_window,
        queries=blocks.q_tokens,
    )
    units.check()
    heads = Heads.of(num_kv_heads, num_q_heads // num_kv_heads, blocks.q_tokens, queries.dtype.itemsize)
    attention = Attention(
        heads,
        scale,
        soft_cap,
        sliding_window,
        product_dtype(queries, kv_pages),
    )

    new_tokens = query_starts[1:] - query_starts[:-1]
    new_tokens = jnp.where(jnp.arange(max_seqs, dtype=jnp.int32) < num_seqs, new_tokens, 0)
    decodes = new_tokens == 1
    decode = cast(Callable[..., tuple[Array, Array]], paged_decode_attention)
    decoded, decoded_lse = decode(
        queries.at[jnp.where(decodes, query_starts[:-1], 0)].get(mode="clip")[:, None],
        kv_pages,
        jnp.where(decodes, kv_lens, 0),
        page_table,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    decoded, decoded_lse = decoded[:, 0], decoded_lse[:, 0]
    cut, sequences = cut_queries(
        jnp.where(decodes, 0, new_tokens),
        kv_lens,
        query_starts,
        blocks.q_tokens,
        units.num_groups * units.seqs,
    )
    table = jnp.pad(page_table, ((0, 0), (0, units.table_row - pages_per_seq)))[sequences]
    start = jnp.full(num_q_heads, MASKED) if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    start = heads.by_column(start.astype(jnp.float32))
    lse_shape = (num_tokens if return_lse else 1, num_q_heads, LANES)
    decoded_lse = decoded_lse if return_lse else decoded_lse[:1]
    decoded_lse = jnp.broadcast_to(decoded_lse[:, :, None], (*decoded_lse.shape, LANES))

    nothing = pltpu.VMEM((1, 1, SUBLANES, LANES), jnp.float32)

    def turns(numbers: int, dtype: Any) -> Any:
        return pltpu.VMEM((2, blocks.q_tokens, num_q_heads, numbers), dtype)

    def by_head(*sizes: int) -> Any:
        return pltpu.VMEM((num_kv_heads, *sizes), jnp.float32)

    output, log_sum_exp = tpu_call(
        partial(kernel, attention, units, jax.eval_shape(lambda: kv_pages), return_lse),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(units.num_groups,),
            in_specs=[
                *[pl.BlockSpec(memory_space=pl.ANY)] * 3,
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pl.ANY),
                in_hbm(kv_pages),
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[
                turns(head_dim, queries.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                heads.scratch(head_dim),
                turns(head_dim, queries.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                turns(LANES, jnp.float32) if return_lse else nothing,
                pltpu.SemaphoreType.DMA((2,)),
                replace(heads, packed=1).scratch(LANES) if return_lse else nothing,
                pltpu.VMEM((heads.columns // 2, LANES), jnp.float32) if return_lse else nothing,
                pltpu.SemaphoreType.DMA,
                by_head(1, heads.columns),
                by_head(1, heads.columns),
                by_head(head_dim, heads.columns),
                pltpu.VMEM((waiting_rows(blocks.kv_tokens), heads.at_once), jnp.float32),
                *fetcher_scratch(units, kv_pages),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=vmem_bytes()),
        name="ragged_paged_attention",
    )(
        cut.kv_lens,
        cut.starts,
        cut.counts,
        jnp.concatenate([cut.used, num_seqs]),
        jnp.where(decodes, query_starts[:-1], -1),
        queries,
        decoded,
        decoded_lse,
        start,
        table.reshape(-1),
        kv_pages,
    )
    return output, log_sum_exp[:, :, 0] if return_lse else None
