"""Callers of every kind at once on one engine, with faults; and what must be true of every answer."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from vsurge.runtime import Generation, QueueFull, ReturnSample, SamplingParams, StepFailed, vSurge
from vsurge.runtime.step import StepOutput
from vsurge.runtime.step_plan import StepPlan

from .kinds import KINDS
from .scripted import pool_of

DEADLINE_S = 120.0  # within which each call, and every 300 of them, have to have an answer
CALLERS = 12

Job = tuple[tuple[int, ...], SamplingParams]


class InjectedFault(Exception):  # noqa: N818
    """What a step raises here and nowhere else."""


def jobs(rng: random.Random, count: int) -> list[Job]:
    """Prompts and parameters: some begin alike, all fit the cache, greedy or seeded; half are of KINDS."""
    heads = [[rng.randrange(1500) for _ in range(40)] for _ in range(3)]
    made: list[Job] = []
    for i in range(count):
        head = rng.choice(heads)[: rng.randint(0, 40)]
        prompt = (*head, *(rng.randrange(1500) for _ in range(rng.randint(1, 50))))
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8, 1.5]),
            top_k=rng.choice([0, 0, 5, 100]),
            top_p=rng.choice([1.0, 0.95, 0.5]),
            min_p=rng.choice([0.0, 0.05]),
            seed=i,
            max_tokens=rng.randint(1, 40),
            min_tokens=rng.choice([0, 1]),
            ignore_eos=rng.random() < 0.8,
            stop=rng.choice([None, None, "the", ["a", "cat "]]),
        )
        if rng.random() < 0.5:
            params = replace(params, **({"max_tokens": 24} | rng.choice(KINDS)))
        made.append((prompt, params))
    return made


@dataclass
class Chaos:
    """Runs jobs through an engine in random ways.

    Args:
        surge: the engine; its queue may be shorter than the number of callers.
        alone: what each job gives by itself.
        seed: of all that is random, apart from the threads' own order.
        fault_rate: of steps.
        params: weights to swap in now and then; the same ones, so that no answer changes.
    """

    surge: vSurge
    alone: dict[Job, ReturnSample]
    seed: int
    fault_rate: float
    outcomes: Counter[str] = field(default_factory=Counter[str])
    num_faults: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _faults_until: float = 0.0

    def run(self, count: int) -> None:
        """Makes `count` requests, and checks every answer."""
        work = random.Random(self.seed).choices(list(self.alone), k=count)
        ended = threading.Event()
        with ThreadPoolExecutor(CALLERS + 1) as pool:
            meddler = pool.submit(self._meddle, ended)
            try:
                callers = [pool.submit(self._call, i, work[i::CALLERS]) for i in range(CALLERS)]
                deadline = time.monotonic() + DEADLINE_S * max(1.0, count / 300)
                for caller in callers:
                    caller.result(max(0.0, deadline - time.monotonic()))
            finally:
                ended.set()
            meddler.result(DEADLINE_S)

    def break_steps(self, run: Callable[[StepPlan], StepOutput]) -> Callable[[StepPlan], StepOutput]:
        """A step function that fails now and then: before the step, or after it has run."""
        rng = random.Random(self.seed + 1)

        def broken(plan: StepPlan) -> StepOutput:
            pool_of(self.surge).check_integrity(
                [r.pages for r in self.surge._engine._loop._scheduler.running]
            )
            fails = rng.random() < self.fault_rate
            self.num_faults += fails
            if fails and rng.random() < 0.5:
                raise InjectedFault
            tokens = run(plan)
            if fails:
                raise InjectedFault
            return tokens

        return broken

    def _meddle(self, ended: threading.Event) -> None:
        """Pauses, resumes and swaps weights, while the others call."""
        rng = random.Random(self.seed + 2)
        while not ended.wait(rng.uniform(0.02, 0.2)):
            what = rng.choice(["pause", "update", "metrics"])
            if what == "pause":
                self.surge.pause()
                ended.wait(rng.uniform(0, 0.01))
                self.surge.resume()
            elif what == "update":
                self.surge.update_params(self.surge.model.params)
            metrics = self.surge.metrics
            assert metrics.num_pages_used + metrics.num_pages_free + metrics.num_pages_cached == (
                metrics.num_pages
            )

    def _call(self, caller: int, work: list[Job]) -> None:
        rng = random.Random(self.seed * 1000 + caller)
        while work:
            mine = [work.pop() for _ in range(min(len(work), rng.choice([1, 1, 1, 3])))]
            generation = self._submit(rng, mine)
            way = rng.choice(list(WAYS))
            try:
                samples = WAYS[way](self.surge, generation, rng)
            except StepFailed as error:
                assert isinstance(error.__cause__, InjectedFault)  # noqa: PT017
                with self._lock:
                    self.outcomes["failed"] += error.samples.count(None)
                samples = error.samples
            if samples is None:  # it was dropped, so there is nobody to tell
                with self._lock:
                    self.outcomes["dropped"] += len(mine)
                continue
            for job, sample in zip(mine, samples, strict=True):
                if sample is not None:
                    self._check(job, sample)

    def _submit(self, rng: random.Random, mine: list[Job]) -> Generation:
        prompts, params = [list(prompt) for prompt, _ in mine], [p for _, p in mine]
        timeout_s = rng.choice([None, None, None, None, 0.05, 1e-6, 60.0])
        while True:
            try:
                return self.surge.generate(
                    prompts, params, stream=True, priority=rng.choice([-1, 0, 0, 3]), timeout_s=timeout_s
                )
            except QueueFull:
                with self._lock:
                    self.outcomes["refused"] += 1
                time.sleep(0.005)

    def _check(self, job: Job, sample: ReturnSample) -> None:
        alone, reason = self.alone[job], sample.finish_reason
        assert reason is not None
        if reason in ("stop", "length"):
            assert (sample.token_ids, sample.text, reason) == (
                alone.token_ids, alone.text, alone.finish_reason
            )  # fmt: skip
        else:  # what there is of it is true
            assert reason in ("abort", "timeout")
            assert sample.token_ids == alone.token_ids[: len(sample.token_ids)]
        with self._lock:
            self.outcomes[reason] += 1
            self.outcomes["preempted"] += sample.num_preemptions > 0
            self.outcomes["found a prefix"] += sample.num_cached_tokens > 0


def _wait(_: vSurge, generation: Generation, __: random.Random) -> list[ReturnSample]:
    return generation.result(DEADLINE_S)


def _read_slowly(_: vSurge, generation: Generation, rng: random.Random) -> list[ReturnSample]:
    samples: list[ReturnSample] = []
    for new in generation:
        for before, after in zip(samples, new, strict=False):
            assert after.text.startswith(before.text)
            assert after.token_ids[: len(before.token_ids)] == before.token_ids
        samples = new
        time.sleep(rng.uniform(0, 0.05))
    return samples


def _read_in_asyncio(_: vSurge, generation: Generation, __: random.Random) -> list[ReturnSample]:
    async def read() -> list[ReturnSample]:
        async with asyncio.timeout(DEADLINE_S):
            return [samples async for samples in generation][-1]

    return asyncio.run(read())


def _abort(_: vSurge, generation: Generation, rng: random.Random) -> list[ReturnSample]:
    time.sleep(rng.uniform(0, 0.05))
    generation.abort()
    return generation.result(DEADLINE_S)


def _abort_by_id(surge: vSurge, generation: Generation, rng: random.Random) -> list[ReturnSample]:
    time.sleep(rng.uniform(0, 0.05))
    surge.abort(rng.choice(generation.request_ids))
    return generation.result(DEADLINE_S)


def _drop(_: vSurge, generation: Generation, rng: random.Random) -> None:
    for _samples in generation:
        if rng.random() < 0.5:
            break


WAYS: dict[str, Callable[[vSurge, Generation, random.Random], Any]] = {
    "wait": _wait,
    "wait too": _wait,
    "read slowly": _read_slowly,
    "read in asyncio": _read_in_asyncio,
    "abort": _abort,
    "abort by id": _abort_by_id,
    "drop": _drop,
}


def solo_runs(surge: vSurge, work: list[Job]) -> dict[Job, ReturnSample]:
    """What each job gives when nothing else runs."""
    alone = {}
    for prompt, params in work:
        [alone[prompt, params]] = surge.generate([list(prompt)], replace(params)).result(DEADLINE_S)
    return alone
