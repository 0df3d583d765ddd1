"""Runs of the attention kernels for TPU that cross every kind of border, for the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np

from vsurge.kernels import DecodeBlocks, RaggedBlocks
from vsurge.kernels.decode.new_rows import WRITES

from .batches import Setup, decode_batch, ragged_batch
from .cases import check_decode, check_ragged
from .fused import check_fused

BLOCKS = [DecodeBlocks(128, 1, 2), DecodeBlocks(128, 2, 3), DecodeBlocks(256, 3, 2), DecodeBlocks(256, 1, 5)]
SMALL_RAGGED = RaggedBlocks(q_tokens=16, kv_tokens=128)
BFLOAT16 = Setup(query_dtype="bfloat16", cache_dtype="bfloat16", page_size=32)
INT8 = Setup(query_dtype="bfloat16", cache_dtype="int8", page_size=32)
LENGTHS = (520, 0, 3, 256, 384, 1, 1, 700, 128, 0, 260, 33)  # of two groups


def attend(blocks: DecodeBlocks, setup: Setup = BFLOAT16, **options: Any) -> None:
    check_decode(decode_batch(setup, LENGTHS), "mosaic_tpu", block_sizes=blocks, **options)


def attend_ragged(blocks: RaggedBlocks = SMALL_RAGGED, setup: Setup = BFLOAT16, **options: Any) -> None:
    """Query blocks of two groups, single tokens in between, an empty sequence and one without a cache."""
    batch = ragged_batch(setup, (150, 1, 33, 0, 1, 17), (300, 130, 33, 5, 1, 400))
    check_ragged(batch, "mosaic_tpu", block_sizes=blocks, **options)


def attend_fused(**options: Any) -> None:
    """More sequences than writes can be under way."""
    assert np.count_nonzero(LENGTHS) > WRITES
    check_fused(BFLOAT16, LENGTHS, "mosaic_tpu", block_sizes=BLOCKS[1], **options)


def attend_several() -> None:
    attend_fused(num_queries=3, sliding_window=77)
