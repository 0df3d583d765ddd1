"""Steps, sampling and loading at the shape of Qwen3-0.6B, random bfloat16 weights, on the default device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.benchmarks.loading import copy_weights, write_checkpoint
from vsurge.benchmarks.workload import decode_bytes, prefill_operations
from vsurge.kernels import empty_kv_pages
from vsurge.model import Model, forward, load_model, num_parameters, random_model
from vsurge.model.qwen3 import Batch
from vsurge.runtime.sampling import MAX_BANNED, SamplingInputs, sample

SHAPE, PAGE_SIZE = "Qwen/Qwen3-0.6B", 128


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(SHAPE, seed=0)


def step_on(model: Model, batch: Batch, num_pages: int) -> Callable[[], Any]:
    """A forward pass and the likeliest token, over a cache that every call hands to the next."""
    config = model.config
    held = [
        tuple(
            empty_kv_pages(num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, jnp.bfloat16)
            for _ in range(config.num_layers)
        )
    ]

    @partial(jax.jit, donate_argnums=1)
    def step(params: Any, kv_pages: Any, batch: Batch) -> Any:
        logits, kv_pages = forward(params, config, batch, kv_pages)
        return logits.max(-1), kv_pages

    def run() -> Any:
        best, held[0] = step(model.params, held[0], batch)
        return best

    return run


@pytest.mark.parametrize("context", [128, 2048])
@pytest.mark.parametrize("num_seqs", [1, 4, 16])
def test_decode_step(model: Model, measure: Callable[..., None], num_seqs: int, context: int) -> None:
    pages = -(-context // PAGE_SIZE)
    table = np.arange(num_seqs * pages, dtype=np.int32).reshape(num_seqs, pages)
    positions = np.full(num_seqs, context - 1, np.int32)
    batch = Batch(
        token_ids=jnp.arange(num_seqs, dtype=jnp.int32),
        positions=jnp.asarray(positions),
        slots=jnp.asarray(table[:, -1] * PAGE_SIZE + positions % PAGE_SIZE),
        kv_lens=jnp.asarray(positions + 1),
        page_table=jnp.asarray(table),
    )
    run = step_on(model, batch, num_seqs * pages)
    measure(run, bytes=decode_bytes(model.config, num_seqs, context), tokens=num_seqs)


@pytest.mark.parametrize("num_tokens", [128, 512])
def test_prefill_step(model: Model, measure: Callable[..., None], num_tokens: int) -> None:
    positions = jnp.arange(num_tokens, dtype=jnp.int32)
    pages = -(-num_tokens // PAGE_SIZE)
    batch = Batch(
        token_ids=positions,
        positions=positions,
        slots=positions,
        kv_lens=jnp.asarray([num_tokens], jnp.int32),
        page_table=jnp.arange(pages, dtype=jnp.int32)[None],
        query_starts=jnp.asarray([0, num_tokens], jnp.int32),
        num_seqs=jnp.asarray([1], jnp.int32),
        logit_rows=jnp.asarray([num_tokens - 1], jnp.int32),
    )
    operations = prefill_operations(model.config, num_tokens)
    measure(step_on(model, batch, pages), operations=operations, tokens=num_tokens)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.6, 20, 0.95, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.05)],
    ids=["greedy", "temperature", "qwen3-default", "top_p", "min_p"],
)
def test_sampling(
    measure: Callable[..., None], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    rows, vocab = 16, 151936
    logits = 3 * jax.random.normal(jax.random.key(0), (rows, vocab), jnp.float32)
    inputs = SamplingInputs(
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        min_p=jnp.full(rows, min_p, jnp.float32),
        seed=jnp.zeros((rows, 2), jnp.uint32),
        position=jnp.arange(rows, dtype=jnp.int32),
        banned=jnp.full((rows, MAX_BANNED), -1, jnp.int32),
        banned_before=jnp.zeros(rows, jnp.int32),
    )
    chosen = jax.jit(sample)
    measure(lambda: chosen(logits, inputs), bytes=logits.nbytes)


def test_loading(model: Model, measure: Callable[..., None], tmp_path: Path) -> None:
    write_checkpoint(model.config, tmp_path)
    measure(lambda: load_model(tmp_path).params, bytes=2 * num_parameters(model.config))


def test_copying_the_same_bytes(model: Model, measure: Callable[..., None], tmp_path: Path) -> None:
    """What `test_loading` is to be compared with."""
    write_checkpoint(model.config, tmp_path)
    measure(
        lambda: copy_weights(model.config, tmp_path, one_by_one=True), bytes=2 * num_parameters(model.config)
    )
