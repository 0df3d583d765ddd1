"""Starting, stopping and failing: every caller gets an answer, whatever happens, and `start` begins anew."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from vsurge.runtime import (
    EngineError,
    EngineFailed,
    EngineStopped,
    OutOfMemory,
    QueueFull,
    SamplingParams,
    vSurge,
)
from vsurge.runtime.detokenizer import Detokenizer

from .conftest import TIMEOUT_S, Scripted, counting_script

LONG = SamplingParams(max_tokens=100)
SHORT = SamplingParams(max_tokens=3)


def check_it_serves(scripted: Scripted) -> None:
    scripted.executor.error = None
    scripted.executor.let(None)
    [sample] = scripted.surge.generate([9], SHORT).result(TIMEOUT_S)
    assert sample.token_ids == tuple(counting_script([9], i) for i in range(3))
    assert scripted.pool.num_used == 0


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


def test_before_the_start_and_after_the_stop_nothing_is_taken(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted()
    for _ in range(2):
        with pytest.raises(EngineStopped, match=r"the engine is stopped: call start\(\) first"):
            scripted.surge.generate([1], SHORT)
        scripted.surge.stop()  # of what does not run: nothing happens
        scripted.surge.start()
        scripted.surge.start()  # of what runs: nothing happens
        check_it_serves(scripted)
        scripted.surge.stop()
        assert not scripted.executor.is_allocated


@pytest.mark.parametrize("drain", [True, False])
def test_stop_finishes_or_aborts_what_runs_and_what_waits(scripted: Scripted, drain: bool) -> None:
    scripted.executor.hold()
    generations = [scripted.surge.generate([i], SamplingParams(max_tokens=10)) for i in range(1, 9)]
    scripted.executor.let(3)
    scripted.executor.wait_until_held()
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(scripted.surge.stop, drain=drain)
        refused_meanwhile(scripted)
        with pytest.raises(EngineError, match="stopping"):
            scripted.surge.start()
        scripted.executor.let(None)
        stopping.result(TIMEOUT_S)
    samples = [generation.result(0.0)[0] for generation in generations]
    assert {s.finish_reason for s in samples} == ({"length"} if drain else {"abort"})
    if drain:
        assert [s.num_generated_tokens for s in samples] == [10] * 8
    assert scripted.pool.num_used == 0
    scripted.surge.start()
    check_it_serves(scripted)


def refused_meanwhile(scripted: Scripted) -> None:
    """Waits until the engine has been told to stop, and sees that it takes nothing then."""

    def submit_until_refused() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(QueueFull):
                scripted.surge.generate([1], SamplingParams(max_tokens=1)).abort()

    with pytest.raises(EngineStopped, match=r"the engine is \w+ing: call start\(\) first"):
        submit_until_refused()


def test_a_stop_that_drains_can_be_hurried_by_one_that_does_not(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([1], LONG)
    scripted.executor.let(3)
    scripted.executor.wait_until_held()  # else it might end before anybody has seen it stop
    with ThreadPoolExecutor(3) as pool:
        draining = pool.submit(scripted.surge.stop, drain=True)
        refused_meanwhile(scripted)
        hurrying = pool.submit(scripted.surge.stop, drain=False)
        while scripted.surge._engine._state.value != "stopping":
            assert not hurrying.done()
        draining_again = pool.submit(scripted.surge.stop, drain=True)  # takes nothing back
        scripted.executor.let(None)
        for stop in (draining, hurrying, draining_again):
            stop.result(TIMEOUT_S)
    assert generation.result(0.0)[0].finish_reason == "abort"
    assert scripted.executor.num_steps < 50


def test_whoever_submits_while_others_stop_and_start_gets_an_answer(scripted: Scripted) -> None:
    ended = threading.Event()

    def submit(seed: int) -> int:
        answers = 0
        while not ended.is_set() or answers == 0:
            try:
                [sample] = scripted.surge.generate([seed], SHORT).result(TIMEOUT_S)
            except EngineStopped:
                continue
            assert sample.finish_reason in ("length", "abort")
            answers += 1
        return answers

    with ThreadPoolExecutor(4) as pool:
        submitters = [pool.submit(submit, seed) for seed in range(1, 5)]
        try:
            for round_ in range(30):
                scripted.surge.stop(drain=round_ % 2 == 0)
                scripted.surge.start()
        finally:
            ended.set()
        assert all(submitter.result(TIMEOUT_S) for submitter in submitters)
    assert scripted.pool.num_used == 0


@pytest.mark.parametrize("fails", [True, False])
def test_a_with_block_drains_and_one_that_fails_aborts(
    make_scripted: Callable[..., Scripted], fails: bool
) -> None:
    scripted = make_scripted()

    def go_on_when_it_stops() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while scripted.surge._engine.is_running and time.monotonic() < deadline:
            time.sleep(0.001)
        scripted.executor.let(None)

    def use() -> Any:
        with ThreadPoolExecutor(1) as pool, scripted.surge as surge:
            scripted.executor.hold()
            generations.append(surge.generate([1], LONG))
            scripted.executor.let(1)
            pool.submit(go_on_when_it_stops)
            if fails:
                raise ZeroDivisionError

    generations: list[Any] = []
    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert generations[0].result(0.0)[0].finish_reason == ("abort" if fails else "length")
    assert not scripted.executor.is_allocated


def test_the_queue_holds_as_many_as_it_says_and_all_or_none_of_a_list(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted(rows=1, max_queued_requests=3)
    scripted.surge.start()
    scripted.executor.hold()
    running = scripted.surge.generate([1], LONG)
    scripted.executor.let(1)
    scripted.executor.wait_for_steps(1)  # it has left the queue
    waiting = [scripted.surge.generate([2], SHORT)]
    with pytest.raises(QueueFull, match="1 requests are waiting and 3 more came: max_queued_requests=3"):
        scripted.surge.generate([[1], [2], [3]], SHORT)
    waiting += [scripted.surge.generate([[3], [4]], SHORT)]
    with pytest.raises(QueueFull, match="3 requests are waiting and 1 more came"):
        scripted.surge.generate([1], SHORT)
    scripted.executor.let(None)
    assert running.result(TIMEOUT_S)
    assert [len(w.result(TIMEOUT_S)) for w in waiting] == [1, 2]
    check_it_serves(scripted)
    assert scripted.surge._engine._num_waiting == scripted.surge._engine._num_submitted == 0


def test_aborted_requests_leave_the_queue(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(rows=1, max_queued_requests=2)
    scripted.surge.start()
    scripted.executor.hold()
    first = scripted.surge.generate([1], SamplingParams(max_tokens=20))
    scripted.executor.let(1)
    scripted.executor.wait_for_steps(1)
    waiting = scripted.surge.generate([[2], [3]], SHORT)
    waiting.abort()
    scripted.executor.let(1)
    assert [s.finish_reason for s in waiting.result(TIMEOUT_S)] == ["abort", "abort"]
    more = scripted.surge.generate([[4], [5]], SHORT)
    scripted.executor.let(None)
    assert [s.finish_reason for s in (*first.result(TIMEOUT_S), *more.result(TIMEOUT_S))] == ["length"] * 3


def test_an_engine_that_nobody_refers_to_ends_its_thread(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted()
    scripted.surge.start()
    thread = scripted.surge._engine._thread
    assert thread is not None
    generation = scripted.surge.generate([1], SHORT)
    alive = weakref.ref(scripted.surge)
    engine, scripted.surge = scripted.surge._engine, None  # pyright: ignore[reportAttributeAccessIssue]
    gc.collect()
    assert generation.result(TIMEOUT_S)[0].finish_reason == "length"  # it still had somebody
    assert alive() is not None
    del generation
    gc.collect()
    assert alive() is None
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    scripted.surge = engine  # pyright: ignore[reportAttributeAccessIssue]  (the fixture stops it once more)


SCRIPT_THAT_JUST_ENDS = """
import sys
from vsurge.model import Qwen3Config, random_model
from vsurge.runtime import SamplingParams, vSurge
config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_q_heads=2,
                     num_kv_heads=1, head_dim=16, max_position_embeddings=100_000)
surge = vSurge.from_model(random_model(config, seed=0), max_concurrent_decodes=1, prefill_lengths=[8],
                          page_size=16, num_pages=6300, verbose=False)
surge.start()
generation = surge.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=90_000, ignore_eos=True))
next(iter(generation))
print("streams", flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "del surge, generation; raise SystemExit(0)"])
def test_a_script_that_ends_without_stopping_the_engine_neither_hangs_nor_crashes(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_THAT_JUST_ENDS.format(end=end)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "streams\n", "")


def test_a_cache_that_does_not_fit_says_how_large_it_would_be(model: Any) -> None:
    surge = vSurge.from_model(
        model, num_pages=1000, page_size=10**9, max_length=64, max_concurrent_decodes=2, verbose=False
    )
    surge.compile = lambda: None  # needs no memory, and takes a while
    with pytest.raises(OutOfMemory, match=r"num_pages=1000: a cache of .* GiB does not fit"):
        surge.start()
    with pytest.raises(EngineStopped):
        surge.generate([1], SHORT)
