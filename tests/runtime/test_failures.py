"""When the engine fails, every caller hears of it, and `start` begins anew."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from vsurge.runtime import EngineFailed, EngineStopped, OutOfMemory, SamplingParams, vSurge
from vsurge.runtime.detokenizer import Detokenizer

from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves


def all_ways_to_wait(scripted: Scripted, pool: ThreadPoolExecutor) -> list[Future[Any]]:
    """Callers that wait in every way there is, on requests that run and requests that queue."""
    generate, started = scripted.surge.generate, []

    def waiter(wait: Callable[[], Any]) -> Callable[[], Any]:
        started.append(threading.Event())

        def run(event: threading.Event = started[-1]) -> Any:
            event.set()
            return wait()

        return run

    async def awaited(generation: Any) -> Any:
        return await asyncio.wait_for(generation._wait(), TIMEOUT_S)

    async def iterated(generation: Any) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return [samples async for samples in generation]

    waits: list[Callable[[], Any]] = []
    for prompt in range(1, 4):
        one, two, three, four = (generate([prompt, i], LONG) for i in range(1, 5))
        waits += [
            waiter(lambda g=one: g.result(TIMEOUT_S)),
            waiter(lambda g=two: list(g)),
            waiter(lambda g=three: asyncio.run(awaited(g))),
            waiter(lambda g=four: asyncio.run(iterated(g))),
        ]
    futures = [pool.submit(wait) for wait in waits]
    assert all(event.wait(TIMEOUT_S) for event in started)
    return futures


@pytest.mark.parametrize("error", [ZeroDivisionError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_a_failure_reaches_every_caller_and_start_begins_anew(
    scripted: Scripted, error: BaseException
) -> None:
    scripted.executor.hold()
    scripted.executor.let(4)
    with ThreadPoolExecutor(12) as pool:
        futures = all_ways_to_wait(scripted, pool)
        scripted.executor.error = error
        scripted.executor.let(None)
        raised = [future.exception(TIMEOUT_S) for future in futures]
    assert all(isinstance(e, EngineFailed) and e.__cause__ is error for e in raised)
    assert len({id(e) for e in raised}) == len(raised)  # raising one and the same would entangle tracebacks
    for _ in range(2):
        with pytest.raises(EngineFailed, match=r"start\(\) begins anew") as later:
            scripted.surge.generate([1], SHORT)
        assert later.value.__cause__ is error
    scripted.surge.stop()
    scripted.surge.start()
    check_it_serves(scripted)


def test_a_failure_while_text_is_made_also_reaches_those_whose_last_token_came_in_the_same_step(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> bool:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(Detokenizer, "add", broken)
    scripted.executor.hold()
    first = scripted.surge.generate([3], replace(LONG, detokenize=False))
    scripted.executor.let(1)
    scripted.executor.wait_for_steps(1)  # so that the next two come in one step
    ends = scripted.surge.generate([1], SamplingParams(max_tokens=1, detokenize=False))
    breaks = scripted.surge.generate([2], SHORT)
    scripted.executor.let(None)
    for generation in (breaks, ends, first):
        with pytest.raises(EngineFailed):
            generation.result(TIMEOUT_S)
    monkeypatch.undo()
    scripted.surge.start()
    check_it_serves(scripted)


def test_what_had_ended_before_a_failure_stays_readable(scripted: Scripted) -> None:
    done = scripted.surge.generate([1], SHORT)
    final = done.result(TIMEOUT_S)
    scripted.executor.error = ZeroDivisionError()
    with pytest.raises(EngineFailed):
        scripted.surge.generate([2], SHORT).result(TIMEOUT_S)
    assert done.result(TIMEOUT_S) == final
    assert list(done) == [final]


def test_requests_that_no_step_has_seen_get_the_failure_too(scripted: Scripted) -> None:
    scripted.executor.hold()
    first = scripted.surge.generate([1], SHORT)
    scripted.executor.error = ZeroDivisionError()
    late = [scripted.surge.generate([i], SHORT) for i in range(2, 30)]
    scripted.executor.let(None)
    for generation in (first, *late):
        with pytest.raises(EngineFailed):
            generation.result(TIMEOUT_S)


def test_a_cache_that_does_not_fit_says_how_large_it_would_be(model: Any) -> None:
    surge = vSurge.from_model(
        model, num_pages=1000, page_size=10**9, max_length=64, max_concurrent_decodes=2, verbose=False
    )
    surge.compile = lambda: None  # needs no memory, and takes a while
    with pytest.raises(OutOfMemory, match=r"num_pages=1000: a cache of .* GiB does not fit"):
        surge.start()
    with pytest.raises(EngineStopped):
        surge.generate([1], SHORT)
