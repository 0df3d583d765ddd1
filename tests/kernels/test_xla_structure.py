"""How the xla implementation computes: what it reads follows the lengths, its products avoid the cliffs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import blockwise, empty_kv_pages, kv_pages, paged_decode_attention, ragged_paged_attention

from .batches import Setup
from .jaxprs import equations

SETUP = Setup()
BLOCK = 128  # tokens of a sequence in one visit
WIDE_TABLE = 8 * BLOCK // 16  # pages of 16, with room for as many blocks as few queries visit at once
Reads = list[np.ndarray]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """The page numbers of every block that compiled programs load from now on, [num_seqs, pages] each."""
    loaded: Reads = []

    def load_and_record(cache: Any, pages: jax.Array, kind: int, valid: Any = None) -> jax.Array:
        if kind == kv_pages.KEYS:
            jax.debug.callback(lambda pages: loaded.append(np.asarray(pages)), pages)
        return kv_pages.load_block(cache, pages, kind, valid)

    jax.clear_caches()  # what was traced before does not record
    monkeypatch.setattr(blockwise, "load_block", load_and_record)
    yield loaded
    jax.clear_caches()


def own_pages(num_seqs: int, width: int) -> jax.Array:
    """A table in which column c of sequence s is page s * width + c."""
    return jnp.arange(num_seqs * width, dtype=jnp.int32).reshape(num_seqs, width)


def decoder(num_seqs: int, width: int, page_size: int, **options: Any) -> Callable[[list[int]], None]:
    cache = empty_kv_pages(num_seqs * width, page_size, SETUP.num_kv_heads, SETUP.head_dim, "float32")
    queries = jnp.ones((num_seqs, SETUP.num_q_heads, SETUP.head_dim))

    @jax.jit
    def attend(kv_lens: jax.Array) -> Any:
        return paged_decode_attention(
            queries, cache, kv_lens, own_pages(num_seqs, width), scale=1.0, **options
        )

    def run(kv_lens: list[int]) -> None:
        jax.block_until_ready(attend(jnp.asarray(kv_lens, jnp.int32)))
        jax.effects_barrier()

    return run


@pytest.mark.parametrize("width", [32, 256])
def test_decode_visits_as_many_blocks_as_the_longest_of_a_group_has(reads: Reads, width: int) -> None:
    decode = decoder(5, width, page_size=16)
    # Sorted by length and taken in fours from the long end, each group walks to its own longest.
    for kv_lens, visits in [
        ([1, 2, 3, 4, 5], 2),
        ([300, 5, 129, 130, 0], 3),
        ([500, 0, 0, 0, 0], 4),
        ([0] * 5, 0),
    ]:
        reads.clear()
        decode(kv_lens)
        assert len(reads) == visits, kv_lens
        columns = [pages % width for pages in reads]
        assert max((int(c.max()) for c in columns), default=-1) < -(-max(kv_lens) // BLOCK) * BLOCK // 16


@pytest.mark.parametrize("page_size", [16, 128])
def test_a_window_skips_the_blocks_before_it(reads: Reads, page_size: int) -> None:
    width = 1024 // page_size
    decoder(2, width, page_size, sliding_window=100)([1000, 150])
    assert len(reads) == 2
    of_the_longest = np.concatenate([pages[pages < width] for pages in reads])
    assert of_the_longest.min() * page_size // BLOCK == (1000 - 100) // BLOCK


@pytest.mark.parametrize("width", [32, 256])
def test_prefill_visits_the_blocks_up_to_each_query_block(reads: Reads, width: int) -> None:
    num_tokens = 300
    cache = empty_kv_pages(2 * width, 16, SETUP.num_kv_heads, SETUP.head_dim, "float32")
    queries = jnp.ones((num_tokens, SETUP.num_q_heads, SETUP.head_dim))

    @jax.jit
    def attend(kv_lens: jax.Array, starts: jax.Array) -> Any:
        one = jnp.ones((1,), jnp.int32)
        return ragged_paged_attention(
            queries, cache, kv_lens, own_pages(2, width), starts, 2 * one, scale=1.0
        )

    # Query blocks of the first sequence have 128 tokens; up to 64 that are left take blocks of 32, and more
    # another one of 128. The second is decoding.
    for kv_lens, starts, visits in [
        ([299, 1], [0, 299, 300], 1 + 2 + (3 + 3) + 1),
        ([288, 1], [0, 288, 289], 1 + 2 + 3 + 1),
        ([192, 1], [0, 192, 193], 1 + (2 + 2) + 1),
        ([193, 1], [0, 193, 194], 1 + 2 + 1),
        ([20, 500], [0, 20, 21], 1 + 4),
    ]:
        reads.clear()
        jax.block_until_ready(attend(jnp.asarray(kv_lens, jnp.int32), jnp.asarray(starts, jnp.int32)))
        jax.effects_barrier()
        assert len(reads) == visits


def test_a_few_of_a_few_tokens_take_a_block_of_half_as_many() -> None:
    num_queries, heads, kv_heads = 8, 4, 2
    dots = [
        equation.invars[0].aval.shape[2]
        for equation in trace("ragged", "float32", "float32", heads=heads, num_seqs=num_queries)
        if equation.primitive.name == "dot_general"
    ]
    group = heads // kv_heads
    assert set(dots) == {8 * group, 4 * group, group}  # the last when decoding


def calls(
    query_dtype: str, cache_dtype: str, *, heads: int = 4, width: int = 8, num_seqs: int = 5
) -> tuple[dict[str, Callable[[Any], Any]], Any]:
    """Each kernel as a function of the cache, and a cache."""
    cache = empty_kv_pages(64, 16, 2, 64, cache_dtype)
    queries = jnp.ones((num_seqs, heads, 64), query_dtype)
    lens, table = jnp.ones((num_seqs,), jnp.int32), jnp.ones((num_seqs, width), jnp.int32)
    starts, one = jnp.arange(num_seqs + 1, dtype=jnp.int32), jnp.ones((1,), jnp.int32)

    def decode(cache: Any) -> Any:
        return paged_decode_attention(queries, cache, lens, table, scale=1.0, implementation="xla")

    def ragged(cache: Any) -> Any:
        return ragged_paged_attention(
            queries, cache, lens, table, starts, one, scale=1.0, implementation="xla"
        )

    return {"decode": decode, "ragged": ragged}, cache


def trace(kernel: str, *dtypes: str, **sizes: int) -> list[Any]:
    """The equations of a kernel's program, of every platform."""
    functions, cache = calls(*dtypes, **sizes)
    return list(equations(jax.make_jaxpr(functions[kernel])(cache).jaxpr))


@pytest.mark.parametrize("kernel", ["decode", "ragged"])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")], ids=str
)
def test_float32_products_are_at_the_highest_precision(kernel: str, dtypes: tuple[str, str]) -> None:
    program = trace(kernel, *dtypes, width=WIDE_TABLE)
    dots = [equation for equation in program if equation.primitive.name == "dot_general"]
    # Queries with keys, weights with values; ragged has them for large blocks, with several of the cache's at
    # once and with one, for small blocks, and for single tokens; all of it for a CPU and for other platforms.
    assert len(dots) == 2 * (8 if kernel == "ragged" else 2)
    for dot in dots:
        assert [v.aval.dtype for v in dot.invars] == [jnp.float32, jnp.float32]
        assert set(dot.params["precision"]) == {jax.lax.Precision.HIGHEST}


DOT = re.compile(
    r"stablehlo.dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>"
)


@pytest.mark.parametrize("kernel", ["decode", "ragged"])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")])
def test_products_of_bfloat16_are_of_float32_on_a_cpu_alone(
    kernel: str, cache_dtype: str, platform: str, dtype: str
) -> None:
    functions, cache = calls("bfloat16", cache_dtype, width=WIDE_TABLE)
    text = jax.jit(functions[kernel]).trace(cache).lower(lowering_platforms=(platform,)).as_text()
    assert DOT.findall(text) == [(dtype, dtype, "f32")] * (8 if kernel == "ragged" else 2)


@pytest.mark.parametrize(("num_tokens", "wide_blocks"), [(127, 8), (128, 4)])
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_blocks_are_visited_several_at_once_where_the_table_has_room_for_them(
    num_tokens: int, wide_blocks: int, sliding_window: int | None
) -> None:
    cache = empty_kv_pages(64, 16, 2, 64, "float32")
    one = jnp.ones((1,), jnp.int32)

    def attend(queries: jax.Array, width: int) -> Any:
        table, starts = jnp.zeros((1, width), jnp.int32), jnp.zeros((2,), jnp.int32)
        return ragged_paged_attention(
            queries, cache, one, table, starts, one, scale=1.0, sliding_window=sliding_window,
            implementation="xla",
        )  # fmt: skip

    def keys_at_once(width: int) -> set[int]:
        program = jax.make_jaxpr(partial(attend, width=width))(jnp.ones((num_tokens, 4, 64)))
        dots = [each for each in equations(program.jaxpr) if each.primitive.name == "dot_general"]
        return {dot.invars[1].aval.shape[2] for dot in dots}  # of keys as of values

    pages = wide_blocks * BLOCK // 16
    assert keys_at_once(pages - 1) == {BLOCK}
    assert keys_at_once(pages) == ({BLOCK} if sliding_window else {BLOCK, wide_blocks * BLOCK})


@pytest.mark.parametrize("kernel", ["decode", "ragged"])
def test_only_page_numbers_grow_with_the_page_table(kernel: str) -> None:
    def sizes(width: int) -> list[tuple[int, ...]]:
        outputs = [
            v.aval for equation in trace(kernel, "float32", "bfloat16", width=width) for v in equation.outvars
        ]
        return sorted(a.shape for a in outputs if a.dtype in (jnp.float32, jnp.bfloat16, jnp.uint16))

    assert sizes(8) == sizes(WIDE_TABLE - 1)
    assert sizes(WIDE_TABLE) == sizes(512)
