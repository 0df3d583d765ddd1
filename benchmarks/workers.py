"""One engine per process, measured on request: `python -m vsurge.benchmarks.workers NAME`.

A worker says "ready", then answers each line of JSON on stdin, `{"measure": …, …}`, with a line of JSON on
stdout. So several engines can stand ready and take turns, and a drift of the machine's speed hits them all.

vsurge, transformers: prefill and decode of the workload.
matmuls: XLA's matrix products of the shape and nothing else, and what the machine does at best.
startup: how long an engine took to be ready.
loading: a checkpoint loaded, and its bytes copied.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..model import PUBLISHED
from .machine import measure_ceilings, seconds_of
from .workload import Workload

Measurements = dict[str, Callable[..., Any]]


def vsurge_engine(work: Workload) -> Measurements:
    """Rates through the engine's own API."""
    from ..model import random_model
    from ..runtime import SamplingParams, vSurge
    from ..runtime.cache_size import page_bytes

    model = random_model(work.model, seed=0)
    most = max(work.decode_batches)
    surge = vSurge.from_model(
        model,
        max_concurrent_decodes=most,
        max_prefill_length=work.prefill_tokens,
        max_length=1024,
        num_pages=2 * most,
    )
    surge.start()

    def prefill(seed: int) -> float:
        prompt = work.prompt(work.prefill_tokens, model.config.vocab_size, seed)
        start = time.perf_counter()
        surge.generate(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)).result()
        return time.perf_counter() - start

    def decode(seed: int, batch: int) -> float:
        """Tokens per second from the moment when all sequences decode until the first of them ends."""
        prompts = [work.prompt(work.prompt_tokens, model.config.vocab_size, seed + i) for i in range(batch)]
        # prompts are admitted one by one, so that the first has up to `batch` tokens when the last begins
        params = SamplingParams(max_tokens=work.new_tokens + 2 * batch, temperature=0, ignore_eos=True)
        start: tuple[float, int] | None = None
        total = 0
        for samples in surge.generate(prompts, params):
            counts = [sample.num_generated_tokens for sample in samples]
            total = sum(counts)
            if start is None and min(counts) >= 1:
                start = time.perf_counter(), total
            if max(counts) == params.max_tokens:
                break
        if start is None:
            raise RuntimeError("a sequence ended before all had begun")
        return (total - start[1]) / (time.perf_counter() - start[0])

    def memory() -> dict[str, int]:
        return {
            "peak_bytes": peak_memory(),
            "cache_bytes": surge.num_pages * page_bytes(model, surge.page_size),
        }

    return {"prefill": prefill, "decode": decode, "memory": memory}


def transformers_engine(work: Workload) -> Measurements:
    """The same on transformers: `generate` with its default (dynamic) cache, greedy."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = PUBLISHED[work.model]
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_word_embeddings,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = Qwen3ForCausalLM(config).eval()

    def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
        return torch.tensor([work.prompt(length, shape.vocab_size, seed + i) for i in range(batch)])

    def prefill(seed: int) -> float:
        prompt = tokens(1, work.prefill_tokens, seed)
        with torch.inference_mode():
            start = time.perf_counter()
            model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
            return time.perf_counter() - start

    def decode(seed: int, batch: int) -> float:
        """Tokens per second after the prefill, which is timed alone and taken off."""
        prompts = tokens(batch, work.prompt_tokens, seed)
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            start = time.perf_counter()
            model.generate(prompts, max_new_tokens=1, **options)
            first = time.perf_counter()
            model.generate(prompts, max_new_tokens=1 + work.new_tokens, **options)
            end = time.perf_counter()
        return batch * work.new_tokens / ((end - first) - (first - start))

    return {"prefill": prefill, "decode": decode, "memory": lambda: {"peak_bytes": peak_memory()}}


def matmuls(work: Workload) -> Measurements:
    """Seconds of all matrix products of the shape in one program, by rows."""
    import jax
    import jax.numpy as jnp

    from ..model import random_model
    from ..model.qwen3 import linear

    model = random_model(work.model, seed=0)
    config, params = model.config, model.params

    @jax.jit
    def all_products(params: Any, x: jax.Array) -> jax.Array:
        prefill = x.shape[0] == work.prefill_tokens
        for layer in params.layers:
            q = linear(config, x, layer.q_proj)
            kv = linear(config, x, layer.k_proj) + linear(config, x, layer.v_proj)
            x = linear(config, q, layer.o_proj) + kv[:, :1] * 1e-9  # so that none of them is dropped
            inner = linear(config, x, layer.gate_proj) + linear(config, x, layer.up_proj)
            x = linear(config, inner, layer.down_proj)
        # a prefill needs the output matrix for its last token only, which `linear` computes as two rows
        head = params.embedding if params.lm_head is None else params.lm_head
        return linear(config, x[:1] if prefill else x, head)

    def products(rows: int) -> float:
        x = jnp.ones((rows, config.hidden_size), jnp.float32)
        seconds = seconds_of(lambda: all_products(params, x).block_until_ready(), repeats=3)
        return sorted(seconds)[1]

    return {"matmuls": products, "ceilings": measure_ceilings}


def startup(work: Workload) -> Measurements:
    """Weights, compilation, start; prints how long each took."""
    start = time.perf_counter()
    from ..model import random_model
    from ..runtime import vSurge

    model = random_model(work.model, seed=0)
    loaded = time.perf_counter()
    surge = vSurge.from_model(model, max_concurrent_decodes=16, max_prefill_length=512, max_length=1024)
    surge.compile()
    surge.start()
    times = {"weights_s": loaded - start, "compile_s": time.perf_counter() - loaded}
    return {"startup": lambda: times}


def loading(work: Workload) -> Measurements:
    """Seconds of loading the shape's checkpoint, and of copying its bytes."""
    from .loading import measure_loading

    def measure(turns: int) -> list[dict[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            return measure_loading(PUBLISHED[work.model], Path(folder), turns=turns)

    return {"loading": measure}


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WORKERS = {
    "vsurge": vsurge_engine,
    "transformers": transformers_engine,
    "matmuls": matmuls,
    "startup": startup,
    "loading": loading,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worker", choices=list(WORKERS))
    parser.add_argument("--model", default=Workload.model)
    arguments = parser.parse_args()
    measurements = WORKERS[arguments.worker](Workload(model=arguments.model))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(measurements[request.pop("measure")](**request)), flush=True)


if __name__ == "__main__":
    main()
