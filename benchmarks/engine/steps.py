"""Forward passes with the likeliest token, as an engine's steps are, by batch and context."""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...kernels import empty_kv_pages
from ...model import Batch, Model, Qwen3Config, forward
from ..attention import attention_of
from ..workload import decode_bytes, prefill_operations

PAGE_SIZE = 128


@dataclass(frozen=True)
class StepCase:
    """A step.

    Attributes:
        kind: "decode", one token of each sequence; or "prefill", all tokens of one.
        num_seqs: sequences.
        context: tokens of each, the new ones among them.
    """

    kind: str
    num_seqs: int
    context: int

    @property
    def case(self) -> dict[str, Any]:
        return {"sequences": self.num_seqs, "context": self.context}

    def attention(self, config: Qwen3Config) -> str:
        """Which implementation runs; see `attention_of`."""
        kernel = "decode" if self.kind == "decode" else "ragged"
        return attention_of(config, kernel, page_size=PAGE_SIZE, context=self.context)

    @property
    def tokens(self) -> int:
        """That the step computes."""
        return self.num_seqs if self.kind == "decode" else self.num_seqs * self.context

    def num_bytes(self, config: Qwen3Config) -> int:
        """That it reads at least: all matrices, and of decode steps keys and values."""
        return decode_bytes(config, self.num_seqs, self.context if self.kind == "decode" else 0)

    def operations(self, config: Qwen3Config) -> int:
        """Of its matrix products and of attention, as `prefill_operations` counts them."""
        whole = prefill_operations(config, self.context)
        if self.kind == "prefill":
            return self.num_seqs * whole
        return self.num_seqs * (whole - prefill_operations(config, self.context - 1) + _head(config))

    def build(self, model: Model) -> Callable[[], Any]:
        """The step; each call's cache is the next one's."""
        batch = _decode_batch(self) if self.kind == "decode" else _prefill_batch(self)
        config = model.config
        num_pages = self.num_seqs * -(-self.context // PAGE_SIZE)
        held = [
            tuple(
                empty_kv_pages(num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, config.dtype)
                for _ in range(config.num_layers)
            )
        ]

        @partial(jax.jit, donate_argnums=1)
        def step(params: Any, kv_pages: Any, batch: Batch) -> Any:
            logits, kv_pages = forward(params, config, batch, kv_pages)
            return jnp.argmax(logits, -1), kv_pages

        def run() -> Any:
            best, held[0] = step(model.params, held[0], batch)
            return best

        return run


def cases(platform: str) -> Iterator[StepCase]:
    """What is measured on a platform: "cpu", "gpu" or "tpu"."""
    if platform == "cpu":
        decode, prompts = [(1, 128), (1, 2048), (16, 128), (16, 1024)], [128, 512]
    else:
        decode, prompts = [(1, 128), (1, 8192), (16, 2048), (64, 512), (64, 2048), (256, 512)], [512, 4096]
    yield from (StepCase("decode", *shape) for shape in decode)
    yield from (StepCase("prefill", 1, length) for length in prompts)


def _head(config: Qwen3Config) -> int:
    """Operations of the output matrix for a token."""
    return 2 * config.vocab_size * config.hidden_size


def _decode_batch(case: StepCase) -> Batch:
    pages = -(-case.context // PAGE_SIZE)
    table = np.arange(case.num_seqs * pages, dtype=np.int32).reshape(case.num_seqs, pages)
    positions = np.full(case.num_seqs, case.context - 1, np.int32)
    return Batch(
        token_ids=jnp.arange(case.num_seqs, dtype=jnp.int32),
        positions=jnp.asarray(positions),
        slots=jnp.asarray(table[:, -1] * PAGE_SIZE + positions % PAGE_SIZE),
        kv_lens=jnp.asarray(positions + 1),
        page_table=jnp.asarray(table),
    )


def _prefill_batch(case: StepCase) -> Batch:
    assert case.num_seqs == 1
    positions = jnp.arange(case.context, dtype=jnp.int32)
    return Batch(
        token_ids=positions,
        positions=positions,
        slots=positions,
        kv_lens=jnp.asarray([case.context], jnp.int32),
        page_table=jnp.arange(-(-case.context // PAGE_SIZE), dtype=jnp.int32)[None],
        query_starts=jnp.asarray([0, case.context], jnp.int32),
        num_seqs=jnp.asarray([1], jnp.int32),
        logit_rows=jnp.asarray([case.context - 1], jnp.int32),
    )
