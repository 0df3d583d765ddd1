"""Rotary frequencies against those of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Qwen3Config as TheirConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from vsurge.model import Qwen3Config, Yarn
from vsurge.model.config_json import config_from_json
from vsurge.model.rope import rotary_frequencies, rotary_tables, rotate

CARD = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "as the model card prescribes": CARD,
    "factor 1": CARD | {"factor": 1.0},
    "not truncated": CARD | {"truncate": False},
    "other betas": CARD | {"beta_fast": 8.0, "beta_slow": 2.0},
    "a band of no width": CARD | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    "a short context": CARD | {"rope_theta": 1e4, "original_max_position_embeddings": 16},
    "attention_factor": CARD | {"attention_factor": 0.7},
    "mscale": CARD | {"mscale": 0.9, "mscale_all_dim": 0.6},
    "original context from max_position_embeddings": {k: v for k, v in CARD.items() if "original" not in k},
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_attention_factor_equal_those_of_transformers(case, head_dim):
    shape = {"max_position_embeddings": 40960, "head_dim": head_dim}
    theirs = Qwen3RotaryEmbedding(TheirConfig(rope_parameters=dict(CASES[case]), **shape))
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = config_from_json({**sizes, **heads, **shape, "rope_parameters": CASES[case]})
    frequencies, factor = rotary_frequencies(config)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


CONFIG = Qwen3Config(8, 8, 8, 1, 1, 1, 64)


def test_scores_depend_on_the_distance_of_two_positions_alone():
    x, y = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)

    def score(query_position: int, key_position: int) -> float:
        tables = rotary_tables(CONFIG, jnp.asarray([query_position, key_position], jnp.int32))
        query, key = np.asarray(rotate(jnp.asarray([[x], [y]]), tables))
        return float((query * key).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-3)
    assert abs(score(7, 3) - score(17, 3)) > 1.0


def test_tables_are_float32_and_hold_the_attention_factor():
    config = dataclasses.replace(CONFIG, yarn=Yarn(4.0, 32, attention_factor=1.5))
    cosine, sine = rotary_tables(config, jnp.arange(5, dtype=jnp.int32))
    assert cosine.dtype == sine.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(jnp.square(cosine) + jnp.square(sine)), 1.5**2, rtol=1e-5)
