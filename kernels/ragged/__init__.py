# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Attention of any mix of prompts, chunks of prompts and single new tokens over a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, overload

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ..append import append_kv
from ..block_sizes import Key
from ..dispatch import Implementation, choose_implementation
from ..gpu.blocks import TritonRaggedBlocks
from ..gpu.refusal import why_refused
from ..kv_pages import KVPages
from ..slots import check_prompt_slots_when_run
from ..validation import (
    check_has_blocks,
    check_metadata_when_run,
    check_new_kv,
    check_static,
    check_traces,
)
from . import reference, xla
from .blocks import RaggedBlocks

__all__ = ["RaggedBlocks", "TritonRaggedBlocks", "ragged_paged_attention"]


def _mosaic_tpu(*arguments: Any, **options: Any) -> tuple[ArrayLike, ArrayLike | None]:
    from . import mosaic_tpu  # importing Pallas takes longer than all else here

    return cast(
        "tuple[ArrayLike, ArrayLike | None]", mosaic_tpu.ragged_paged_attention(*arguments, **options)
    )


def _triton(*arguments: Any, **options: Any) -> tuple[ArrayLike, ArrayLike | None]:
    from . import triton

    return cast("tuple[ArrayLike, ArrayLike | None]", triton.ragged_paged_attention(*arguments, **options))


IMPLEMENTATIONS: dict[Implementation, Callable[..., tuple[ArrayLike, ArrayLike | None]]] = {
    "mosaic_tpu": _mosaic_tpu,
    "triton": _triton,
    "xla": xla.ragged_paged_attention,
    "reference": reference.ragged_paged_attention,
}
BLOCKS = {"mosaic_tpu": RaggedBlocks, "triton": TritonRaggedBlocks}

Output = Float[Array, "num_tokens num_q_heads head_dim"]
LogSumExp = Float[Array, "num_tokens num_q_heads"]
NewRows = Float[Array, "num_tokens num_kv_heads head_dim"]


@overload
def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    new_kv: None = None,
    slots: None = None,
    block_sizes: RaggedBlocks | TritonRaggedBlocks | None = None,
    implementation: Implementation | None = None,
    debug: bool = False,
) -> Output | tuple[Output, LogSumExp]: ...


@overload
def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    new_kv: tuple[NewRows, NewRows],
    slots: Int[Array, " num_tokens"],
    block_sizes: RaggedBlocks | TritonRaggedBlocks | None = None,
    implementation: Implementation | None = None,
    debug: bool = False,
) -> tuple[Any, ...]: ...


def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " num_q_heads"] | None = None,
    return_lse: bool = False,
    new_kv: tuple[NewRows, NewRows] | None = None,
    slots: Int[Array, " num_tokens"] | None = None,
    block_sizes: RaggedBlocks | TritonRaggedBlocks | None = None,
    implementation: Implementation | None = None,
    debug: bool = False,
) -> Output | tuple[Output, LogSumExp] | tuple[Output, KVPages] | tuple[Output, LogSumExp, KVPages]:
    """Causal attention of new tokens, concatenated over sequences of any lengths, over a paged cache.

    The new tokens' keys and values are in the cache already (`append_kv`), or they are given as `new_kv`. A
    sequence's last query stands at position `kv_len - 1`, and position p sees positions 0 to p.

    Args:
        queries: [num_tokens, num_q_heads, head_dim], bfloat16 or float32; all sequences' new tokens.
        kv_pages: one layer's cache; num_q_heads is a multiple of its num_kv_heads, and query head h reads
            KV head `h // (num_q_heads // num_kv_heads)`.
        kv_lens: [max_seqs] int32, tokens in the cache, this step's included. 0: nothing to attend to, the
            output is zero.
        page_table: [max_seqs, pages_per_seq] int32; only the first `ceil(kv_len / page_size)` entries of a
            row are used, the others may hold anything.
        query_starts: [max_seqs + 1] int32; sequence i owns `queries[query_starts[i] : query_starts[i + 1]]`.
        num_seqs: [1] int32, rows in use; the rest is padding and may hold anything.
        scale: factor on the scores, usually `head_dim ** -0.5`.
        sliding_window: position p sees only `p - sliding_window + 1 .. p`; None for no window.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`; None for none.
        sinks: [num_q_heads], converted to float32; one more score per head that takes part in the softmax and
            carries no value.
        return_lse: also return the log-sum-exp of the scores (and sink), for merging partial results.
        new_kv, slots: the new tokens' keys and values, and where they go, [num_tokens] int32, negative for
            those that are in the cache already and for padding: `append_kv` writes them first, to the cache,
            which is donated. (Only `paged_decode_attention` has a kernel that does both.)
        block_sizes: `RaggedBlocks` of "mosaic_tpu" or `TritonRaggedBlocks` of "triton"; None for those of the
            tables (`vsurge tune`), or some that fit.
        implementation: "mosaic_tpu" or "triton" (Pallas kernels for TPUs or NVIDIA GPUs; interpreted
            elsewhere), "xla" (compiled for any device) or "reference" (float64 NumPy, outside jit only); None
            for the best one on this device.
        debug: also check the values of the metadata and of `slots` (slow: a round trip to the host).

    Returns:
        The output [num_tokens, num_q_heads, head_dim] in the queries' dtype; with `return_lse` also the
        log-sum-exp [num_tokens, num_q_heads] in float32; of bfloat16 queries and a cache of at most 16 bits
        "mosaic_tpu" gives it within 2^-9, as it sums rounded weights; with `new_kv` then the cache. Rows that
        belong to no sequence are unspecified.

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed, or there is no such implementation;
            the message names it. Under `jit`, what `debug` finds is a `jax.errors.JaxRuntimeError`.
        TypeError: block_sizes of another type.
    """
    max_seqs = kv_lens.shape[0] if kv_lens.ndim else 0
    if max_seqs == 0:
        raise ValueError(f"kv_lens: shape {kv_lens.shape}, expected [max_seqs] with at least one sequence")
    check_static(
        queries,
        kv_pages,
        {
            "kv_lens": (kv_lens, (-1,)),
            "page_table": (page_table, (max_seqs, -1)),
            "query_starts": (query_starts, (max_seqs + 1,)),
            "num_seqs": (num_seqs, (1,)),
        },
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    check_new_kv(kv_pages, new_kv, slots, tokens=queries.shape[:1])
    if debug:
        check_metadata_when_run(
            kv_pages, kv_lens, page_table, query_starts, num_seqs, num_tokens=queries.shape[0]
        )
        if slots is not None:
            check_prompt_slots_when_run(kv_pages, kv_lens, page_table, query_starts, num_seqs, slots)
    tuned = Key.of("ragged", queries, kv_pages), page_table.shape[1] * kv_pages.page_size
    chosen = choose_implementation(
        "ragged_paged_attention", implementation, IMPLEMENTATIONS, tuned=tuned, refused=why_refused(kv_pages)
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
    if chosen == "mosaic_tpu":  # to which it is work of its own
        options["return_lse"] = return_lse
    metadata = kv_lens, page_table, query_starts, num_seqs
    written: list[KVPages] = []
    if new_kv is not None and slots is not None:
        if chosen != "reference":
            check_traces(IMPLEMENTATIONS[chosen], queries, kv_pages, *metadata, **options)
        kv_pages = append_kv(kv_pages, *new_kv, slots, implementation=chosen)
        written.append(kv_pages)
    output, log_sum_exp = IMPLEMENTATIONS[chosen](queries, kv_pages, *metadata, **options)
    results: list[Any] = [jnp.asarray(output, queries.dtype)]
    if log_sum_exp is not None and return_lse:
        results.append(jnp.asarray(log_sum_exp, jnp.float32))
    results += written
    return cast(Any, tuple(results) if len(results) > 1 else results[0])
