"""Steps, sampling and loading at the shape of Qwen3-0.6B, random bfloat16 weights, on the default device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vsurge.benchmarks.engine.steps import StepCase, cases
from vsurge.benchmarks.loading import copy_weights, write_checkpoint
from vsurge.model import Model, load_model, num_parameters, random_model
from vsurge.runtime.sampling import MAX_BANNED, SamplingInputs, sample

SHAPE = "Qwen/Qwen3-0.6B"


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(SHAPE, seed=0)


@pytest.mark.parametrize(
    "case", list(cases(jax.default_backend())), ids=lambda case: f"{case.kind}-{case.num_seqs}-{case.context}"
)
def test_step(model: Model, measure: Callable[..., None], case: StepCase) -> None:
    config = model.config
    measure(
        case.build(model),
        bytes=case.num_bytes(config),
        operations=case.operations(config),
        tokens=case.tokens,
    )


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
        banned=jnp.full((rows, MAX_BANNED), -1, jnp.int32),
        banned_before=jnp.zeros(rows, jnp.int32),
    )
    positions = jnp.arange(rows, dtype=jnp.int32)
    chosen = jax.jit(sample)
    measure(lambda: chosen(logits, inputs, positions), bytes=logits.nbytes)


def test_loading(model: Model, measure: Callable[..., None], tmp_path: Path) -> None:
    write_checkpoint(model.config, tmp_path)
    measure(lambda: load_model(tmp_path).params, bytes=2 * num_parameters(model.config))


def test_copying_the_same_bytes(model: Model, measure: Callable[..., None], tmp_path: Path) -> None:
    """What `test_loading` is to be compared with."""
    write_checkpoint(model.config, tmp_path)
    measure(
        lambda: copy_weights(model.config, tmp_path, one_by_one=True), bytes=2 * num_parameters(model.config)
    )
