"""Small random Qwen3 checkpoints that transformers writes, and our model run over a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from vsurge.kernels import KVPages, empty_kv_pages
from vsurge.model import Batch, Model, forward

PAGE_SIZE = 16
MAX_SEQS = 3
step = jax.jit(forward, static_argnums=1, donate_argnums=3)


@dataclass
class CachedSequence:
    """One sequence in a cache whose pages lie in no order; the other rows of every batch are padding."""

    model: Model
    kv_pages: tuple[KVPages, ...]
    pages: np.ndarray
    length: int = 0

    @classmethod
    def empty(cls, model: Model, max_length: int = 64) -> CachedSequence:
        config = model.config
        num_pages = max_length // PAGE_SIZE
        kv_pages = tuple(
            empty_kv_pages(num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, config.cache_dtype)
            for _ in range(config.num_layers)
        )
        pages = np.random.default_rng(1).permutation(num_pages).astype(np.int32)
        return cls(model, kv_pages, pages)

    def prefill(self, token_ids: Sequence[int], size: int) -> np.ndarray:
        """Logits [len(token_ids), vocab] after one step of `size` tokens, the last of which are padding."""
        count = len(token_ids)
        padded = np.zeros(size, np.int32)
        padded[:count] = token_ids
        positions, slots = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        positions[:count] = np.arange(self.length, self.length + count)
        slots[:count] = self._slots(positions[:count])
        self.length += count
        starts = np.full(MAX_SEQS + 1, count, np.int32)
        starts[0] = 0
        return self._run(
            token_ids=padded,
            positions=positions,
            slots=slots,
            query_starts=starts,
            num_seqs=np.array([1], np.int32),
        )[:count]

    def decode(self, token_id: int) -> np.ndarray:
        """Logits [vocab] after one decode step."""
        token_ids, positions = np.zeros(MAX_SEQS, np.int32), np.zeros(MAX_SEQS, np.int32)
        slots = np.full(MAX_SEQS, -1, np.int32)
        token_ids[0], positions[0] = token_id, self.length
        slots[0] = self._slots(positions[:1])[0]
        self.length += 1
        return self._run(token_ids=token_ids, positions=positions, slots=slots)[0]

    def _slots(self, positions: np.ndarray) -> np.ndarray:
        return self.pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE

    def _run(self, **fields: np.ndarray) -> np.ndarray:
        kv_lens, page_table = np.zeros(MAX_SEQS, np.int32), np.zeros((MAX_SEQS, self.pages.size), np.int32)
        kv_lens[0], page_table[0] = self.length, self.pages
        arrays = {name: jnp.asarray(value) for name, value in fields.items()}
        batch = Batch(kv_lens=jnp.asarray(kv_lens), page_table=jnp.asarray(page_table), **arrays)
        logits, self.kv_pages = step(self.model.params, self.model.config, batch, self.kv_pages)
        return np.asarray(logits)


@pytest.fixture
def cached_sequence() -> Callable[..., CachedSequence]:
    """Makes an empty sequence of a model."""
    return CachedSequence.empty


@pytest.fixture
def greedy_tokens() -> Callable[..., list[int]]:
    """The tokens that a model thinks likeliest after a prompt, up to a stop token."""

    def generate(model: Model, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        sequence = CachedSequence.empty(model, 256)
        size = -(-len(prompt) // 32) * 32  # few shapes to compile
        tokens = [int(sequence.prefill(prompt, size)[-1].argmax())]
        while len(tokens) < count and tokens[-1] not in stop:
            tokens.append(int(sequence.decode(tokens[-1]).argmax()))
        return tokens

    return generate


SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}


EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


@pytest.fixture
def save_qwen3(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random checkpoint as transformers does, and returns its folder; with `experts` of a Qwen3-MoE.

    The weights are no fresh initialization, whose logits hardly depend on the input: matrices keep the size
    of their input, norms and biases are spread out, so that a part left out or swapped changes the logits.
    """

    def save(
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        seed: int = 0,
        experts: bool = False,
        **changes: Any,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        if experts:
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(SHAPE | EXPERTS | changes)))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**(SHAPE | changes)))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight"):
                    weight.uniform_(0.5, 2.0, generator=generator)
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.5, generator=generator)
                else:
                    weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
        folder = tmp_path / "checkpoint"
        torch.nn.Module.to(model, dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return save


@pytest.fixture
def torch_logits() -> Callable[..., np.ndarray]:
    """Logits [len(token_ids), vocab] of a checkpoint, computed by transformers in the given dtype."""

    def compute(folder: Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            return model(torch.tensor([list(token_ids)])).logits[0].float().numpy()

    return compute


@pytest.fixture
def row_errors() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Per row, the norm of the difference over the norm of what is expected."""

    def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        assert found.shape == expected.shape
        assert np.isfinite(expected).all()
        difference = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
        return difference / np.linalg.norm(expected.astype(np.float64), axis=-1)

    return errors
