# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Ragged paged attention in float64 NumPy: the oracle that every other implementation is held against.

One plain loop per sequence, no blocks, no online softmax, nothing clever.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from ..kv_pages import KEYS, VALUES, KVPages

Float64 = npt.NDArray[np.float64]


def attend(
    queries: Float64,
    keys: Float64,
    values: Float64,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float64 | None,
) -> tuple[Float64, Float64]:
    """Causal attention of one sequence's last `q_len` tokens over all its `kv_len` tokens.

    Args:
        queries: [q_len, num_q_heads, head_dim]; query j stands at position kv_len - q_len + j.
        keys, values: [kv_len, num_kv_heads, head_dim].
        scale, sliding_window, soft_cap, sinks: as `vsurge.kernels.ragged_paged_attention`.

    Returns:
        The attention output [q_len, num_q_heads, head_dim] and its log-sum-exp [q_len, num_q_heads].
    """
    q_len, num_q_heads, _ = queries.shape
    kv_len, num_kv_heads, _ = keys.shape
    output = np.zeros_like(queries)
    log_sum_exp = np.full((q_len, num_q_heads), -np.inf)
    for token in range(q_len):
        position = kv_len - q_len + token
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        for head in range(num_q_heads):
            kv_head = head // (num_q_heads // num_kv_heads)
            scores = scale * keys[first : position + 1, kv_head] @ queries[token, head]
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            terms = scores if sinks is None else np.append(scores, sinks[head])
            highest = terms.max()
            log_sum_exp[token, head] = highest + np.log(np.exp(terms - highest).sum())
            probabilities = np.exp(scores - log_sum_exp[token, head])
            output[token, head] = probabilities @ values[first : position + 1, kv_head]
    return output, log_sum_exp


def read_cache(kv_pages: KVPages) -> tuple[Float64, Float64]:
    """Keys and values of all slots, each [num_pages * page_size, num_kv_heads, head_dim], in float64."""
    rows = np.asarray(kv_pages.data).view(kv_pages.dtype).astype(np.float64)
    if kv_pages.scales is not None:
        rows *= np.asarray(kv_pages.scales, np.float64)[..., : kv_pages.page_size, None]
    by_slot = rows.transpose(1, 0, 3, 2, 4).reshape(2, -1, kv_pages.num_kv_heads, kv_pages.head_dim)
    return by_slot[KEYS], by_slot[VALUES]


def slots_of(page_table_row: npt.NDArray[np.int64], kv_len: int, page_size: int) -> npt.NDArray[np.int64]:
    """The slots of a sequence's tokens, in order."""
    positions = np.arange(kv_len)
    return page_table_row[positions // page_size] * page_size + positions % page_size


def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs_plus_1"],
    num_seqs: Int[Array, " 1"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
) -> tuple[Float64, Float64]:
    """As `vsurge.kernels.ragged_paged_attention`, outside jit only; rows of padding are zero."""
    all_queries = np.asarray(queries, np.float64)
    keys, values = read_cache(kv_pages)
    lengths, table, starts = (np.asarray(a, np.int64) for a in (kv_lens, page_table, query_starts))
    options: dict[str, Any] = {
        "scale": scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "sinks": None if sinks is None else np.asarray(sinks, np.float64),
    }
    output = np.zeros_like(all_queries)
    log_sum_exp = np.full(all_queries.shape[:2], -np.inf)
    for sequence in range(int(np.asarray(num_seqs)[0])):
        rows = slice(starts[sequence], starts[sequence + 1])
        kv_len = int(lengths[sequence])
        if kv_len == 0:
            continue
        slots = slots_of(table[sequence], kv_len, kv_pages.page_size)
        output[rows], log_sum_exp[rows] = attend(all_queries[rows], keys[slots], values[slots], **options)
    return output, log_sum_exp
