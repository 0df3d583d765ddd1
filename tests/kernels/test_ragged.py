"""Ragged paged attention against the float64 reference."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsurge.kernels import Implementation, ragged_paged_attention

from .batches import RaggedBatch, Setup, ragged_batch
from .cases import (
    SWEEP,
    check_ragged,
    chosen,
    each_geometry,
    each_implementation,
    each_implementation_slowly,
    each_quantized,
    every_option,
)

pytestmark = pytest.mark.usefixtures("small_units")

MIXES = {  # new tokens and tokens in the cache, per sequence; query blocks and KV blocks have 128 tokens
    "prompts": ((5, 131, 33), (5, 131, 33)),
    "chunks": ((17, 130, 1, 128), (200, 257, 1, 128)),
    "decodes": ((1, 1, 1, 1, 1), (1, 128, 129, 300, 16)),
    "empty sequences among others": ((0, 40, 1, 0, 0, 3), (0, 40, 260, 0, 70, 3)),
}
SETUPS = (
    Setup(num_q_heads=2, num_kv_heads=2, page_size=16),
    Setup(num_q_heads=8, num_kv_heads=1, page_size=64, query_dtype="bfloat16", cache_dtype="bfloat16"),
    Setup(num_q_heads=4, num_kv_heads=1, page_size=32, cache_dtype="bfloat16"),
    Setup(head_dim=128, page_size=256, query_dtype="bfloat16"),
    Setup(num_q_heads=1, num_kv_heads=1, page_size=128, query_dtype="bfloat16", cache_dtype="bfloat16"),
)


def mixed_batch(setup: Setup, mix: str, *, outliers: bool = False) -> RaggedBatch:
    """An entry of MIXES; all of them have the same shapes, so that one compilation serves them."""
    pages = -(-300 // setup.page_size)
    return ragged_batch(
        setup,
        *MIXES[mix],
        max_seqs=8,
        num_tokens=288,
        pages_per_seq=pages + 2,
        num_pages=5 * pages + 4,
        outliers=outliers,
    )


@pytest.mark.parametrize(
    ("implementation", "setup"),
    [
        *(("xla", setup) for setup in SETUPS),
        ("mosaic_tpu", SETUPS[1]),
        *(
            pytest.param("mosaic_tpu", setup, marks=pytest.mark.slow)
            for setup in SETUPS
            if setup != SETUPS[1]
        ),
        *(pytest.param("triton", setup, marks=pytest.mark.slow) for setup in SETUPS),
    ],
    ids=str,
)
@pytest.mark.parametrize("mix", MIXES)
def test_any_mix_of_lengths_matches_the_reference(
    setup: Setup, mix: str, implementation: Implementation
) -> None:
    check_ragged(mixed_batch(setup, mix), implementation)


@each_geometry
def test_any_width_and_group_of_heads_matches_the_reference(
    setup: Setup, implementation: Implementation
) -> None:
    batch = ragged_batch(setup, (3, 40, 1, 0), (3, 200, 140, 0))
    check_ragged(batch, implementation, **chosen("all", setup))


@each_quantized
def test_a_quantized_cache_matches_the_reference(setup: Setup, implementation: Implementation) -> None:
    batch = ragged_batch(setup, (3, 150, 1, 0), (3, 300, 270, 0), outliers=True)
    check_ragged(batch, implementation, **chosen("all", setup))


@pytest.mark.parametrize(("implementation", "dtype", "options"), every_option())
def test_every_option_matches_the_reference(dtype: str, options: str, implementation: Implementation) -> None:
    setup = Setup(query_dtype=dtype, cache_dtype=dtype)
    batch = ragged_batch(setup, (3, 150, 1, 0), (3, 300, 270, 0))
    check_ragged(batch, implementation, **chosen(options, setup))


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [((150, 2, 3, 130), (1300, 700, 512, 643)), ((40, 2, 1, 9), (2100, 700, 1500, 1033))],
)
def test_contexts_of_several_blocks_at_once_match_the_reference(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], cache_dtype: str, window: int | None
) -> None:
    """In XLA these are 4 blocks of 128 tokens, or 8 where few tokens are new, and what is left over."""
    setup = Setup(query_dtype="float32", cache_dtype=cache_dtype)
    batch = ragged_batch(setup, q_lens, kv_lens)
    check_ragged(batch, "xla", sliding_window=window)


@each_implementation_slowly
@pytest.mark.parametrize("setup", SETUPS[:2], ids=str)
def test_outliers_do_no_harm(setup: Setup, implementation: Implementation) -> None:
    check_ragged(mixed_batch(setup, "chunks", outliers=True), implementation)


@each_implementation_slowly
def test_a_batch_without_sequences_runs(implementation: Implementation) -> None:
    check_ragged(ragged_batch(Setup(), (), (), num_tokens=5, pages_per_seq=2), implementation)


@each_implementation_slowly
def test_a_single_token_runs(implementation: Implementation) -> None:
    setup = Setup(num_q_heads=1, num_kv_heads=1, query_dtype="bfloat16", cache_dtype="bfloat16")
    check_ragged(ragged_batch(setup, (1,), (20,), num_tokens=1, max_seqs=1), implementation)


@each_implementation_slowly
def test_inside_a_jit_the_result_is_the_same(implementation: Implementation) -> None:
    batch = mixed_batch(SETUPS[0], "chunks")
    attend = partial(ragged_paged_attention, scale=batch.setup.scale, implementation=implementation)
    inside, outside = jax.jit(attend)(*batch.arguments), attend(*batch.arguments)
    np.testing.assert_array_equal(inside[batch.owned], outside[batch.owned])


@st.composite
def lengths(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Up to 4 sequences with at most 40 new tokens altogether and 96 in the cache each."""
    q_lens, kv_lens = [], []
    for _ in range(draw(st.integers(0, 4))):
        q_lens.append(draw(st.integers(0, 40 - sum(q_lens))))
        kv_lens.append(draw(st.integers(q_lens[-1], 96)))
    return q_lens, kv_lens


@each_implementation_slowly
@settings(deadline=None, derandomize=True, max_examples=15)
@given(lens=lengths(), window=st.sampled_from([None, 20]), seed=st.integers(0, 1000))
def test_random_lengths_match_the_reference(
    implementation: Implementation, lens: tuple[list[int], list[int]], window: int | None, seed: int
) -> None:
    batch = ragged_batch(  # of fixed sizes: one compilation for all
        Setup(), *lens, seed=seed, max_seqs=5, num_tokens=41, pages_per_seq=7, num_pages=30
    )
    check_ragged(batch, implementation, sliding_window=window)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("setup", SWEEP, ids=str)
def test_every_setup_matches_the_reference(setup: Setup, implementation: Implementation) -> None:
    for mix in MIXES:
        check_ragged(mixed_batch(setup, mix), implementation)
