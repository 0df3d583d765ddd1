"""Block sizes of the decode kernel for TPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..block_sizes import Key, log_untuned, tuned_blocks
from ..tpu.shapes import LANES, SUBLANES, padded

# A step that has more tokens than these hides no more of what each step costs.
UNIT_TOKENS, MOST_LANES, MOST_HEAD_TOKENS = 512, 8, 16384
LEAST_STEPS, MOST_STEPS = 4, 16
UNDER_WAY = 8 * 2**20  # bytes: more than any chip's memory delivers in 2 us


@dataclass(frozen=True)
class DecodeBlocks:
    """How `paged_decode_attention` cuts its work.

    Attributes:
        kv_tokens: tokens of a sequence that are computed at once; a multiple of the page size and of 128.
        lanes: such units, of one sequence or of several, that are computed side by side.
        depth: steps that have a place in vector memory, the one that is computed included; at least 2.
    """

    kv_tokens: int
    lanes: int = 1
    depth: int = 4

    def check(
        self, *, page_size: int, token_bytes: int, seq_bytes: int, vmem_bytes: int, num_queries: int = 1
    ) -> None:
        """Checks the sizes against a call and a device.

        Args:
            page_size: tokens per page.
            token_bytes: of a token's keys and values in one layer, and of their scales, in vector memory.
            seq_bytes: of vector memory that a sequence takes besides: see `rows.seq_bytes`.
            vmem_bytes: of vector memory that there is for all this.
            num_queries: of a sequence.

        Raises:
            ValueError: names the block size, its value and what is allowed.
        """
        if self.kv_tokens < 1 or self.kv_tokens % page_size or self.kv_tokens % LANES:
            raise ValueError(
                f"block_sizes: kv_tokens={self.kv_tokens} must be a multiple of {page_size=} and of {LANES}"
            )
        if self.lanes < 1:
            raise ValueError(f"block_sizes: lanes={self.lanes} must be at least 1")
        if self.depth < 2:
            raise ValueError(f"block_sizes: depth={self.depth} must be at least 2")
        needed = self.scratch_bytes(token_bytes, seq_bytes, num_queries)
        if needed > vmem_bytes:
            cache = self._cache_bytes(token_bytes)
            raise ValueError(
                f"block_sizes: {self} needs {needed} bytes of vector memory ({cache} of them for the cache), "
                f"which has {vmem_bytes}"
            )

    def seqs(self, num_queries: int) -> int:
        """Sequences of a group: as many as can be under way, in whole tiles."""
        return padded(self.lanes * self.depth, SUBLANES if num_queries == 1 else 1)

    def scratch_bytes(self, token_bytes: int, seq_bytes: int, num_queries: int = 1) -> int:
        """Bytes of vector memory for all that outlives a step; the arguments are those of `check`."""
        # besides the group's: the softmax of units without sequences and the one that is carried
        return self._cache_bytes(token_bytes) + (self.seqs(num_queries) + 2) * seq_bytes

    def _cache_bytes(self, token_bytes: int) -> int:
        return self.depth * self.lanes * self.kv_tokens * token_bytes


def default_blocks(
    *,
    page_size: int,
    num_kv_heads: int,
    pages_per_seq: int,
    most_seqs: int,
    token_bytes: int,
    seq_bytes: int,
    vmem_bytes: int,
) -> DecodeBlocks:
    """Block sizes that fit half of the vector memory, first long units, then many of them, then many steps.

    Args:
        page_size, token_bytes, vmem_bytes: as in `DecodeBlocks.check`.
        num_kv_heads: that a unit has.
        pages_per_seq: pages of the longest sequence, which a unit need not exceed.
        most_seqs: sequences of a group at most, which `lanes` times `depth` must not exceed.
        seq_bytes: of vector memory that a sequence of a group takes besides, of which a quarter is used.
    """
    most_seqs = min(most_seqs, vmem_bytes // 4 // seq_bytes)

    def fits(kv_tokens: int, lanes: int) -> bool:
        step_bytes = lanes * kv_tokens * token_bytes
        return LEAST_STEPS * step_bytes <= vmem_bytes // 2 and LEAST_STEPS * lanes <= most_seqs

    kv_tokens, lanes = math.lcm(LANES, page_size), 1
    while 2 * kv_tokens <= UNIT_TOKENS and kv_tokens < page_size * pages_per_seq and fits(2 * kv_tokens, 1):
        kv_tokens *= 2
    while (
        2 * lanes <= MOST_LANES
        and 2 * lanes * kv_tokens * num_kv_heads <= MOST_HEAD_TOKENS
        and fits(kv_tokens, 2 * lanes)
    ):
        lanes *= 2
    step_bytes = lanes * kv_tokens * token_bytes
    wanted = max(LEAST_STEPS, 1 - -UNDER_WAY // step_bytes)
    most = min(vmem_bytes // 2 // step_bytes, most_seqs // lanes, MOST_STEPS)
    return DecodeBlocks(kv_tokens, lanes, max(2, min(wanted, most)))


def tuned_or_default_blocks(
    key: Key,
    *,
    page_size: int,
    num_kv_heads: int,
    pages_per_seq: int,
    most_seqs: int,
    token_bytes: int,
    seq_bytes: int,
    vmem_bytes: int,
    num_queries: int = 1,
) -> DecodeBlocks:
    """The block sizes that the tables hold for a call, else those of `default_blocks`; see there.

    Args:
        key: of the call.
        num_queries: of a sequence. The tables hold calls with one; of others it is logged that they do not.
    """

    def check(blocks: DecodeBlocks) -> None:
        blocks.check(page_size=page_size, token_bytes=token_bytes, seq_bytes=seq_bytes, vmem_bytes=vmem_bytes)
        if blocks.lanes * blocks.depth > max(most_seqs, SUBLANES):
            raise ValueError(f"scalar memory holds the pages of {most_seqs} sequences of {pages_per_seq=}")

    context, found = pages_per_seq * page_size, None
    if num_queries > 1:
        log_untuned(key, context, f"{num_queries} queries per sequence")
    else:
        found = tuned_blocks(key, context, DecodeBlocks, check)
    return found or default_blocks(
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        pages_per_seq=pages_per_seq,
        most_seqs=most_seqs,
        token_bytes=token_bytes,
        seq_bytes=seq_bytes,
        vmem_bytes=vmem_bytes,
    )
