"""What the runtime costs, and how it behaves under load: `python -m vsurge.benchmarks.serving`.

On random weights of a published shape:

- the time between the tokens of those who decode, while a long prompt is prefilled beside them, over the same
  without it;
- the time to the first token of a prompt whose pages are in the cache, over the first time;
- the share of time in which the device has nothing to do while a batch decodes;
- what sampling takes of a decode step, with no parameter in use and with all of them.

And on the demo checkpoint, where the model hardly counts:

- the Python of the engine's thread per step of 64 requests;
- a soak of short requests (aborts among them), and the memory of the process during it.

Prints a table, and writes JSON with every sample.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from ..model import PUBLISHED, Model, demo, load_model, random_model
from ..model.progress import progress_bar
from ..runtime import Generation, SamplingParams, vSurge
from ..runtime.logprobs import logprobs_of
from ..runtime.sampling import MAX_BANNED, SamplingInputs, sample
from ..runtime.shaping import (
    RowState,
    ShapingInputs,
    empty_row_state,
    mask_words,
    shape_logits,
    with_tokens,
)
from .machine import describe_machine, seconds_of
from .workload import Workload

LONG_PROMPT, REPEATED_PROMPT = 4096, 2048  # tokens
BUDGETS = (64, 16, 8)  # `max_batched_tokens` beside the long prompt
PAGE_SIZES = (128, 32)  # of the cache that the repeated prompt is found in
BATCH = 16
SOAK_AFTER, SOAK_REQUESTS = 1_000, 10_000


def beside_a_prefill(model: Model, budget: int) -> dict[str, Any]:
    """Seconds between tokens of four sequences, with and without a long prompt beside them."""
    work, vocab = Workload(), model.config.vocab_size
    surge = vSurge.from_model(
        model, max_concurrent_decodes=8, max_batched_tokens=budget, max_length=LONG_PROMPT + 64,
        num_pages=120, prefix_caching=False,
    )  # fmt: skip
    with surge:
        generation = surge.generate([work.prompt(64, vocab, seed) for seed in range(4)], _greedy(2000))
        times: list[float] = []
        for samples in generation:  # from when their own prompts are behind them
            if min(sample.num_generated_tokens for sample in samples) > 2:
                times.append(time.perf_counter())
            if len(times) == 20:
                break
        alone = np.diff(times).tolist()
        prompt = surge.generate(work.prompt(LONG_PROMPT, vocab, 4), _greedy(1))
        times = []
        for _ in generation:
            times.append(time.perf_counter())
            if prompt._channel.is_over():
                break
        [sample] = prompt.result()
        generation.abort()
        assert surge.metrics.num_preemptions == 0
    return {
        "alone_s": alone, "beside_s": np.diff(times[2:-2]).tolist(), "max_batched_tokens": budget,
        "prompt_tokens": LONG_PROMPT, "first_token_s": sample.time_to_first_token_s,
    }  # fmt: skip


def repeated_prompt(model: Model, page_size: int, turns: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt, the first time and again."""
    work = Workload()
    num_pages = (REPEATED_PROMPT // page_size + 4) * (turns + 1)
    surge = vSurge.from_model(
        model, max_concurrent_decodes=2, max_length=REPEATED_PROMPT + 64, page_size=page_size,
        num_pages=num_pages,
    )  # fmt: skip
    first: list[float] = []
    again: list[float] = []
    cached = 0
    with surge:
        for turn in range(turns):
            prompt = work.prompt(REPEATED_PROMPT, model.config.vocab_size, turn)
            for seconds in (first, again):
                [sample] = surge.generate(prompt, _greedy(1)).result()
                assert sample.time_to_first_token_s is not None
                seconds.append(sample.time_to_first_token_s)
                cached = sample.num_cached_tokens
    return {
        "first_s": first, "again_s": again, "prompt_tokens": REPEATED_PROMPT, "page_size": page_size,
        "cached_tokens": cached,
    }  # fmt: skip


def idle_while_decoding(model: Model, turns: int) -> dict[str, Any]:
    """Shares of the time in which nothing runs on the device (see `EngineMetrics.device_idle_share`)."""
    work = Workload()
    surge = vSurge.from_model(model, max_concurrent_decodes=BATCH, max_length=1024, num_pages=4 * BATCH)
    shares: list[float] = []
    rates: list[float] = []
    with surge:
        prompts = [work.prompt(16, model.config.vocab_size, i) for i in range(BATCH)]
        generation = surge.generate(prompts, _greedy(900))
        window_starts = None
        for samples in generation:
            if min(sample.num_generated_tokens for sample in samples) < 1:
                continue
            now = time.monotonic()
            window_starts = window_starts or now
            if now - window_starts > 11:  # the metrics' window, behind the prompts
                metrics = surge.metrics
                shares.append(metrics.device_idle_share)
                rates.append(metrics.generated_tokens_per_second)
                window_starts = now
            if len(shares) == turns:
                break
        generation.abort()
    return {"idle_share": shares, "tokens_per_second": rates, "batch": BATCH}


def sampling_step(model: Model, repeats: int) -> dict[str, Any]:
    """Seconds of all that happens between logits and token, at `BATCH` rows."""
    vocab = model.config.vocab_size
    logits = 3 * jax.random.normal(jax.random.key(0), (BATCH, vocab), jnp.float32)
    masks = jnp.full((BATCH, mask_words(vocab)), 0xFFFFFFFF, jnp.uint32)
    rows = jnp.arange(BATCH, dtype=jnp.int32)

    @partial(jax.jit, donate_argnums=0)
    def choose(
        state: RowState, logits: Any, sampling: SamplingInputs, shaping: ShapingInputs, wanted: Any
    ) -> Any:
        logits = logits * jnp.float32(1 + 2**-20)  # an intermediate, as in a step
        shaped = shape_logits(logits, shaping, rows, state, masks)
        tokens = sample(shaped, sampling)
        return with_tokens(state, rows, tokens, rows >= 0), logprobs_of(logits, tokens, wanted)

    state = empty_row_state(BATCH, vocab)

    def run(**asked: Any) -> list[float]:
        def of(name: str, default: Any, dtype: Any = np.float32) -> Any:
            return np.full(BATCH, asked.get(name, default), dtype)

        sampling = SamplingInputs(  # pyright: ignore[reportCallIssue]
            of("temperature", 0.0), of("top_k", 0, np.int32), of("top_p", 1.0), of("min_p", 0.0),
            np.zeros((BATCH, 2), np.uint32), rows, np.full((BATCH, MAX_BANNED), -1, np.int32), 0 * rows,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        shaping = ShapingInputs(
            of("presence", 0.0), of("frequency", 0.0), of("repetition", 1.0), of("biased", False, np.bool_),
            of("masked", False, np.bool_),
        )  # fmt: skip
        wanted = of("logprobs", False, np.bool_)

        def once() -> None:
            nonlocal state
            state, logprobs = choose(state, logits, sampling, shaping, wanted)
            jax.block_until_ready((state, logprobs))

        return seconds_of(once, repeats=repeats)

    shaped = {"presence": 1.0, "frequency": 0.5, "repetition": 1.1, "biased": True, "masked": True}
    drawn = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    return {
        "greedy_s": run(), "drawn_s": run(temperature=1.0), "qwen3_default_s": run(**drawn),
        "shaped_s": run(**shaped), "logprobs_s": run(logprobs=True),
        "everything_s": run(**drawn, **shaped, min_p=0.01, logprobs=True), "batch": BATCH,
    }  # fmt: skip


def decode_step(model: Model, repeats: int) -> dict[str, Any]:
    """Seconds of an engine's step at `BATCH`, all of it."""
    work = Workload()
    surge = vSurge.from_model(model, max_concurrent_decodes=BATCH, max_length=1024, num_pages=4 * BATCH)
    with surge:
        prompts = [work.prompt(128, model.config.vocab_size, i) for i in range(BATCH)]
        generation = surge.generate(prompts, _greedy(repeats + 40))
        times = [
            time.perf_counter()
            for samples in generation
            if min(sample.num_generated_tokens for sample in samples) + BATCH - 1 >= BATCH
        ]
    return {"step_s": np.diff(times[4:-2]).tolist(), "batch": BATCH}


@contextmanager
def _timed(owner: Any, name: str, seconds: list[float]) -> Any:
    """Adds up what a method takes."""
    method = getattr(owner, name)

    def measured(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, measured)
    try:
        yield
    finally:
        delattr(owner, name)


def soak(model: Model, requests: int) -> dict[str, Any]:
    """Resident memory during many short requests, of which every tenth is aborted."""
    surge = vSurge.from_model(
        model, max_concurrent_decodes=64, max_length=256, page_size=16, num_pages=400,
        max_queued_requests=256, verbose=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    resident: list[tuple[int, int]] = []
    start = time.perf_counter()
    with surge:
        under_way: list[Any] = []
        for i in progress_bar(list(range(requests)), "soak", show=True, unit="request"):
            prompt = rng.integers(0, model.config.vocab_size - 10, int(rng.integers(1, 60))).tolist()
            params = SamplingParams(
                max_tokens=int(rng.integers(1, 24)), ignore_eos=True, seed=i, frequency_penalty=0.1 * (i % 3)
            )
            under_way.append(surge.generate(prompt, params))
            if i % 10 == 9:
                under_way.pop().abort()
            if len(under_way) >= 128:
                under_way.pop(0).result()
            if (i + 1) % (SOAK_AFTER // 2) == 0:
                resident.append((i + 1, _resident_bytes()))
        for generation in under_way:
            generation.result()
        metrics = surge.metrics
    return {
        "seconds": time.perf_counter() - start, "resident_bytes": resident, "requests": requests,
        "finished": metrics.num_finished, "aborted": metrics.num_aborted, "failed": metrics.num_failed,
        "preemptions": metrics.num_preemptions,
    }  # fmt: skip


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)


def host_time(model: Model, processor: Any, steps: int) -> dict[str, Any]:
    """Seconds of the engine's thread per decode step of 64 requests with text: all of its phases but waiting.

    Taken twice: while nobody reads before the end, and while a task for each request reads every token.
    """
    result: dict[str, Any] = {"sequences": 64}
    surge = vSurge.from_model(
        model, processor, max_concurrent_decodes=64, max_length=steps + 100, page_size=16, verbose=False
    )
    for name, reads in (("unread", False), ("read", True)):
        with surge:
            phases = _phases_of(surge, reads=reads, steps=steps)
        result[name] = {"phases_s": phases, "python_s": sum(phases.values())}
    return result


def _phases_of(surge: vSurge, *, reads: bool, steps: int) -> dict[str, float]:
    """Median seconds of each phase, over the steps in which all 64 decode."""
    loop: Any = surge._engine._loop
    phases: dict[str, tuple[Any, str]] = {
        "plan": (loop._scheduler, "plan"), "inputs": (surge._executor._blueprint, "inputs"),
        "commit": (loop._scheduler, "commit"), "publish": (loop, "_publish"),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in phases}

    async def all_of(generation: Generation) -> None:
        if reads:
            async for _ in generation:
                pass
        else:
            await generation

    async def serve() -> None:
        params = _greedy(steps + 50)
        await asyncio.gather(*(all_of(surge.generate([[5 + i] * 8], params)) for i in range(64)))

    with ExitStack() as stack:
        for name, (owner, method) in phases.items():
            stack.enter_context(_timed(owner, method, seconds[name]))
        asyncio.run(serve())
    return {name: statistics.median(each[-steps:-20]) for name, each in seconds.items()}


Row = tuple[str, str, str, str]


def rows_of(result: dict[str, Any]) -> list[Row]:
    """What is printed: a figure's name, its value, its goal, and what it is divided by."""
    rows: list[Row] = []
    median = statistics.median
    for beside in result.get("beside_a_prefill", ()):
        alone, with_prompt = median(beside["alone_s"]), median(beside["beside_s"])
        rows.append((
            f"time between tokens beside a prompt of {beside['prompt_tokens']}, "
            f"max_batched_tokens={beside['max_batched_tokens']}",
            f"{with_prompt / alone:.2f}x", "<= 2x",
            f"{1e3 * with_prompt:.0f} ms over {1e3 * alone:.0f} ms; the prompt's first token after "
            f"{beside['first_token_s']:.0f} s",
        ))  # fmt: skip
    for repeated in result.get("repeated_prompt", ()):
        first, again = median(repeated["first_s"]), median(repeated["again_s"])
        rows.append((
            f"first token of a repeated prompt of {repeated['prompt_tokens']}, "
            f"pages of {repeated['page_size']}",
            f"{first / again:.1f}x sooner", ">= 10x",
            f"{first:.2f} s over {1e3 * again:.0f} ms, {repeated['cached_tokens']} tokens found",
        ))  # fmt: skip
    if idle := result.get("idle_while_decoding"):
        rows.append((
            f"device idle while {idle['batch']} decode", f"{100 * max(idle['idle_share']):.2f} %", "<= 5 %",
            f"largest of {len(idle['idle_share'])} windows of 10 s, "
            f"{median(idle['tokens_per_second']):.0f} tokens/s",
        ))  # fmt: skip
    if sampling := result.get("sampling_step"):
        step = median(result["decode_step"]["step_s"])
        for name in ("greedy", "drawn", "qwen3_default", "shaped", "logprobs", "everything"):
            seconds = median(sampling[f"{name}_s"])
            rows.append((
                f"sampling at batch {sampling['batch']}: {name}", f"{100 * seconds / step:.1f} %", "<= 10 %",
                f"{1e3 * seconds:.1f} ms of a step of {1e3 * step:.0f} ms",
            ))  # fmt: skip
    if host := result.get("host_time"):
        for name, what in (("unread", "read at the end"), ("read", "every token read")):
            rows.append((
                f"engine's thread per step of {host['sequences']} requests, {what}",
                f"{1e3 * host[name]['python_s']:.2f} ms", "<= 1 ms",
                ", ".join(f"{phase} {1e3 * each:.2f}" for phase, each in host[name]["phases_s"].items()),
            ))  # fmt: skip
    if soaked := result.get("soak"):
        resident = dict(soaked["resident_bytes"])
        grown = (resident[max(resident)] - resident[SOAK_AFTER]) / 2**20
        rows.append((
            f"memory from request {SOAK_AFTER} to {soaked['requests']}", f"{grown:+.1f} MiB", "flat",
            f"of {resident[SOAK_AFTER] / 2**20:.0f} MiB; {soaked['aborted']} aborted, "
            f"{soaked['failed']} failed, {soaked['requests'] / soaked['seconds']:.0f} requests/s",
        ))  # fmt: skip
    return rows


def print_table(rows: list[Row]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vsurge.benchmarks.serving", description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", choices=sorted(PUBLISHED))
    parser.add_argument("--turns", type=int, default=2, help="how often each figure is taken (default: 2)")
    parser.add_argument("--requests", type=int, default=SOAK_REQUESTS, help="of the soak")
    parser.add_argument("--only", action="append", help="one of the measurements, by name; may be repeated")
    parser.add_argument("--out", type=Path, help="JSON, with every sample; written after each")
    options = parser.parse_args(arguments)
    small = load_model(Path(demo.__file__).parent)
    tokenizer = AutoTokenizer.from_pretrained(Path(demo.__file__).parent)
    model = random_model(options.model, seed=0)
    measured: dict[str, Callable[[], Any]] = {
        "host_time": lambda: host_time(small, tokenizer, 200),
        "soak": lambda: soak(small, options.requests),
        "sampling_step": lambda: sampling_step(model, 20),
        "decode_step": lambda: decode_step(model, 40),
        "idle_while_decoding": lambda: idle_while_decoding(model, options.turns),
        "repeated_prompt": lambda: [repeated_prompt(model, size, options.turns) for size in PAGE_SIZES],
        "beside_a_prefill": lambda: [beside_a_prefill(model, budget) for budget in BUDGETS],
    }
    unknown = set(options.only or ()) - measured.keys()
    if unknown:
        parser.error(f"--only {sorted(unknown)}: must be among {list(measured)}")
    result: dict[str, Any] = {"machine": describe_machine(), "model": options.model}
    for name, measure in measured.items():
        if options.only is None or name in options.only:
            result[name] = measure()
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows_of(result))


if __name__ == "__main__":
    main()
