"""Our logits against those of transformers, in torch on the CPU, for random checkpoints that it wrote."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vsurge.model import Batch, Model, forward, load_model

TOLERANCE = 1e-4  # relative, per position
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, dict[str, Any]] = {
    "untied, 1 query head per kv head": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "tied, 2 query heads per kv head": {"tie_word_embeddings": True, "vocab_size": 97},
    "head_dim 128, 4 query heads per kv head": {"head_dim": 128, "num_key_value_heads": 1},
    "tied, head_dim 128, 8 query heads per kv head": {
        "head_dim": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "vocab_size": 211,
    },
    "attention_bias": {"attention_bias": True},
    "YaRN": {"rope_parameters": YARN},
    "YaRN, its range not rounded": {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}},
}


def random_prompt(model: Model, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers_however_the_prompt_is_cut(
    case, save_qwen3, cached_sequence, torch_logits, row_errors
):
    folder = save_qwen3(**CASES[case])
    model = load_model(folder)
    prompt = random_prompt(model, 60)  # almost four times YaRN's original context
    expected = torch_logits(folder, prompt)

    whole = cached_sequence(model).prefill(prompt, 64)

    sequence = cached_sequence(model)  # uneven chunks, in steps of the same size: one program less to compile
    chunked = np.concatenate(
        [sequence.prefill(chunk, 64) for chunk in (prompt[:21], prompt[21:53], prompt[53:])]
    )

    sequence = cached_sequence(model)
    decoded = np.stack([sequence.decode(token) for token in prompt])

    for found in (whole, chunked, decoded):
        assert row_errors(found, expected).max() <= TOLERANCE


def test_a_checkpoint_in_many_shards_equals_the_model_that_was_saved(
    save_qwen3, cached_sequence, torch_logits, row_errors
):
    folder = save_qwen3(max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    model = load_model(folder)
    prompt = random_prompt(model, 16)
    found = cached_sequence(model).prefill(prompt, 16)
    assert row_errors(found, torch_logits(folder, prompt)).max() <= TOLERANCE


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def test_bfloat16_is_as_close_to_float32_as_in_transformers(
    save_qwen3, cached_sequence, torch_logits, row_errors
):
    """Same bfloat16 weights in all three; the root mean square of the relative error over 240 positions."""
    folder = save_qwen3(dtype=torch.bfloat16, hidden_size=128, num_hidden_layers=4, head_dim=128)
    model = load_model(folder)
    assert model.config.dtype == np.dtype("bfloat16")
    prompt = random_prompt(model, 240)
    ours, theirs = (
        cached_sequence(model, 256).prefill(prompt, 240),
        torch_logits(folder, prompt, torch.bfloat16),
    )
    exact = torch_logits(folder, prompt)
    assert rms(row_errors(ours, exact)) <= rms(row_errors(theirs, exact))


def test_float32_computation_on_bfloat16_weights_is_exact(
    save_qwen3, cached_sequence, torch_logits, row_errors
):
    folder = save_qwen3(dtype=torch.bfloat16)
    model = load_model(folder, compute_dtype="float32")
    assert model.params.embedding.dtype == np.dtype("bfloat16")
    prompt = random_prompt(model, 16)
    found = cached_sequence(model).prefill(prompt, 16)
    assert row_errors(found, torch_logits(folder, prompt)).max() <= TOLERANCE


def test_logit_rows_choose_the_rows_of_the_logits(save_qwen3, cached_sequence):
    model = load_model(save_qwen3())
    prompt, rows = random_prompt(model, 8), np.array([6, 2, 2], np.int32)
    every = cached_sequence(model).prefill(prompt, 8)
    sequence = cached_sequence(model)
    batch = Batch(
        token_ids=jnp.asarray(prompt, jnp.int32),
        positions=jnp.arange(8, dtype=jnp.int32),
        slots=jnp.arange(8, dtype=jnp.int32),
        kv_lens=jnp.asarray([8], jnp.int32),
        page_table=jnp.asarray([[0]], jnp.int32),
        query_starts=jnp.asarray([0, 8], jnp.int32),
        num_seqs=jnp.asarray([1], jnp.int32),
    )
    chosen, _ = forward(
        model.params,
        model.config,
        dataclasses.replace(batch, logit_rows=jnp.asarray(rows)),
        sequence.kv_pages,
    )
    np.testing.assert_allclose(np.asarray(chosen), every[rows], rtol=1e-4, atol=1e-5)
