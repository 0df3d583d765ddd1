"""Paged decode attention against the float64 reference and against the ragged form."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsurge.kernels import Implementation, paged_decode_attention, ragged_paged_attention

from .batches import Setup, decode_batch
from .cases import (
    IMPLEMENTATIONS,
    INTERPRETED,
    SWEEP,
    TOLERANCES,
    assert_lse_close,
    assert_rows_close,
    check_decode,
    chosen,
    each_geometry,
    each_implementation,
    each_implementation_slowly,
    each_quantized,
    every_option,
    sinks_of,
)

pytestmark = pytest.mark.usefixtures("small_units")

BATCHES = {
    "one": (77,),
    "around a block": (127, 128, 129),
    "unsorted, with padding": (300, 0, 1, 140, 16, 0, 17),
    "nothing but padding": (0, 0),
}
SETUPS = (
    Setup(num_q_heads=2, num_kv_heads=2, page_size=16, query_dtype="bfloat16", cache_dtype="bfloat16"),
    Setup(num_q_heads=8, num_kv_heads=1, page_size=64),
    Setup(num_q_heads=4, num_kv_heads=1, page_size=32, cache_dtype="bfloat16"),
    Setup(head_dim=128, page_size=256, query_dtype="bfloat16"),
    Setup(num_q_heads=1, num_kv_heads=1, page_size=128, query_dtype="bfloat16", cache_dtype="bfloat16"),
)


@each_implementation
@pytest.mark.parametrize("kv_lens", BATCHES.values(), ids=BATCHES)
def test_any_batch_matches_the_reference(kv_lens: tuple[int, ...], implementation: Implementation) -> None:
    padded = (*kv_lens, *[0] * (8 - len(kv_lens)))  # of fixed sizes: one compilation for all
    check_decode(decode_batch(SETUPS[0], padded, pages_per_seq=20, num_pages=40), implementation)


@pytest.mark.parametrize(
    ("implementation", "setup"),
    [
        *(("xla", setup) for setup in SETUPS),
        *(("mosaic_tpu", setup) for setup in SETUPS[1::2]),
        *(pytest.param("mosaic_tpu", setup, marks=pytest.mark.slow) for setup in SETUPS[::2]),
    ],
    ids=str,
)
def test_any_setup_matches_the_reference(setup: Setup, implementation: Implementation) -> None:
    check_decode(decode_batch(setup, BATCHES["unsorted, with padding"]), implementation)


@each_geometry
def test_any_width_and_group_of_heads_matches_the_reference(
    setup: Setup, implementation: Implementation
) -> None:
    check_decode(decode_batch(setup, (270, 0, 3, 128)), implementation, **chosen("all", setup))


@each_quantized
def test_a_quantized_cache_matches_the_reference(setup: Setup, implementation: Implementation) -> None:
    batch = decode_batch(setup, (270, 3, 0, 128, 400), outliers=True)
    check_decode(batch, implementation, **chosen("all", setup))


@pytest.mark.parametrize(("implementation", "dtype", "options"), every_option())
def test_every_option_matches_the_reference(dtype: str, options: str, implementation: Implementation) -> None:
    setup = Setup(query_dtype=dtype, cache_dtype=dtype)
    check_decode(decode_batch(setup, (270, 3, 0, 128, 400)), implementation, **chosen(options, setup))


@pytest.mark.parametrize(
    ("implementation", "setup"),
    [
        pytest.param(
            implementation, setup, marks=pytest.mark.slow if implementation in INTERPRETED and i else ()
        )
        for implementation in IMPLEMENTATIONS
        for i, setup in enumerate(SETUPS[:2])
    ],
    ids=str,
)
def test_outliers_do_no_harm(setup: Setup, implementation: Implementation) -> None:
    check_decode(decode_batch(setup, BATCHES["unsorted, with padding"], outliers=True), implementation)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        *((implementation, "bfloat16") for implementation in IMPLEMENTATIONS),
        ("xla", "float32"),
        *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in INTERPRETED),
    ],
)
def test_decode_is_ragged_attention_of_one_token_each(dtype: str, implementation: Implementation) -> None:
    setup = Setup(query_dtype=dtype, cache_dtype=dtype)
    queries, kv_pages, kv_lens, page_table = decode_batch(setup, (270, 3, 128, 64, 1)).arguments
    options = {"scale": setup.scale, "return_lse": True}
    decode = paged_decode_attention(
        queries, kv_pages, kv_lens, page_table, implementation=implementation, **options
    )
    starts, num_seqs = jnp.arange(6, dtype=jnp.int32), jnp.asarray([5], jnp.int32)
    ragged = ragged_paged_attention(queries, kv_pages, kv_lens, page_table, starts, num_seqs, **options)
    assert_rows_close(decode[0], ragged[0], TOLERANCES[dtype])
    assert_lse_close(decode[1], ragged[1])


SEVERAL = (300, 0, 1, 130, 5, 260)  # tokens, some of them fewer than queries


@pytest.mark.parametrize(
    ("implementation", "num_queries", "setup", "options"),
    [
        ("xla", 4, SETUPS[0], "all"),
        ("xla", 1, SETUPS[1], "sinks"),
        pytest.param("xla", 8, SETUPS[1], "window of 7", marks=pytest.mark.slow),
        ("mosaic_tpu", 4, SETUPS[2], "all"),
        pytest.param("mosaic_tpu", 8, SETUPS[0], "window of 7", marks=pytest.mark.slow),
        pytest.param("mosaic_tpu", 3, SETUPS[1], "soft cap", marks=pytest.mark.slow),
        pytest.param("mosaic_tpu", 1, SETUPS[1], "sinks", marks=pytest.mark.slow),
        ("triton", 4, SETUPS[2], "all"),
        pytest.param("triton", 8, SETUPS[0], "window of 7", marks=pytest.mark.slow),
        pytest.param("triton", 3, SETUPS[1], "soft cap", marks=pytest.mark.slow),
        pytest.param("triton", 1, SETUPS[1], "sinks", marks=pytest.mark.slow),
    ],
)
def test_several_queries_per_sequence_match_the_reference(
    implementation: Implementation, num_queries: int, setup: Setup, options: str
) -> None:
    batch = decode_batch(setup, SEVERAL, num_queries=num_queries)
    check_decode(batch, implementation, **chosen(options, setup))


@pytest.mark.parametrize("options", ["sinks", "all"])
def test_several_queries_are_ragged_attention_of_as_many_tokens_each(options: str) -> None:
    """By the oracles, which are two loops; and queries before a sequence's begin are zero."""
    setup, num_queries = Setup(), 5
    queries, kv_pages, kv_lens, page_table = decode_batch(setup, SEVERAL, num_queries=num_queries).arguments
    keywords: dict[str, Any] = {"scale": setup.scale, "return_lse": True, "implementation": "reference"}
    keywords |= chosen(options, setup)
    output, log_sum_exp = paged_decode_attention(queries, kv_pages, kv_lens, page_table, **keywords)
    there = np.arange(num_queries) >= num_queries - np.asarray(SEVERAL)[:, None]
    starts = jnp.asarray(np.cumsum([0, *there.sum(axis=1)]), jnp.int32)
    num_seqs = jnp.asarray([len(SEVERAL)], jnp.int32)
    ragged = ragged_paged_attention(
        queries[there], kv_pages, kv_lens, page_table, starts, num_seqs, **keywords
    )
    np.testing.assert_array_equal(output[there], ragged[0])
    np.testing.assert_array_equal(log_sum_exp[there], ragged[1])
    assert not np.asarray(output)[~there].any()
    assert np.isneginf(np.asarray(log_sum_exp)[~there]).all()


@each_implementation_slowly
@pytest.mark.parametrize("with_sinks", [False, True])
def test_two_halves_merged_by_their_log_sum_exp_are_the_whole(
    with_sinks: bool, implementation: Implementation
) -> None:
    setup = Setup()
    queries, kv_pages, kv_lens, page_table = decode_batch(setup, (270, 180, 145)).arguments
    sinks = sinks_of(setup) if with_sinks else None
    attend = partial(
        paged_decode_attention,
        queries,
        kv_pages,
        scale=setup.scale,
        return_lse=True,
        implementation=implementation,
    )
    cut = 9  # pages
    head = attend(jnp.full((3,), cut * setup.page_size, jnp.int32), page_table, sinks=sinks)
    tail = attend(kv_lens - cut * setup.page_size, page_table[:, cut:])  # the last is left one token
    whole = attend(kv_lens, page_table, sinks=sinks)
    log_sum_exp = jnp.logaddexp(head[1], tail[1])
    merged = sum(output * jnp.exp(part - log_sum_exp)[..., None] for output, part in (head, tail))
    assert_rows_close(merged, whole[0], TOLERANCES["float32"])
    assert_lse_close(log_sum_exp, whole[1])


@each_implementation_slowly
def test_inside_a_jit_the_result_is_the_same(implementation: Implementation) -> None:
    batch = decode_batch(Setup(), BATCHES["unsorted, with padding"])
    attend = partial(paged_decode_attention, scale=batch.setup.scale, implementation=implementation)
    np.testing.assert_array_equal(jax.jit(attend)(*batch.arguments), attend(*batch.arguments))


@each_implementation_slowly
@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    kv_lens=st.lists(st.integers(0, 96), min_size=6, max_size=6),
    window=st.sampled_from([None, 20]),
    seed=st.integers(0, 1000),
)
def test_random_lengths_match_the_reference(
    implementation: Implementation, kv_lens: list[int], window: int | None, seed: int
) -> None:
    batch = decode_batch(Setup(), kv_lens, seed=seed, pages_per_seq=7, num_pages=40)
    check_decode(batch, implementation, sliding_window=window)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("setup", SWEEP, ids=str)
def test_every_setup_matches_the_reference(setup: Setup, implementation: Implementation) -> None:
    for kv_lens in BATCHES.values():
        check_decode(decode_batch(setup, kv_lens), implementation)
