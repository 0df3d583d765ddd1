"""Measurements on random weights of a published shape, where the device has the most to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...model import Model
from ...runtime import Generation, vSurge
from ...runtime.logprobs import logprobs_of
from ...runtime.sampling import MAX_BANNED, SamplingInputs, sample
from ...runtime.shaping import (
    RowState,
    ShapingInputs,
    empty_row_state,
    mask_words,
    shape_logits,
    with_tokens,
)
from ..machine import seconds_of
from ..workload import Workload
from .requests import greedy

LONG_PROMPT, OTHERS_PROMPT, REPEATED_PROMPT = 4096, 64, 2048  # tokens
ALONE = 20  # tokens of each that are timed before and after the long prompt
BATCH = 16


def beside_a_prefill(model: Model, budget: int) -> dict[str, Any]:
    """Seconds between tokens of four sequences, with and without a long prompt beside them.

    Without it: before the prompt and after it, for by then the four have grown and take longer alone.
    """
    work, vocab = Workload(), model.config.vocab_size
    surge = vSurge.from_model(
        model, max_concurrent_decodes=8, max_batched_tokens=budget, max_length=LONG_PROMPT + 64,
        num_pages=120, prefix_caching=False,
    )  # fmt: skip
    with surge:
        others = [work.prompt(OTHERS_PROMPT, vocab, seed) for seed in range(4)]
        generation = surge.generate(others, greedy(2000))
        for samples in generation:  # until their own prompts are behind them
            if min(sample.num_generated_tokens for sample in samples) > 2:
                break
        before, _ = _times_between(generation, lambda taken: taken == ALONE)
        prompt = surge.generate(work.prompt(LONG_PROMPT, vocab, 4), greedy(1))
        beside, _ = _times_between(generation, lambda _: prompt._channel.is_over())
        after, samples = _times_between(generation, lambda taken: taken == ALONE)
        [sample] = prompt.result()
        generation.abort()
        assert surge.metrics.num_preemptions == 0
    return {
        "before_s": before, "beside_s": beside[2:-2], "after_s": after[2:], "max_batched_tokens": budget,
        "prompt_tokens": LONG_PROMPT, "first_token_s": sample.time_to_first_token_s,
        "tokens_of_others": OTHERS_PROMPT + samples[0].num_generated_tokens,
    }  # fmt: skip


def _times_between(generation: Generation, is_over: Callable[[int], bool]) -> tuple[list[float], list[Any]]:
    """Seconds between the tokens of a generation, and the last samples; `is_over` gets how many came."""
    times: list[float] = []
    for samples in generation:
        times.append(time.perf_counter())
        if is_over(len(times)):
            return np.diff(times).tolist(), samples
    raise AssertionError("the others ended before the prompt did")


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
                [sample] = surge.generate(prompt, greedy(1)).result()
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
        generation = surge.generate(prompts, greedy(900))
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
        tokens = sample(shaped, sampling, rows)
        return with_tokens(state, rows, tokens, rows >= 0), logprobs_of(logits, tokens, wanted)

    state = empty_row_state(BATCH, vocab)

    def run(**asked: Any) -> list[float]:
        def of(name: str, default: Any, dtype: Any = np.float32) -> Any:
            return np.full(BATCH, asked.get(name, default), dtype)

        sampling = SamplingInputs(  # pyright: ignore[reportCallIssue]
            of("temperature", 0.0), of("top_k", 0, np.int32), of("top_p", 1.0), of("min_p", 0.0),
            np.zeros((BATCH, 2), np.uint32), np.full((BATCH, MAX_BANNED), -1, np.int32), 0 * rows,  # pyright: ignore[reportArgumentType]
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
        generation = surge.generate(prompts, greedy(repeats + 40))
        times = [
            time.perf_counter()
            for samples in generation
            if min(sample.num_generated_tokens for sample in samples) + BATCH - 1 >= BATCH
        ]
    return {"step_s": np.diff(times[4:-2]).tolist(), "batch": BATCH}
