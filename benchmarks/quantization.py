"""What quantized weights do to a model and its products: `python -m vsurge.benchmarks.quantization`.

- The demo checkpoint on its held-out text and on the beginning of the text that it has learnt, and a random
  model on random tokens. Each form of the weights is compared with bfloat16 weights and products: perplexity,
  the Kullback-Leibler divergence of the next token's distribution in nats (mean, and 99th percentile of the
  tokens), and the share of tokens after which another one is the likeliest. "output matrix too" quantizes
  that as well.
- Products of one matrix, timed on this machine.
- What the TPU's compiler has written to memory besides the result, for the MLP of Qwen3-8B.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import empty_kv_pages
from ..kernels.tuning import compile_for
from ..model import Batch, Model, Qwen3Config, forward, load_model, published_config, random_model
from ..model.linear import linear
from ..model.params import TensorSpec, param_specs
from ..model.quantization import Method, quantize
from .machine import describe_machine, seconds_of

DEMO = Path(__file__).parents[1] / "model" / "demo"
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
IN, OUT = 1024, 3072  # of the matrix whose products are timed: an MLP's of Qwen3-0.6B
NUM_ROWS = (1, 8, 16, 512)
CHIP, TPU_ROWS = "v6e", 64


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vsurge.benchmarks.quantization", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--repeats", type=int, default=50, help="how often a product is timed (default: 50)")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    result = {
        "machine": describe_machine(),
        "products_s": products(options.repeats),
        "tpu_temporary_bytes": tpu_temporaries(),
        "rows": quality(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def products(repeats: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of x @ weight.T in each form, by rows of x."""
    print(f"microseconds of [M, {IN}] x [{IN}, {OUT}], median of {repeats}")
    print(f"{'':26}" + "".join(f"{f'M={rows}':>9}" for rows in NUM_ROWS))
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.standard_normal((OUT, IN), np.float32), jnp.bfloat16)
    seconds: dict[str, dict[int, list[float]]] = {}
    for name, method, int8_activations, _ in FORMS[:5]:
        weight: Any = dense if method is None else jax.jit(partial(quantize, method=method))(dense)
        config = replace(RANDOM, int8_activations=int8_activations)
        multiply = jax.jit(partial(linear, config))
        seconds[name] = {}
        for rows in NUM_ROWS:
            x = jnp.asarray(rng.standard_normal((rows, IN), np.float32))
            seconds[name][rows] = seconds_of(partial(_wait_for, multiply, x, weight), repeats=repeats)
        medians = [statistics.median(each) for each in seconds[name].values()]
        print(f"{name:26}" + "".join(f"{1e6 * each:9.0f}" for each in medians), flush=True)
    return seconds


def _wait_for(function: Any, *arguments: Any) -> None:
    jax.block_until_ready(function(*arguments))


def tpu_temporaries() -> dict[str, int]:
    """Bytes that an MLP of the 8B shape has in memory besides arguments and result, compiled for a TPU."""
    print(f"temporary bytes of Qwen3-8B's MLP at {TPU_ROWS} tokens, compiled for {CHIP}")
    config = published_config("8B")
    layer: Any = param_specs(config).layers[0]
    x = jax.ShapeDtypeStruct((TPU_ROWS, config.hidden_size), np.float32)
    found: dict[str, int] = {}
    for name, method, int8_activations, _ in FORMS[:5]:
        changed = replace(config, int8_activations=int8_activations)

        def matrix(spec: TensorSpec, method: Method | None = method) -> Any:
            dense = jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)
            return dense if method is None else jax.eval_shape(partial(quantize, method=method), dense)

        def mlp(x: Any, gate: Any, up: Any, down: Any, config: Qwen3Config = changed) -> Any:
            inner = jax.nn.silu(linear(config, x, gate)) * linear(config, x, up)
            return linear(config, inner, down)

        weights = [matrix(spec) for spec in (layer.gate_proj, layer.up_proj, layer.down_proj)]
        memory: Any = compile_for(CHIP, mlp, x, *weights).memory_analysis()
        found[name] = memory.temp_size_in_bytes
        print(f"{name:26}{found[name]:14,}", flush=True)
    return found


def quality() -> list[dict[str, Any]]:
    """Bytes, perplexity and divergence of each model and form."""
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
    return results


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
