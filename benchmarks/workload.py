"""The workload that side-by-side runs share, and the sizes that its figures are divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..kernels import bytes_per_token
from ..model import Model, Qwen3Config, num_parameters


@dataclass(frozen=True)
class Workload:
    """Random prompts, greedy decoding, end-of-sequence ignored.

    Attributes:
        model: a published shape, with random bfloat16 weights.
        prefill_tokens: length of the prompt that prefill is timed on.
        decode_batches: batch sizes that decoding is timed at.
        prompt_tokens, new_tokens: of each sequence when decoding is timed.
    """

    model: str = "Qwen/Qwen3-0.6B"
    prefill_tokens: int = 512
    decode_batches: tuple[int, ...] = (1, 16)
    prompt_tokens: int = 128
    new_tokens: int = 48

    def prompt(self, length: int, vocab_size: int, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(0, vocab_size - 1000, length).tolist()


def check_has_no_experts(config: Qwen3Config) -> None:
    """Raises ValueError: a model with experts, whose tokens are multiplied with some of them."""
    if config.experts is not None:
        raise ValueError(
            "a model with experts cannot be measured: the bytes and operations of its steps differ, with the "
            "experts that tokens take"
        )


def matrix_parameters(config: Qwen3Config) -> int:
    """Parameters that every token is multiplied with: all but the embedding, which is only looked up.

    Raises:
        ValueError: a model with experts, whose tokens are multiplied with some of them.
    """
    check_has_no_experts(config)
    looked_up = config.vocab_size * config.hidden_size * (0 if config.tie_word_embeddings else 1)
    return num_parameters(config) - looked_up


def prefill_operations(config: Qwen3Config, num_tokens: int) -> int:
    """Floating-point operations of a prefill: 2 per weight and token, 4 per visible pair, head and dimension.

    The output matrix is used for the last token only.
    """
    head = config.vocab_size * config.hidden_size
    body = matrix_parameters(config) - head
    pairs = num_tokens * (num_tokens + 1) // 2
    attention = 4 * pairs * config.num_q_heads * config.head_dim * config.num_layers
    return 2 * body * num_tokens + 2 * head + attention


def decode_bytes(config: Qwen3Config, batch: int, context: int) -> int:
    """Bytes that one decode step must read: every matrix once, and each sequence's keys and values."""
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * batch
    return 2 * (matrix_parameters(config) + cache)


@dataclass(frozen=True)
class Sizes:
    """Bytes that steps read.

    Attributes:
        weights: of every matrix; an embedding that is only looked up does not count.
        token: of a token's keys and values in all layers.
    """

    weights: int
    token: int

    @classmethod
    def of(cls, model: Model) -> Sizes:
        """As the model's weights and cache are stored."""
        check_has_no_experts(model.config)
        params, config = model.params, model.config
        embedding: Any = params.embedding
        arrays: list[jax.Array] = jax.tree.leaves(params)
        looked_up = 0 if params.lm_head is None else sum(part.nbytes for part in jax.tree.leaves(embedding))
        cache = bytes_per_token(config.num_kv_heads, config.head_dim, config.kv_dtype or config.dtype)
        return cls(sum(array.nbytes for array in arrays) - looked_up, config.num_layers * cache)

    @classmethod
    def in_bfloat16(cls, config: Qwen3Config) -> Sizes:
        """Weights and cache in 16 bits."""
        weights = decode_bytes(config, 1, 0)
        return cls(weights, decode_bytes(config, 1, 1) - weights)
