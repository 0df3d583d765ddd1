"""Writing into the cache: what is written where, and that nothing of the cache's size is copied for it."""

from __future__ import annotations

import itertools
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
from vsurge.kernels.append import reference

from .cases import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("small_units")

NUM_PAGES, HEADS, HEAD_DIM = 5, 2, 16
DTYPES = ("float32", "bfloat16")
QUANTIZED = ("int8", "float8_e4m3fn")
CASES = [
    *(
        pytest.param(page_size, *dtypes, marks=() if page_size == 16 else pytest.mark.slow)
        for page_size, *dtypes in itertools.product([16, 64], DTYPES, DTYPES)
    ),
    (16, "bfloat16", "int8"),
    pytest.param(64, "float32", "float8_e4m3fn", marks=pytest.mark.slow),
]  # page size, dtype of rows, of the cache


def random_rows(rng: np.random.Generator, count: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rows = rng.standard_normal((2, count, HEADS, HEAD_DIM))
    return jnp.asarray(rows[0], dtype), jnp.asarray(rows[1], dtype)


def read_back(rows: jax.Array, dtype: str) -> np.ndarray:
    """What a cache of a dtype gives for rows."""
    if dtype not in QUANTIZED:
        return np.asarray(rows.astype(dtype))
    found = [reference.quantize(np.asarray(row), np.dtype(dtype)) for row in rows]
    return np.stack([stored.astype(np.float32) * scales[:, None] for stored, scales in found])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize(("page_size", "row_dtype", "cache_dtype"), CASES)
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
        stored = [read_back(rows, cache_dtype) for rows in (keys, values)]
        written |= {
            slot: (stored[0][i], stored[1][i])
            for i, slot in enumerate(slots.tolist())
            if slot in range(num_slots)
        }
    keys, values = read_kv(kv_pages, jnp.arange(num_slots, dtype=jnp.int32))
    assert keys.dtype == values.dtype == ("float32" if cache_dtype in QUANTIZED else cache_dtype)
    untouched = (np.zeros((HEADS, HEAD_DIM)), np.zeros((HEADS, HEAD_DIM)))
    for slot in range(num_slots):
        want_key, want_value = written.get(slot, untouched)
        np.testing.assert_array_equal(np.asarray(keys[slot]), want_key)
        np.testing.assert_array_equal(np.asarray(values[slot]), want_value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_and_negative_zero_survive_the_round_trip(implementation: Implementation) -> None:
    kv_pages = empty_kv_pages(1, 16, 1, 16, "bfloat16")
    row = jnp.asarray([[4 * [np.nan, -0.0, np.inf, 2.0**-130]]], jnp.bfloat16)  # the last one is subnormal
    kv_pages = append_kv(kv_pages, row, -row, jnp.asarray([3], jnp.int32), implementation=implementation)
    keys, values = read_kv(kv_pages, jnp.asarray([3], jnp.int32))
    for got, want in ((keys, row), (values, -row)):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(want).view(np.uint16))


@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        *(("bfloat16", implementation) for implementation in IMPLEMENTATIONS),
        ("int8", "xla"),
        pytest.param("int8", "mosaic_tpu", marks=pytest.mark.slow),
    ],
)
def test_the_argument_is_donated(dtype: str, implementation: Implementation) -> None:
    kv_pages = empty_kv_pages(NUM_PAGES, 16, HEADS, HEAD_DIM, dtype)
    keys, values = random_rows(np.random.default_rng(0), 1, "bfloat16")
    append_kv(kv_pages, keys, values, jnp.asarray([0], jnp.int32), implementation=implementation)
    assert all(array.is_deleted() for array in jax.tree.leaves(kv_pages))


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


STEPS = (write, write_and_decode, write_while_decoding, write_and_attend)


@pytest.mark.parametrize(
    ("step", "dtype", "page_size"),
    [
        *itertools.product(STEPS, DTYPES, [16, 128]),
        (write, "int8", 16),
        *(pytest.param(step, "int8", 128, marks=pytest.mark.slow) for step in STEPS),
        *(pytest.param(step, "float8_e4m3fn", 16, marks=pytest.mark.slow) for step in STEPS),
    ],
)
def test_a_step_updates_the_cache_in_place(step: Callable[..., object], dtype: str, page_size: int) -> None:
    num_pages = 2**17 // page_size
    kv_pages = empty_kv_pages(num_pages, page_size, HEADS, HEAD_DIM, dtype)
    rows = jnp.ones((4, HEADS, HEAD_DIM), "bfloat16" if dtype in QUANTIZED else dtype)
    slots = jnp.arange(4, dtype=jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(kv_pages, rows, slots).compile()
    program = compiled.as_text()
    assert program is not None
    header = program.splitlines()[0]
    assert re.search(r"input_output_alias=\{ \{0?\}: \(0, \{\}, (may|must)-alias\)", header), header
    if dtype in QUANTIZED:  # the scales
        assert re.search(r", \{1\}: \(1, \{\}, (may|must)-alias\)", header), header
    smallest = min(array.size for array in jax.tree.leaves(kv_pages))
    assert cache_sized(program, smallest, {"copy", "convert", "transpose", "broadcast"}) == []
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


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", np.uint16), ("float8_e4m3fn", np.uint8), ("int8", np.int8)]
)
def test_a_cache_on_a_cpu_holds_what_a_cpu_scatters(dtype: str, stored: type) -> None:
    kv_pages = empty_kv_pages(NUM_PAGES, 16, HEADS, HEAD_DIM, dtype)
    assert (kv_pages.data.dtype, kv_pages.dtype) == (stored, jnp.dtype(dtype))


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


@pytest.mark.parametrize("dtype", [*DTYPES, *QUANTIZED])
def test_bytes_per_token_are_what_the_cache_takes(dtype: str) -> None:
    kv_pages = empty_kv_pages(NUM_PAGES, 16, HEADS, HEAD_DIM, dtype)
    taken = sum(array.nbytes for array in jax.tree.leaves(kv_pages))
    assert bytes_per_token(HEADS, HEAD_DIM, dtype) * NUM_PAGES * 16 == taken
