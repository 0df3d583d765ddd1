"""The workload that side-by-side runs share, and the sizes that its figures are divided by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..model import Qwen3Config, num_parameters


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


def matrix_parameters(config: Qwen3Config) -> int:
    """Parameters that every token is multiplied with: all but the embedding, which is only looked up.

    Raises:
        ValueError: a model with experts, whose tokens are multiplied with some of them.
    """
    if config.experts is not None:
        raise ValueError("a model with experts has no number of bytes and operations that all steps share")
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
