"""Requests that come at random, and how they fare."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime import SamplingParams, vSurge
from ..record import LoadRow
from ..workload import Sizes

RESERVED = 1000  # token ids at the vocabulary's end, where special tokens are


@dataclass(frozen=True)
class LoadRequest:
    """One request.

    Attributes:
        prompt: token ids.
        output_tokens: exactly so many are generated.
        arrival_s: seconds after the first one's.
    """

    prompt: list[int]
    output_tokens: int
    arrival_s: float = 0.0


def random_requests(
    count: int,
    vocab_size: int,
    input_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    *,
    seed: int = 0,
) -> list[LoadRequest]:
    """Requests that are all there from the start: tokens and lengths uniform, both ends included.

    Args:
        count: of requests.
        vocab_size: of the model.
        input_tokens, output_tokens: from, to.
        seed: of all that is random.
    """
    rng = np.random.default_rng(seed)
    most = max(2, vocab_size - RESERVED)
    return [
        LoadRequest(
            rng.integers(0, most, rng.integers(*input_tokens, endpoint=True)).tolist(),
            int(rng.integers(*output_tokens, endpoint=True)),
        )
        for _ in range(count)
    ]


def read_requests(path: Path, vocab_size: int, *, seed: int = 0) -> list[LoadRequest]:
    """Requests whose lengths a file gives: a JSON object a line, {"input_tokens": N, "output_tokens": M}.

    Args:
        path: of the file.
        vocab_size: of the model, whose tokens are drawn at random.
        seed: of the tokens.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is none of these; it is named.
    """
    requests = list[LoadRequest]()
    rng = np.random.default_rng(seed)
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields: Any = json.loads(line)
            lengths = int(fields["input_tokens"]), int(fields["output_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: must be like {{"input_tokens": 100, "output_tokens": 20}}, got {line!r}'
            ) from error
        if min(lengths) < 1:
            raise ValueError(
                f"{path}:{number}: input_tokens and output_tokens must be at least 1, got {line!r}"
            )
        prompt = rng.integers(0, max(2, vocab_size - RESERVED), lengths[0]).tolist()
        requests.append(LoadRequest(prompt, lengths[1]))
    if not requests:
        raise ValueError(f"{path}: holds no requests")
    return requests


def arriving(requests: Sequence[LoadRequest], per_s: float, *, seed: int = 0) -> list[LoadRequest]:
    """The same requests as a Poisson process: the time from one to the next is exponential.

    Args:
        requests: whose arrivals are drawn.
        per_s: of them, on average.
        seed: of the arrivals.
    """
    gaps = np.random.default_rng(seed).exponential(1 / per_s, len(requests))
    times = np.cumsum(gaps) - gaps[0] if len(requests) else gaps
    return [
        LoadRequest(request.prompt, request.output_tokens, float(at))
        for request, at in zip(requests, times, strict=True)
    ]


def shortened(requests: Sequence[LoadRequest]) -> list[LoadRequest]:
    """The same requests for 4 tokens at most, to warm up with: none becomes longer than it was."""
    return [replace(request, output_tokens=min(4, request.output_tokens)) for request in requests]


@dataclass
class _Fate:
    """When a request's tokens were seen, as seconds and their number so far."""

    arrival: float
    seen: list[tuple[float, int]]


def run_load(surge: vSurge, requests: Sequence[LoadRequest], *, requests_per_s: float | None) -> LoadRow:
    """Sends requests to a running engine, each at its time, and waits for all.

    Args:
        surge: whose queue must hold all requests.
        requests: what is sent; greedy, and end tokens are ignored.
        requests_per_s: what is noted of how they arrive.
    """
    before = surge.metrics
    fates = asyncio.run(_send(surge, requests))
    after = surge.metrics
    steps, worked_s = after.num_steps - before.num_steps, after.work_seconds - before.work_seconds
    begin, end = min(fate.arrival for fate in fates), max(fate.seen[-1][0] for fate in fates)
    return LoadRow(
        requests_per_s=requests_per_s,
        num_requests=len(requests),
        seconds=end - begin,
        input_tokens=sum(len(request.prompt) for request in requests),
        output_tokens=sum(request.output_tokens for request in requests),
        ttft_s=tuple(fate.seen[0][0] - fate.arrival for fate in fates),
        token_gaps_s=tuple(gap for fate in fates for gap in _gaps(fate)),
        e2e_s=tuple(fate.seen[-1][0] - fate.arrival for fate in fates),
        num_steps=steps,
        num_bytes=needed_bytes(Sizes.of(surge.model), requests, steps),
        idle_share=(after.device_idle_seconds - before.device_idle_seconds) / worked_s,
    )


def _gaps(fate: _Fate) -> list[float]:
    """Seconds between tokens; what was seen at once took none behind the first, and an equal part later."""
    gaps = [0.0] * (fate.seen[0][1] - 1)
    for (before, had), (after, has) in zip(fate.seen, fate.seen[1:], strict=False):
        gaps += [(after - before) / (has - had)] * (has - had)
    return gaps


async def _send(surge: vSurge, requests: Sequence[LoadRequest]) -> list[_Fate]:
    begin = time.perf_counter()
    return await asyncio.gather(*(_follow(surge, request, begin) for request in requests))


async def _follow(surge: vSurge, request: LoadRequest, begin: float) -> _Fate:
    await asyncio.sleep(begin + request.arrival_s - time.perf_counter())
    fate = _Fate(time.perf_counter(), [])
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=request.output_tokens)
    count = 0
    async for [sample] in surge.generate(request.prompt, params, stream=True):
        if sample.num_generated_tokens > count:
            count = sample.num_generated_tokens
            fate.seen.append((time.perf_counter(), count))
    if count != request.output_tokens:
        raise RuntimeError(f"a request gave {count} tokens of {request.output_tokens}")
    return fate


def needed_bytes(sizes: Sizes, requests: Sequence[LoadRequest], num_steps: int) -> int:
    """Weights once for each step, and the keys and values that each token's own step reads."""
    seen = 0
    for request in requests:
        first, last = len(request.prompt), len(request.prompt) + request.output_tokens - 1
        seen += (first + last) * (last - first + 1) // 2
    return num_steps * sizes.weights + seen * sizes.token


def fewest_steps(requests: Sequence[LoadRequest], at_once: int) -> int:
    """Steps that so many sequences at a time need at least for all output."""
    outputs = [request.output_tokens for request in requests]
    return max(-(-sum(outputs) // at_once), *outputs)
