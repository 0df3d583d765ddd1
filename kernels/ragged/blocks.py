"""Block sizes of the ragged kernel for TPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..block_sizes import Key, tuned_blocks
from ..tpu.shapes import LANES, SUBLANES, padded
from .heads import Heads
from .items import PIECE, waiting_rows

MOST_ROWS = 4096  # of queries in a block: more take longer to begin and end, and hide no more
LEAST_QUERIES, MOST_QUERIES = 16, 256  # the latter as the diagonal's unseen half is computed, too
MOST_TOKENS = 1024
MOST_HEAD_TOKENS = 4096  # of all KV heads in a piece of the cache: more do not lower the cost per token
MOST_DEPTH = 4


@dataclass(frozen=True)
class Sizes:
    """What a call of `ragged_paged_attention` has, as far as memory depends on it.

    Attributes:
        num_q_heads, num_kv_heads, head_dim: heads, and numbers per head.
        page_size: tokens per page.
        query_bytes: bytes of a number of the queries.
        token_bytes: of a token's keys and values, and of their scales, in vector memory.
        return_lse: whether the log-sum-exp is wanted.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    query_bytes: int
    token_bytes: int
    return_lse: bool


@dataclass(frozen=True)
class RaggedBlocks:
    """How `ragged_paged_attention` cuts prompts. (Single new tokens go through the decode kernel.)

    Attributes:
        q_tokens: new tokens of a sequence that are computed at once; a power of two, at least 16.
        kv_tokens: tokens in the cache that they are computed against at once; a multiple of the page size
            and of 128.
        depth: such pieces of the cache that have a place in vector memory, the one in use included; at least
            2, at most 8.
    """

    q_tokens: int
    kv_tokens: int
    depth: int = 2

    def check(self, sizes: Sizes, vmem_bytes: int) -> None:
        """Checks the block sizes against a call and a device.

        Args:
            sizes: of the call.
            vmem_bytes: the device's vector memory.

        Raises:
            ValueError: names the block size, its value and what is allowed.
        """
        page_size = sizes.page_size
        if self.q_tokens < LEAST_QUERIES or self.q_tokens & (self.q_tokens - 1):
            raise ValueError(
                f"block_sizes: q_tokens={self.q_tokens} must be a power of two, at least {LEAST_QUERIES}"
            )
        if self.kv_tokens < 1 or self.kv_tokens % page_size or self.kv_tokens % LANES:
            raise ValueError(
                f"block_sizes: kv_tokens={self.kv_tokens} must be a multiple of {page_size=} and of {LANES}"
            )
        if not 2 <= self.depth <= 8:
            raise ValueError(f"block_sizes: depth={self.depth} must lie in 2..8")
        needed = self.scratch_bytes(sizes)
        if needed > vmem_bytes:
            raise ValueError(
                f"block_sizes: {self} holds {needed} bytes in vector memory, which has {vmem_bytes}"
            )

    def scratch_bytes(self, sizes: Sizes) -> int:
        """Bytes of vector memory for rows, softmax, scores that wait and pieces of the cache."""
        head_dim = padded(sizes.head_dim)
        rows = self.q_tokens * sizes.num_q_heads
        coming_and_going = 2 * 2 * rows * head_dim * sizes.query_bytes
        words = self._heads(sizes, sizes.query_bytes).scratch_rows * head_dim * 4
        log_sum_exp = 2 * rows + self._heads(sizes, 4).scratch_rows + rows // sizes.num_kv_heads // 2
        log_sum_exp = log_sum_exp * LANES * 4 if sizes.return_lse else 0
        softmax = rows * (2 * SUBLANES + padded(sizes.head_dim, SUBLANES)) * 4
        scores = waiting_rows(self.kv_tokens) * self._columns(sizes) * 4
        piece = self.kv_tokens * sizes.token_bytes
        return coming_and_going + words + log_sum_exp + softmax + scores + self.depth * piece

    def step_bytes(self, sizes: Sizes) -> int:
        """About the bytes of vector memory that a step's own numbers take: an item's scores and weights."""
        return min(self.kv_tokens, PIECE) * self._columns(sizes) * (4 + sizes.query_bytes)

    def _columns(self, sizes: Sizes) -> int:
        """Columns that are taken into the softmax at once, as they lie in vector memory."""
        return padded(self._heads(sizes, sizes.query_bytes).at_once)

    def _heads(self, sizes: Sizes, num_bytes: int) -> Heads:
        return Heads.of(sizes.num_kv_heads, sizes.num_q_heads // sizes.num_kv_heads, self.q_tokens, num_bytes)


def default_blocks(sizes: Sizes, *, pages_per_seq: int, vmem_bytes: int) -> RaggedBlocks:
    """Block sizes that leave a quarter of the vector memory to the compiler.

    Args:
        sizes: of the call.
        pages_per_seq: pages of the longest sequence, which a piece need not exceed.
        vmem_bytes: the device's vector memory.
    """

    def fits(blocks: RaggedBlocks) -> bool:
        return blocks.scratch_bytes(sizes) + blocks.step_bytes(sizes) <= vmem_bytes * 3 // 4

    least = math.lcm(LANES, sizes.page_size)
    q_tokens = max(LEAST_QUERIES, min(MOST_QUERIES, MOST_ROWS // sizes.num_q_heads))
    q_tokens = 1 << (q_tokens.bit_length() - 1)
    while q_tokens > LEAST_QUERIES and not fits(RaggedBlocks(q_tokens, least)):
        q_tokens //= 2
    kv_tokens = least
    while (
        2 * kv_tokens <= min(MOST_TOKENS, MOST_HEAD_TOKENS // sizes.num_kv_heads)
        and kv_tokens < sizes.page_size * pages_per_seq
        and fits(RaggedBlocks(q_tokens, 2 * kv_tokens))
    ):
        kv_tokens *= 2
    depth = 2
    while depth < MOST_DEPTH and fits(RaggedBlocks(q_tokens, kv_tokens, depth + 1)):
        depth += 1
    return RaggedBlocks(q_tokens, kv_tokens, depth)


def tuned_or_default_blocks(key: Key, sizes: Sizes, *, pages_per_seq: int, vmem_bytes: int) -> RaggedBlocks:
    """The block sizes that the tables hold for a call, else those of `default_blocks`; see there."""
    found = tuned_blocks(
        key,
        pages_per_seq * sizes.page_size,
        RaggedBlocks,
        lambda blocks: blocks.check(sizes, vmem_bytes),
    )
    return found or default_blocks(sizes, pages_per_seq=pages_per_seq, vmem_bytes=vmem_bytes)
