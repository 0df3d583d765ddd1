"""Block sizes of the ragged kernel for TPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..decode.blocks import LANES

ROWS, MOST_TOKENS, LEAST_QUERIES = 512, 1024, 16


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

    def check(self, *, page_size: int) -> None:
        """Checks the sizes.

        Args:
            page_size: tokens per page.

        Raises:
            ValueError: names the block size, its value and what is allowed.
        """
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


def default_blocks(
    *, group: int, page_size: int, pages_per_seq: int, token_bytes: int, vmem_bytes: int
) -> RaggedBlocks:
    """Block sizes whose pieces of the cache fit a quarter of the vector memory.

    Args:
        group: query heads per KV head.
        page_size: tokens per page.
        pages_per_seq: pages of the longest sequence, which a piece need not exceed.
        token_bytes: of a token's keys and values in one layer.
        vmem_bytes: the device's vector memory.
    """
    kv_tokens = math.lcm(LANES, page_size)
    while (
        2 * kv_tokens <= MOST_TOKENS
        and kv_tokens < page_size * pages_per_seq
        and 2 * 2 * kv_tokens * token_bytes <= vmem_bytes // 4
    ):
        kv_tokens *= 2
    q_tokens = 1 << (max(ROWS // group, LEAST_QUERIES).bit_length() - 1)
    return RaggedBlocks(q_tokens, kv_tokens)
