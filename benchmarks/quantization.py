"""What quantized weights do to a model's output: `python -m vsurge.benchmarks.quantization`.

The demo checkpoint on its held-out text and on the beginning of the text that it has learnt, and a random
model on random tokens. Each form of the weights is compared with bfloat16 weights and products: perplexity,
the Kullback-Leibler divergence of the next token's distribution in nats (mean, and 99th percentile of the
tokens), and the share of tokens after which another one is the likeliest. "output matrix too" quantizes that
as well.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import empty_kv_pages
from ..model import Batch, Model, Qwen3Config, forward, load_model, random_model
from ..model.quantization import Method, quantize
from .machine import describe_machine

DEMO = Path(__file__).parents[1] / "model" / "demo"
RESULTS = Path(__file__).parent / "results" / "quantization.json"
LENGTH, ROWS, PAGE_SIZE = 256, 16, 64
# name, form, whether activations are int8, whether the output matrix is quantized too
FORMS: tuple[tuple[str, Method | None, bool, bool], ...] = (
    ("bfloat16", None, False, False),
    ("a8bit", "a8bit", False, False),
    ("a8bit, int8 activations", "a8bit", True, False),
    ("fp8", "fp8", False, False),
    ("nf4", "nf4", False, False),
    ("a8bit, output matrix too", "a8bit", False, True),
    ("nf4, output matrix too", "nf4", False, True),
)
RANDOM = Qwen3Config(4096, 512, 1536, 4, 8, 4, 64)  # untied


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    rng = np.random.default_rng(0)
    tokens = {
        "held-out text": rows_of(tokenizer.encode((DEMO / "heldout.txt").read_text("utf-8")).ids),
        "trained text": rows_of(tokenizer.encode((DEMO / "corpus.txt").read_text("utf-8")).ids),
        "random model": rng.integers(0, RANDOM.vocab_size, (4, LENGTH)).astype(np.int32),
    }
    results: list[dict[str, Any]] = []
    print(f"{'':15}{'':26}{'bytes':>12}{'perplexity':>12}{'KL mean':>11}{'KL p99':>11}{'other':>8}")
    for text, token_ids in tokens.items():
        base: Any = None
        for name, method, int8_activations, output in FORMS:
            model = model_of(text, method)
            model = replace(model, config=replace(model.config, int8_activations=int8_activations))
            if output and method is not None:
                model = with_quantized_output(model, method)
            scores = np.stack([log_probabilities(model, row) for row in token_ids])
            base = scores if base is None else base
            num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
            row = {"text": text, "form": name, "bytes": num_bytes} | compared(scores, base, token_ids)
            results.append(row)
            print(
                f"{text:15}{name:26}{num_bytes:12,}{row['perplexity']:12.4f}{row['kl_mean']:11.2e}"
                f"{row['kl_p99']:11.2e}{row['other_argmax']:8.2%}",
                flush=True,
            )
    RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": results}, indent=1) + "\n")
    print(f"written to {RESULTS}")


def rows_of(token_ids: list[int]) -> np.ndarray:
    """Up to ROWS rows of LENGTH tokens, [rows, LENGTH]."""
    rows = min(ROWS, len(token_ids) // LENGTH)
    return np.array(token_ids[: rows * LENGTH], np.int32).reshape(rows, LENGTH)


def model_of(text: str, method: Method | None) -> Model:
    if text == "random model":
        return random_model(RANDOM, seed=0, quantization_method=method)
    return load_model(DEMO, quantization_method=method)


def with_quantized_output(model: Model, method: Method) -> Model:
    """The same with its output matrix quantized; a tied embedding is still read as it is."""
    head = model.params.embedding if model.params.lm_head is None else model.params.lm_head
    quantized: Any = jax.jit(partial(quantize, method=method))(head)
    return replace(model, params=replace(model.params, lm_head=quantized))


step = jax.jit(forward, static_argnums=1)


def log_probabilities(model: Model, token_ids: np.ndarray) -> np.ndarray:
    """Of every token after each of these, [tokens, vocab], by the engine's own forward pass; float64."""
    config, count = model.config, len(token_ids)
    num_pages = count // PAGE_SIZE
    kv_pages = tuple(
        empty_kv_pages(num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, config.cache_dtype)
        for _ in range(config.num_layers)
    )
    positions = jnp.arange(count, dtype=jnp.int32)
    batch = Batch(
        token_ids=jnp.asarray(token_ids),
        positions=positions,
        slots=positions,
        kv_lens=jnp.array([count], jnp.int32),
        page_table=jnp.arange(num_pages, dtype=jnp.int32)[None],
        query_starts=jnp.array([0, count], jnp.int32),
        num_seqs=jnp.array([1], jnp.int32),
    )
    logits = np.asarray(step(model.params, config, batch, kv_pages)[0], np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def compared(scores: np.ndarray, base: np.ndarray, token_ids: np.ndarray) -> dict[str, float]:
    """Perplexity of the tokens, and how far the distributions are from the base's."""
    losses = -np.take_along_axis(scores[:, :-1], token_ids[:, 1:, None], axis=-1)
    divergence = (np.exp(base) * (base - scores)).sum(axis=-1)
    return {
        "perplexity": float(np.exp(losses.mean())),
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "other_argmax": float((scores.argmax(-1) != base.argmax(-1)).mean()),
    }


if __name__ == "__main__":
    main()
