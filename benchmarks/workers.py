"""One measured engine per process: `python -m vsurge.benchmarks.workers NAME` prints its figures as JSON.

vsurge, transformers: the workload on either engine.
matmuls: XLA's matrix products of the shape and nothing else, and what the machine does at best.
startup: from the start of the process to an engine that is ready.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

from ..model import PUBLISHED
from .machine import measure_ceilings, seconds_of
from .workload import Workload


def run_vsurge(work: Workload) -> dict[str, Any]:
    """Prefill and decode rates through the engine's API, streaming."""
    from ..model import random_model
    from ..runtime import SamplingParams, vSurge

    model = random_model(work.model, seed=0)
    vocab = model.config.vocab_size
    most = max(work.decode_batches)
    surge = vSurge.from_model(
        model,
        max_concurrent_decodes=most,
        max_prefill_length=work.prefill_tokens,
        max_length=1024,
        num_pages=most * 2,
    )
    surge.start()

    def prefill(seed: int) -> None:
        prompt = work.prompt(work.prefill_tokens, vocab, seed)
        surge.generate(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)).result()

    def decode_rate(batch: int, seed: int) -> float:
        """Tokens per second from the moment when all sequences decode to the last token."""
        prompts = [work.prompt(work.prompt_tokens, vocab, seed + i) for i in range(batch)]
        # early sequences go on until the last one, admitted `batch` steps later, has all its tokens
        params = SamplingParams(max_tokens=work.new_tokens + 2 * batch, temperature=0, ignore_eos=True)
        start: tuple[float, int] | None = None
        for samples in surge.generate(prompts, params):
            counts = [sample.num_generated_tokens for sample in samples]
            if start is None and min(counts) >= 1:
                start = time.perf_counter(), sum(counts)
            if max(counts) == params.max_tokens:
                break
        assert start is not None
        return (sum(counts) - start[1]) / (time.perf_counter() - start[0])

    prefill(0)
    result = {
        "prefill_s": seconds_of(lambda: prefill(1), repeats=work.repeats),
        "decode_tok_s": {
            b: [decode_rate(b, 10 * r) for r in range(work.repeats)] for b in work.decode_batches
        },
        "cache_bytes": surge.num_pages * _page_bytes(model, surge.page_size),
        "peak_memory_bytes": peak_memory(),
    }
    surge.stop()
    return result


def _page_bytes(model: Any, page_size: int) -> int:
    from ..runtime.cache_size import page_bytes

    return page_bytes(model, page_size)


def run_transformers(work: Workload) -> dict[str, Any]:
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
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model: Any = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(previous)

    def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
        return torch.tensor([work.prompt(length, shape.vocab_size, seed + i) for i in range(batch)])

    def prefill(seed: int) -> None:
        with torch.inference_mode():
            model(tokens(1, work.prefill_tokens, seed), use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def decode_rate(batch: int, seed: int) -> float:
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

    prefill(0)
    return {
        "prefill_s": seconds_of(lambda: prefill(1), repeats=work.repeats),
        "decode_tok_s": {
            b: [decode_rate(b, 10 * r) for r in range(work.repeats)] for b in work.decode_batches
        },
        "peak_memory_bytes": peak_memory(),
    }


def run_matmuls(work: Workload) -> dict[str, Any]:
    """Seconds of all matrix products of the shape, in one program, by rows; and the machine's ceilings."""
    import jax
    import jax.numpy as jnp

    from ..model import random_model
    from ..model.qwen3 import linear

    ceilings = measure_ceilings()
    model = random_model(work.model, seed=0)
    config, params = model.config, model.params

    def products(rows: int) -> Callable[[], Any]:
        @jax.jit
        def all_of_them(params: Any, x: jax.Array) -> Any:
            outputs = x.astype(jnp.float32)
            for layer in params.layers:
                q = linear(config, outputs, layer.q_proj)
                kv = linear(config, outputs, layer.k_proj) + linear(config, outputs, layer.v_proj)
                outputs = linear(config, q, layer.o_proj) + kv[:, :1] * 1e-9
                inner = linear(config, outputs, layer.gate_proj) + linear(config, outputs, layer.up_proj)
                outputs = linear(config, inner, layer.down_proj)
            # a prefill needs the output matrix for one row (computed as two)
            last = outputs[:2] if rows > max(work.decode_batches) else outputs
            return linear(config, last, params.embedding if params.lm_head is None else params.lm_head)

        x = jnp.ones((rows, config.hidden_size), jnp.float32)
        return lambda: all_of_them(params, x).block_until_ready()

    rows = [*(max(2, batch) for batch in work.decode_batches), work.prefill_tokens]
    return {"seconds": {r: seconds_of(products(r), repeats=4 * work.repeats) for r in rows}} | ceilings


def run_startup(work: Workload) -> dict[str, Any]:
    """Seconds to import and make the weights, and to compile and start; the caller adds the rest."""
    start = time.perf_counter()
    from ..model import random_model
    from ..runtime import vSurge

    model = random_model(work.model, seed=0)
    loaded = time.perf_counter()
    surge = vSurge.from_model(model, max_concurrent_decodes=16, max_prefill_length=512, max_length=1024)
    surge.compile()
    surge.start()
    ready = time.perf_counter()
    surge.stop()
    return {"weights_s": loaded - start, "compile_s": ready - loaded, "ready_at": time.time()}


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WORKERS: dict[str, Callable[[Workload], dict[str, Any]]] = {
    "vsurge": run_vsurge,
    "transformers": run_transformers,
    "matmuls": run_matmuls,
    "startup": run_startup,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worker", choices=list(WORKERS))
    parser.add_argument("--model", default=Workload.model)
    parser.add_argument("--repeats", type=int, default=Workload.repeats)
    arguments = parser.parse_args()
    work = Workload(model=arguments.model, repeats=arguments.repeats)
    print(json.dumps(WORKERS[arguments.worker](work)))


if __name__ == "__main__":
    main()
