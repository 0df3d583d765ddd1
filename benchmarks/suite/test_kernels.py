"""One layer's kernels at the shape of Qwen3-0.6B on the default device, in buffers larger than its caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import KVPages, append_kv, empty_kv_pages, paged_decode_attention, ragged_paged_attention

Q_HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 8, 128, 8
SCALE = HEAD_DIM**-0.5


def cache(num_tokens: int, page_size: int) -> tuple[KVPages, ...]:
    """As many layers as make the caches exceed what the processor keeps close."""
    num_pages = -(-num_tokens // page_size)
    return tuple(
        empty_kv_pages(num_pages, page_size, KV_HEADS, HEAD_DIM, jnp.bfloat16) for _ in range(LAYERS)
    )


def queries(num_tokens: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (num_tokens, Q_HEADS, HEAD_DIM), jnp.bfloat16)


def table(num_seqs: int, length: int, page_size: int) -> jax.Array:
    pages_per_seq = -(-length // page_size)
    shuffled = np.random.default_rng(0).permutation(num_seqs * pages_per_seq)
    return jnp.asarray(shuffled.reshape(num_seqs, pages_per_seq), jnp.int32)


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize(("num_seqs", "length"), [(1, 2048), (16, 128), (16, 640), (64, 512)])
def test_decode_attention(measure: Callable[..., None], num_seqs: int, length: int, page_size: int) -> None:
    pages = cache(num_seqs * -(-length // page_size) * page_size, page_size)
    lengths = jnp.full(num_seqs, length, jnp.int32)
    arguments = queries(num_seqs), lengths, table(num_seqs, length, page_size)

    @jax.jit
    def layers(pages: tuple[KVPages, ...], q: jax.Array, lengths: jax.Array, table: jax.Array) -> Any:
        return [paged_decode_attention(q, kv, lengths, table, scale=SCALE) for kv in pages]

    measure(lambda: layers(pages, *arguments), bytes=4 * LAYERS * num_seqs * length * KV_HEADS * HEAD_DIM)


@pytest.mark.parametrize(("new_tokens", "length"), [(128, 2048), (512, 512), (2048, 2048)])
def test_prefill_attention(measure: Callable[..., None], new_tokens: int, length: int) -> None:
    pages = cache(length, 128)
    metadata = (
        jnp.asarray([length], jnp.int32),
        table(1, length, 128),
        jnp.asarray([0, new_tokens], jnp.int32),
        jnp.asarray([1], jnp.int32),
    )

    @jax.jit
    def layers(pages: tuple[KVPages, ...], q: jax.Array, *metadata: jax.Array) -> Any:
        return [ragged_paged_attention(q, kv, *metadata, scale=SCALE) for kv in pages]

    visible = new_tokens * (2 * length - new_tokens + 1) // 2  # pairs of query and key
    measure(
        lambda: layers(pages, queries(new_tokens), *metadata),
        operations=4 * LAYERS * visible * Q_HEADS * HEAD_DIM,
    )


@pytest.mark.parametrize("num_tokens", [16, 512])
def test_cache_write(measure: Callable[..., None], num_tokens: int) -> None:
    held = [cache(64 * 128, 128)]
    rows = jax.random.normal(jax.random.key(0), (num_tokens, KV_HEADS, HEAD_DIM), jnp.bfloat16)
    slots = jnp.asarray(np.random.default_rng(0).permutation(64 * 128)[:num_tokens], jnp.int32)

    @partial(jax.jit, donate_argnums=0)
    def layers(pages: tuple[KVPages, ...]) -> tuple[KVPages, ...]:
        return tuple(append_kv(kv, rows, rows, slots) for kv in pages)

    def write() -> Any:
        held[0] = layers(held[0])
        return held[0]

    measure(write, bytes=2 * LAYERS * 2 * num_tokens * KV_HEADS * HEAD_DIM)
