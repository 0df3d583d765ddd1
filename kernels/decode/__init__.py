# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Attention of one or a few new tokens per sequence over a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, overload

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ..append import append_kv
from ..block_sizes import Key
from ..dispatch import Implementation, choose_implementation
from ..gpu.blocks import TritonDecodeBlocks
from ..gpu.refusal import why_refused
from ..kv_pages import KVPages
from ..slots import check_slots_when_run
from ..validation import (
    check_has_blocks,
    check_metadata_when_run,
    check_new_kv,
    check_static,
    check_traces,
)
from . import reference, xla
from .blocks import DecodeBlocks

__all__ = ["DecodeBlocks", "TritonDecodeBlocks", "paged_decode_attention"]


def _mosaic_tpu(*arguments: Any, **options: Any) -> tuple[ArrayLike, ArrayLike]:
    from . import mosaic_tpu  # importing Pallas takes longer than all else here

    return cast("tuple[ArrayLike, ArrayLike]", mosaic_tpu.paged_decode_attention(*arguments, **options))


def _append_and_attend(*arguments: Any, **options: Any) -> tuple[ArrayLike, ArrayLike, KVPages]:
    from . import mosaic_tpu

    return cast("tuple[ArrayLike, ArrayLike, KVPages]", mosaic_tpu.append_and_attend(*arguments, **options))


def _triton(*arguments: Any, **options: Any) -> tuple[ArrayLike, ArrayLike]:
    from . import triton

    return cast("tuple[ArrayLike, ArrayLike]", triton.paged_decode_attention(*arguments, **options))


IMPLEMENTATIONS: dict[Implementation, Callable[..., tuple[ArrayLike, ArrayLike]]] = {
    "mosaic_tpu": _mosaic_tpu,
    "triton": _triton,
    "xla": xla.paged_decode_attention,
    "reference": reference.paged_decode_attention,
}
BLOCKS = {"mosaic_tpu": DecodeBlocks, "triton": TritonDecodeBlocks}
# What writes one new token per sequence itself; with others `append_kv` comes first.
FUSED: dict[Implementation, Callable[..., tuple[ArrayLike, ArrayLike, KVPages]]] = {
    "mosaic_tpu": _append_and_attend,
}

MOST_QUERIES = 8  # of a sequence

Output = Float[Array, "num_seqs *num_queries num_q_heads head_dim"]
LogSumExp = Float[Array, "num_seqs *num_queries num_q_heads"]
NewRows = Float[Array, "num_seqs *num_queries num_kv_heads head_dim"]


@overload
def paged_decode_attention(
    queries: Float[Array, "num_seqs *num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    new_kv: None = None,
    slots: None = None,
    block_sizes: DecodeBlocks | TritonDecodeBlocks | None = None,
    implementation: Implementation | None = None,
    debug: bool = False,
) -> Output | tuple[Output, LogSumExp]: ...


@overload
def paged_decode_attention(
    queries: Float[Array, "num_seqs *num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    new_kv: tuple[NewRows, NewRows],
    slots: Int[Array, " num_seqs *num_queries"],
    block_sizes: DecodeBlocks | TritonDecodeBlocks | None = None,
    implementation: Implementation | None = None,
    debug: bool = False,
) -> tuple[Any, ...]: ...


def paged_decode_attention(
    queries: Float[Array, "num_seqs *num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    new_kv: tuple[NewRows, NewRows] | None = None,
    slots: Int[Array, " num_seqs *num_queries"] | None = None,
    block_sizes: DecodeBlocks | TritonDecodeBlocks | None = None,
    implementation: Implementation | None = None,
    debug: bool = False,
) -> Output | tuple[Output, LogSumExp] | tuple[Output, KVPages] | tuple[Output, LogSumExp, KVPages]:
    """Attention of the last token of each sequence, or of its last few, over a paged cache.

    The new tokens' keys and values are in the cache already (`append_kv`), or they are given as `new_kv` and
    written in the same pass. With several queries per sequence (drafted tokens to be verified, say) query j
    stands at position `kv_len - num_queries + j`, and as everywhere position p sees positions 0 to p.

    What is not finite in a sequence stays in it, but for one case: with an odd number of KV heads and several
    `lanes`, "mosaic_tpu" puts the keys of two sequences side by side in one product, and NaN or infinite keys
    of one make NaN of both.

    Args:
        queries: [num_seqs, num_q_heads, head_dim], bfloat16 or float32, or with up to 8 tokens per sequence
            [num_seqs, num_queries, num_q_heads, head_dim].
        kv_lens: [num_seqs] int32, tokens in the cache, the new ones included; 0 marks padding, whose output
            is zero and whose row of the page table may hold anything. Where there are fewer tokens than
            queries, the first queries stand before the sequence's begin: their output is zero, too, and their
            log-sum-exp -inf.
        page_table: [num_seqs, pages_per_seq] int32; only the first `ceil(kv_len / page_size)` entries of a
            row are used.
        new_kv: keys and values of the new tokens, each [num_seqs(, num_queries), num_kv_heads, head_dim], to
            be cast to the cache's dtype and written to it in place: `kv_pages` is then donated, as by
            `append_kv`. "mosaic_tpu" writes one token per sequence in the kernel unless the cache is
            quantized, others before it. No other sequence of the batch may have a page that is written.
        slots: [num_seqs(, num_queries)] int32, with `new_kv`: where the page table has these tokens,
            `page * page_size + offset`; negative for those that are in the cache already, and for padding.
        block_sizes: `DecodeBlocks` of "mosaic_tpu" or `TritonDecodeBlocks` of "triton"; None for those of the
            tables (`vsurge tune`), or some that fit.
        implementation: "mosaic_tpu" or "triton" (a Pallas kernel for TPUs or NVIDIA GPUs; interpreted
            elsewhere), "xla" (compiled for any device) or "reference" (float64 NumPy, outside jit only); None
            for the best one on this device.
        kv_pages, scale, sliding_window, soft_cap, sinks, return_lse, debug: as in `ragged_paged_attention`.

    Returns:
        The output in the queries' shape and dtype; with `return_lse` then the log-sum-exp in float32, of that
        shape without head_dim; with `new_kv` then the cache.

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed, or there is no such implementation;
            the message names it. Under `jit`, what `debug` finds is a `jax.errors.JaxRuntimeError`.
        TypeError: block_sizes of another type.
    """
    num_seqs = queries.shape[0]
    check_static(
        queries,
        kv_pages,
        {"kv_lens": (kv_lens, (num_seqs,)), "page_table": (page_table, (num_seqs, -1))},
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        most_queries=MOST_QUERIES,
    )
    check_new_kv(kv_pages, new_kv, slots, tokens=queries.shape[:-2])
    if debug:
        starts = jnp.pad(jnp.cumsum((kv_lens > 0).astype(jnp.int32)), (1, 0))
        check_metadata_when_run(
            kv_pages, kv_lens, page_table, starts, jnp.asarray([num_seqs], jnp.int32), num_tokens=num_seqs
        )
        if slots is not None:
            check_slots_when_run(kv_pages, kv_lens, page_table, slots.reshape(num_seqs, -1))
    tuned = Key.of("decode", queries, kv_pages), page_table.shape[1] * kv_pages.page_size
    chosen = choose_implementation(
        "paged_decode_attention", implementation, IMPLEMENTATIONS, tuned=tuned, refused=why_refused(kv_pages)
    )
    options: dict[str, Any] = {
        "scale": scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "sinks": sinks,
    }
    if block_sizes is not None:
        check_has_blocks(chosen, block_sizes, BLOCKS)
        options["block_sizes"] = block_sizes
    by_query = queries if queries.ndim == 4 else queries[:, None]
    metadata = kv_lens, page_table
    written: list[KVPages] = []
    if new_kv is None or slots is None:
        output, log_sum_exp = IMPLEMENTATIONS[chosen](by_query, kv_pages, *metadata, **options)
    else:
        keys, values = (rows.reshape(-1, *rows.shape[-2:]) for rows in new_kv)
        new = keys, values, slots.reshape(-1)
        if chosen in FUSED and by_query.shape[1] == 1 and kv_pages.scales is None:
            output, log_sum_exp, kv_pages = FUSED[chosen](by_query, kv_pages, *metadata, *new, **options)
        else:
            if chosen != "reference":
                check_traces(IMPLEMENTATIONS[chosen], by_query, kv_pages, *metadata, **options)
            kv_pages = append_kv(kv_pages, *new, implementation=chosen)
            output, log_sum_exp = IMPLEMENTATIONS[chosen](by_query, kv_pages, *metadata, **options)
        written.append(kv_pages)
    output = jnp.asarray(output, queries.dtype).reshape(queries.shape)
    log_sum_exp = jnp.asarray(log_sum_exp, jnp.float32).reshape(queries.shape[:-1])
    results: tuple[Any, ...] = (output, log_sum_exp, *written) if return_lse else (output, *written)
    return cast(Any, results if len(results) > 1 else output)
