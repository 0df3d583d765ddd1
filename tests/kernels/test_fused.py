"""Attention that writes the new tokens' keys and values in the same pass."""

from __future__ import annotations

import pytest

from vsurge.kernels import DecodeBlocks, Implementation

from .cases import Setup, sinks_of
from .fused import check_fused

BFLOAT16 = Setup(page_size=32, query_dtype="bfloat16", cache_dtype="bfloat16")
# At the ends of tiles, pages and units, beyond them, and more sequences than writes can be under way.
LENGTHS = (300, 0, 1, 128, 129, 256, 16, 17, 32, 33, 145, 384)


@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic_tpu"])
def test_the_new_tokens_are_seen_and_kept(implementation: Implementation) -> None:
    check_fused(BFLOAT16, LENGTHS, implementation, in_cache=(3, 6))


@pytest.mark.parametrize(
    ("setup", "blocks"),
    [
        (BFLOAT16, DecodeBlocks(128, 2, 3)),
        pytest.param(BFLOAT16, DecodeBlocks(128, 1, 2), marks=pytest.mark.slow),
        pytest.param(BFLOAT16, DecodeBlocks(256, 3, 2), marks=pytest.mark.slow),
        pytest.param(Setup(page_size=8), DecodeBlocks(128, 1, 5), marks=pytest.mark.slow),
        pytest.param(Setup(8, 1, 128, 64, "float32", "bfloat16"), DecodeBlocks(128), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_with_a_window_and_any_block_sizes_too(setup: Setup, blocks: DecodeBlocks) -> None:
    check_fused(
        setup,
        LENGTHS,
        "mosaic_tpu",
        in_cache=(0,),
        sliding_window=77,
        sinks=sinks_of(setup),
        block_sizes=blocks,
    )


@pytest.mark.parametrize("implementation", ["xla", pytest.param("mosaic_tpu", marks=pytest.mark.slow)])
def test_several_new_tokens_are_written_too(implementation: Implementation) -> None:
    check_fused(BFLOAT16, LENGTHS, implementation, num_queries=3, in_cache=(4,))
