"""A sequence's query rows in the order of the decode kernel for TPU.

A KV head's rows come together, its query heads of the first query, of the second and so on, so that they are
one factor of a product.
"""

from __future__ import annotations

from jaxtyping import Array, Num

from ..tpu.shapes import LANES, padded


def by_kv_head(
    array: Num[Array, "num_seqs num_queries num_q_heads *numbers"], num_kv_heads: int
) -> Num[Array, "num_seqs rows *numbers"]:
    """Rows as the kernel has them."""
    num_seqs, num_queries, num_q_heads, *numbers = array.shape
    apart = array.reshape(num_seqs, num_queries, num_kv_heads, num_q_heads // num_kv_heads, *numbers)
    return apart.swapaxes(1, 2).reshape(num_seqs, num_queries * num_q_heads, *numbers)


def by_query(
    rows: Num[Array, "num_seqs rows *numbers"], num_queries: int, num_kv_heads: int
) -> Num[Array, "num_seqs num_queries num_q_heads *numbers"]:
    """The inverse."""
    num_seqs, count, *numbers = rows.shape
    apart = rows.reshape(num_seqs, num_kv_heads, num_queries, -1, *numbers)
    return apart.swapaxes(1, 2).reshape(num_seqs, num_queries, count // num_queries, *numbers)


def seq_bytes(rows: int, head_dim: int, itemsize: int) -> int:
    """Bytes of vector memory for a sequence's queries, output, log-sum-exp and running softmax.

    Args:
        rows: query rows of a sequence.
        head_dim: numbers per row.
        itemsize: bytes of a number of the queries.
    """
    softmax = 4 * (2 * LANES + padded(head_dim))
    passing = 2 * (2 * itemsize * padded(head_dim) + 4 * LANES)  # in and out, of two groups at a time
    return rows * (softmax + passing)
