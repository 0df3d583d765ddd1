"""Rows in 8 bits: what the numbers and scales are, and what they cost attention in exactness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    Implementation,
    KVPages,
    append_kv,
    empty_kv_pages,
    kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
    read_kv,
)
from vsurge.kernels.append import reference
from vsurge.kernels.decode import reference as decode_reference
from vsurge.kernels.quantization import quantize
from vsurge.kernels.ragged import reference as ragged_reference

from .batches import Setup, decode_batch, poisoned_cache, ragged_batch
from .cases import INTERPRETED, TOLERANCES, check_decode

pytestmark = pytest.mark.usefixtures("small_units")

DTYPES = {"int8": 127, "float8_e4m3fn": 448}
HEADS, HEAD_DIM = 2, 32
OPTIONS: dict[str, Any] = {"scale": 0.125, "sliding_window": None, "soft_cap": None, "sinks": None}


def normal_rows(count: int, dtype: str = "float32") -> Any:
    return jnp.asarray(np.random.default_rng(0).standard_normal((count, HEADS, HEAD_DIM)), dtype)


def written(keys: Any, dtype: str, implementation: Implementation) -> tuple[Any, Any, Any]:
    """The scales of keys and values [num_tokens, 2, HEADS] and what is read, where the values are -keys."""
    count = keys.shape[0]
    slots = jnp.arange(count, dtype=jnp.int32)
    cache = append_kv(
        empty_kv_pages(-(-count // 16), 16, HEADS, HEAD_DIM, dtype),
        keys,
        -keys,
        slots,
        implementation=implementation,
    )
    scales = np.asarray(cache.scales)[..., :16]
    scales = np.moveaxis(scales, 3, 1).reshape(-1, 2, HEADS)[:count]
    got_keys, got_values = read_kv(cache, slots)
    return scales, np.asarray(got_keys), np.asarray(got_values)


@pytest.mark.parametrize(("dtype", "largest"), DTYPES.items())
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_largest_number_of_a_row_takes_the_largest_of_the_dtype(
    dtype: str, largest: int, implementation: Implementation
) -> None:
    keys = normal_rows(9)
    scales, got_keys, got_values = written(keys, dtype, implementation)
    want = np.abs(keys).max(axis=-1) / largest
    np.testing.assert_allclose(scales, np.stack([want, want], axis=1), rtol=1e-6)
    step = scales[:, 0, :, None] / 2 if dtype == "int8" else np.abs(keys) / 16 + scales[:, 0, :, None] / 512
    assert (np.abs(got_keys - keys) <= step * 1.0001).all()
    np.testing.assert_array_equal(got_values, -got_keys)


def test_int8_rounds_ties_to_even() -> None:
    row = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -3.5]])
    stored, scales = quantize(row, "int8")
    assert scales.tolist() == [1.0]
    assert stored[0].tolist() == [127, 0, 2, 2, 0, -2, 126, -4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_all_implementations_store_the_same_bits(row_dtype: str, dtype: str) -> None:
    rows = normal_rows(500, row_dtype)
    stored, scales = (np.asarray(array) for array in quantize(rows, dtype))
    want = [reference.quantize(row, np.dtype(dtype)) for row in np.asarray(rows)]
    np.testing.assert_array_equal(stored.view(np.uint8), np.stack([row for row, _ in want]).view(np.uint8))
    np.testing.assert_array_equal(scales, np.stack([scale for _, scale in want]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "implementation", ["xla", "reference", pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
)
def test_rows_without_a_scale_of_their_own(dtype: str, implementation: Implementation) -> None:
    """Zeros come back as zeros, a NaN or an infinity makes its own row NaN and no other."""
    rows = normal_rows(5).at[0].set(0.0).at[1].set(1e-39).at[2, 0, 7].set(jnp.nan).at[3, 1, 0].set(-jnp.inf)
    scales, keys, values = written(rows, dtype, implementation)
    assert (scales[:2] == 0).all()
    assert (keys[:2] == 0).all()
    assert (values[:2] == 0).all()
    rotten = np.zeros((5, HEADS), bool)
    rotten[2, 0] = rotten[3, 1] = True
    for found in (scales[:, 0], scales[:, 1], keys, values):
        where = np.isnan(found).reshape(5, HEADS, -1)
        assert (where == rotten[:, :, None]).all()


@pytest.mark.parametrize("implementation", ["xla", pytest.param("mosaic_tpu", marks=pytest.mark.slow)])
def test_scales_may_have_places_that_mean_nothing(
    implementation: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they have on a TPU."""
    assert [kv_pages.scale_tokens(size, "tpu") for size in (16, 128, 144)] == [128, 128, 256]
    monkeypatch.setattr(kv_pages, "scale_tokens", lambda *_: 128)
    rows = normal_rows(40)
    for got, want in zip(
        written(rows, "int8", implementation), written(rows, "int8", "reference"), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    setup = Setup(cache_dtype="int8")
    batch = decode_batch(setup, (140, 0, 33))
    cache = batch.arguments[1]
    beyond = jnp.arange(128, dtype=jnp.int32) >= setup.page_size
    cache = replace(cache, scales=jnp.where(beyond.reshape(1, 1, 1, -1), jnp.nan, cache.scales))
    assert cache.scales.shape[3] == 128
    check_decode(replace(batch, arguments=(batch.arguments[0], cache, *batch.arguments[2:])), implementation)


@pytest.mark.parametrize("as_bits", [True, False])  # as on a CPU, and as elsewhere
def test_what_is_nobodys_in_a_float8_cache_of_the_tests_is_nan(
    as_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not as_bits:
        monkeypatch.setattr(kv_pages, "BITS", {})
    cache, table = poisoned_cache(Setup(cache_dtype="float8_e4m3fn"), (32,), np.random.default_rng(0))
    assert (cache.data.dtype == cache.dtype) == (not as_bits)
    numbers = np.asarray(kv_pages.decode_bits(cache, cache.data), np.float32)
    used = np.isin(np.arange(cache.num_pages), table[0, :2])
    assert np.isnan(numbers[~used]).all()
    assert np.isfinite(numbers[used]).all()


def coarse(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Rows as they come back from 8 bits, computed in float64."""
    scales = np.abs(rows).max(axis=-1, keepdims=True) / DTYPES[dtype]
    scaled = rows / np.where(scales == 0, 1.0, scales)
    return scales * (np.rint(scaled) if dtype == "int8" else scaled.astype(dtype).astype(np.float64))


each_kernel_slowly = pytest.mark.parametrize(
    "implementation",
    ["xla", "reference", *(pytest.param(name, marks=pytest.mark.slow) for name in INTERPRETED)],
)


def exact_and_rounded(
    setup: Setup, kv_lens: tuple[int, ...], table: Any, *, outliers: bool
) -> tuple[KVPages, KVPages]:
    """A batch's cache before its numbers were rounded, and after that, both in float32."""
    exact, same_table = poisoned_cache(
        replace(setup, cache_dtype="float32"), kv_lens, np.random.default_rng(0), outliers=outliers
    )
    np.testing.assert_array_equal(same_table, table[: len(kv_lens)])
    rounded = coarse(np.asarray(exact.data, np.float64), setup.cache_dtype)
    return exact, replace(exact, data=jnp.asarray(rounded, jnp.float32))


def check_error(got: Any, want: np.ndarray, best: np.ndarray, *, besides: float = 0.0) -> None:
    """Fails unless rows err as much as the rounded cache makes them, and by a share of their norm besides."""
    norm = np.linalg.norm(want, axis=-1)
    unavoidable = np.linalg.norm(best - want, axis=-1)
    assert (unavoidable > 1e-3 * norm).all()
    assert (
        np.linalg.norm(np.asarray(got, np.float64) - want, axis=-1) <= 1.1 * unavoidable + besides * norm
    ).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, pytest.param(True, marks=pytest.mark.slow)])
@each_kernel_slowly
def test_attention_errs_by_what_the_rounding_of_keys_and_values_costs(
    dtype: str, outliers: bool, implementation: Implementation
) -> None:
    kv_lens, setup = (300, 3, 140, 17), Setup(cache_dtype=dtype)
    queries, cache, *metadata = decode_batch(setup, kv_lens, outliers=outliers).arguments
    pages = exact_and_rounded(setup, kv_lens, metadata[1], outliers=outliers)
    want, best = (
        decode_reference.paged_decode_attention(queries[:, None], each, *metadata, **OPTIONS)[0][:, 0]
        for each in pages
    )
    got = paged_decode_attention(queries, cache, *metadata, scale=0.125, implementation=implementation)
    check_error(got, want, best)


@pytest.mark.parametrize("dtype", DTYPES)
@each_kernel_slowly
def test_bfloat16_and_prompts_err_by_no_more_than_bfloat16_besides(
    dtype: str, implementation: Implementation
) -> None:
    kv_lens, setup = (300, 30, 140, 17), Setup(query_dtype="bfloat16", cache_dtype=dtype)
    batch = ragged_batch(setup, (150, 1, 33, 1), kv_lens)
    queries, cache, *metadata = batch.arguments
    pages = exact_and_rounded(setup, kv_lens, metadata[1], outliers=False)
    want, best = (
        ragged_reference.ragged_paged_attention(queries, each, *metadata, **OPTIONS)[0][batch.owned]
        for each in pages
    )
    got = ragged_paged_attention(queries, cache, *metadata, scale=0.125, implementation=implementation)
    check_error(got[batch.owned], want, best, besides=TOLERANCES["bfloat16"])
