"""Measurements on the demo checkpoint, where the model hardly counts."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...model import Model
from ...model.progress import progress_bar
from ...runtime import Generation, GuidedDecodingParams, SamplingParams, vSurge
from ...runtime import loop as engine_loop
from .requests import greedy

SOAK_AFTER = 1_000  # requests, from when on memory should not grow
SCHEMAS = tuple(
    GuidedDecodingParams(json={"type": "object", "properties": {name: kind}, "required": [name]})
    for name in ("id", "name", "tags")
    for kind in ({"type": "integer"}, {"type": "string"}, {"type": "array", "items": {"type": "boolean"}})
)


def host_time(model: Model, processor: Any, steps: int) -> dict[str, Any]:
    """Seconds of the engine's thread per decode step of 64 requests with text, by phase.

    Taken twice: while nobody reads before the end, and while a task for each request reads every token. And
    by two clocks: the wall's, which goes on while another thread has Python's lock, and the thread's own
    ("processor"). By that clock also the step as a whole, with what jax takes to dispatch it and to read its
    tokens ("step"), which waiting does not count in.
    """
    result: dict[str, Any] = {"sequences": 64, "model": "demo checkpoint"}
    surge = vSurge.from_model(
        model, processor, max_concurrent_decodes=64, max_length=steps + 100, page_size=16, verbose=False
    )
    for name, reads in (("unread", False), ("read", True)):
        with surge:
            wall, processor_s = _phases_of(surge, reads=reads, steps=steps)
        step_s = processor_s.pop("step")
        wall.pop("step")
        result[name] = {
            "phases_s": wall, "python_s": sum(wall.values()),
            "processor_phases_s": processor_s, "processor_s": sum(processor_s.values()),
            "step_processor_s": step_s,
        }  # fmt: skip
    return result


def _phases_of(surge: vSurge, *, reads: bool, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each phase while all 64 decode, by the wall's clock and by the thread's."""
    loop: Any = surge._engine._loop
    phases: dict[str, tuple[Any, str]] = {
        "plan": (loop._scheduler, "plan"), "inputs": (surge._executor._blueprint, "inputs"),
        "commit": (loop._scheduler, "commit"), "publish": (loop, "_publish"), "wake": (engine_loop, "wake"),
        "step": (loop, "_step"),
    }  # fmt: skip
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in phases}

    async def all_of(generation: Generation) -> None:
        if reads:
            async for _ in generation:
                pass
        else:
            await generation

    async def serve() -> None:
        params = greedy(steps + 50)
        await asyncio.gather(*(all_of(surge.generate([[5 + i] * 8], params)) for i in range(64)))

    with ExitStack() as stack:
        for name, (owner, method) in phases.items():
            stack.enter_context(_timed(owner, method, seconds[name]))
        asyncio.run(serve())
    wall, processor = (
        {name: statistics.median(both[clock] for both in each[-steps:-20]) for name, each in seconds.items()}
        for clock in range(2)
    )
    return wall, processor


@contextmanager
def _timed(owner: Any, name: str, seconds: list[tuple[float, float]]) -> Any:
    """Notes what each call of a method takes, by the wall's clock and the thread's."""
    method, is_its_own = getattr(owner, name), name in vars(owner)

    def measured(*args: Any) -> Any:
        start, own = time.perf_counter(), time.thread_time()
        try:
            return method(*args)
        finally:
            seconds.append((time.perf_counter() - start, time.thread_time() - own))

    setattr(owner, name, measured)
    try:
        yield
    finally:
        if is_its_own:
            setattr(owner, name, method)
        else:
            delattr(owner, name)


def soak(model: Model, processor: Any, requests: int) -> dict[str, Any]:
    """Resident memory during many short requests, of which every tenth is aborted.

    All are written as text; some have stop strings, log-probabilities or a schema to keep.
    """
    surge = vSurge.from_model(
        model, processor, max_concurrent_decodes=64, max_length=256, page_size=16, num_pages=400,
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
                max_tokens=int(rng.integers(1, 24)), ignore_eos=True, seed=i, frequency_penalty=0.1 * (i % 3),
                stop=("the", "a b") if i % 4 == 1 else None, logprobs=2 if i % 5 == 2 else None,
                guided_decoding=SCHEMAS[i % len(SCHEMAS)] if i % 6 == 3 else None,
            )  # fmt: skip
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
        "preemptions": metrics.num_preemptions, "model": "demo checkpoint",
    }  # fmt: skip


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
