"""Writing into the cache: what is written where, and that nothing of the cache's size is copied for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    Implementation,
    KVPages,
    append_kv,
    bytes_per_token,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
    read_kv,
)

from .cases import IMPLEMENTATIONS

NUM_PAGES, HEADS, HEAD_DIM = 5, 2, 16
DTYPES = ("float32", "bfloat16")


def random_rows(rng: np.random.Generator, count: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rows = rng.standard_normal((2, count, HEADS, HEAD_DIM))
    return jnp.asarray(rows[0], dtype), jnp.asarray(rows[1], dtype)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 64])
def test_the_cache_is_a_dictionary_of_slots(
    page_size: int, row_dtype: str, cache_dtype: str, implementation: Implementation
) -> None:
    rng = np.random.default_rng(page_size)
    kv_pages = empty_kv_pages(NUM_PAGES, page_size, HEADS, HEAD_DIM, cache_dtype)
    num_slots = NUM_PAGES * page_size
    written: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for _ in range(4):
        slots = rng.permutation(num_slots)[:9]
        slots[[2, 4, 5, 7]] = [-1, num_slots, -num_slots, 2**31 - 1]  # skipped
        keys, values = random_rows(rng, 9, row_dtype)
        kv_pages = append_kv(
            kv_pages, keys, values, jnp.asarray(slots, jnp.int32), implementation=implementation
        )
        stored = [np.asarray(rows.astype(cache_dtype)) for rows in (keys, values)]
        written |= {
            slot: (stored[0][i], stored[1][i])
            for i, slot in enumerate(slots.tolist())
            if slot in range(num_slots)
        }
    keys, values = read_kv(kv_pages, jnp.arange(num_slots, dtype=jnp.int32))
    assert keys.dtype == values.dtype == cache_dtype
    untouched = (np.zeros((HEADS, HEAD_DIM)), np.zeros((HEADS, HEAD_DIM)))
    for slot in range(num_slots):
        want_key, want_value = written.get(slot, untouched)
        np.testing.assert_array_equal(np.asarray(keys[slot]), want_key)
        np.testing.assert_array_equal(np.asarray(values[slot]), want_value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_and_negative_zero_survive_the_round_trip(implementation: Implementation) -> None:
    kv_pages = empty_kv_pages(1, 16, 1, 4, "bfloat16")
    row = jnp.asarray([[[np.nan, -0.0, np.inf, 2.0**-130]]], jnp.bfloat16)  # the last one is subnormal
    kv_pages = append_kv(kv_pages, row, -row, jnp.asarray([3], jnp.int32), implementation=implementation)
    keys, values = read_kv(kv_pages, jnp.asarray([3], jnp.int32))
    for got, want in ((keys, row), (values, -row)):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(want).view(np.uint16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_argument_is_donated(implementation: Implementation) -> None:
    kv_pages = empty_kv_pages(NUM_PAGES, 16, HEADS, HEAD_DIM, "bfloat16")
    keys, values = random_rows(np.random.default_rng(0), 1, "bfloat16")
    append_kv(kv_pages, keys, values, jnp.asarray([0], jnp.int32), implementation=implementation)
    assert kv_pages.data.is_deleted()


def write(kv_pages: KVPages, rows: jax.Array, slots: jax.Array) -> KVPages:
    return append_kv(kv_pages, rows, rows, slots)


def write_and_decode(kv_pages: KVPages, rows: jax.Array, slots: jax.Array) -> tuple[KVPages, object]:
    kv_pages = append_kv(kv_pages, rows, rows, slots)
    table = slots[:, None] // kv_pages.page_size
    return kv_pages, paged_decode_attention(rows, kv_pages, slots % kv_pages.page_size + 1, table, scale=0.1)


def write_while_decoding(kv_pages: KVPages, rows: jax.Array, slots: jax.Array) -> Any:
    table, lens = slots[:, None] // kv_pages.page_size, slots % kv_pages.page_size + 1
    output, kv_pages = paged_decode_attention(
        rows, kv_pages, lens, table, scale=0.1, new_kv=(rows, rows), slots=slots
    )
    return kv_pages, output


def write_and_attend(kv_pages: KVPages, rows: jax.Array, slots: jax.Array) -> tuple[KVPages, object]:
    kv_pages = append_kv(kv_pages, rows, rows, slots)
    starts, one = jnp.asarray([0, slots.shape[0]], jnp.int32), jnp.ones((1,), jnp.int32)
    kv_lens = slots[:1] + slots.shape[0]
    return kv_pages, ragged_paged_attention(rows, kv_pages, kv_lens, slots[None], starts, one, scale=0.1)


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [write, write_and_decode, write_while_decoding, write_and_attend])
def test_a_step_updates_the_cache_in_place(step: Callable[..., object], dtype: str, page_size: int) -> None:
    num_pages = 2**17 // page_size
    kv_pages = empty_kv_pages(num_pages, page_size, HEADS, HEAD_DIM, dtype)
    rows = jnp.ones((4, HEADS, HEAD_DIM), dtype)
    slots = jnp.arange(4, dtype=jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(kv_pages, rows, slots).compile()
    program = compiled.as_text()
    assert program is not None
    header = program.splitlines()[0]
    assert re.search(r"input_output_alias=\{ \{0?\}: \(0, \{\}, (may|must)-alias\)", header), header
    assert cache_sized(program, kv_pages.data.size, {"copy", "convert", "transpose", "broadcast"}) == []
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < bytes_per_token(HEADS, HEAD_DIM, dtype) * 2**17 // 4


def cache_sized(program: str, cache_size: int, opcodes: set[str]) -> list[str]:
    """Instructions of compiled HLO with one of `opcodes` and a result of at least `cache_size` numbers."""
    found: list[str] = []
    for shape, opcode in re.findall(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", program):
        size = int(np.prod([int(n) for n in shape.split(",") if n]))
        if opcode in opcodes and size >= cache_size:
            found.append(f"{opcode} [{shape}]")
    return found


def test_a_bfloat16_cache_on_a_cpu_holds_bits() -> None:
    kv_pages = empty_kv_pages(NUM_PAGES, 16, HEADS, HEAD_DIM, "bfloat16")
    assert (kv_pages.data.dtype, kv_pages.dtype) == (np.uint16, jnp.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_search_for_copies_finds_that_of_a_cache_that_is_kept(dtype: str) -> None:
    kv_pages = empty_kv_pages(2**7, 16, HEADS, HEAD_DIM, dtype)
    rows, slots = jnp.ones((4, HEADS, HEAD_DIM), dtype), jnp.arange(4, dtype=jnp.int32)
    program = jax.jit(write).lower(kv_pages, rows, slots).compile().as_text()  # nothing is donated
    assert cache_sized(program or "", kv_pages.data.size, {"copy"})


def test_the_search_for_copies_finds_a_cache_in_another_dtype() -> None:
    data = jnp.zeros((2**12, 64), jnp.bfloat16)
    program = jax.jit(lambda data: data.astype(jnp.float32)).lower(data).compile().as_text()
    assert cache_sized(program or "", data.size, {"convert"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_per_token_are_what_the_data_takes(dtype: str) -> None:
    kv_pages = empty_kv_pages(NUM_PAGES, 16, HEADS, HEAD_DIM, dtype)
    assert bytes_per_token(HEADS, HEAD_DIM, dtype) * NUM_PAGES * 16 == kv_pages.data.nbytes
