"""Requests that end before their time: by id, by a timeout, or because a stop would wait no longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from vsurge.runtime import Generation, SamplingParams

from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves, tokens_of


def test_every_prompt_has_an_id_of_its_own_from_the_first_sample_to_the_last(scripted: Scripted) -> None:
    calls = [scripted.surge.generate([[1], [2]], SHORT) for _ in range(3)]
    ids = [request_id for call in calls for request_id in call.request_ids]
    assert len(set(ids)) == 6
    for call in calls:
        for samples in call:
            assert tuple(sample.request_id for sample in samples) == call.request_ids


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def by_id(scripted: Scripted, held: list[Generation]) -> None:
    assert all(scripted.surge.abort(request_id) for request_id in held[0].request_ids)


def by_dropping_it(_: Scripted, held: list[Generation]) -> None:
    held.clear()


def by_aclose(_: Scripted, held: list[Generation]) -> None:
    asyncio.run(held[0].aclose())


def by_leaving_the_iterator(_: Scripted, held: list[Generation]) -> None:
    for _samples in held.pop():
        break


def by_cancelling(_: Scripted, held: list[Generation]) -> None:
    async def cancel() -> None:
        task = asyncio.ensure_future(held[0])
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


def by_its_timeout(_: Scripted, __: list[Generation]) -> None:
    time.sleep(0.06)  # see below


@pytest.mark.parametrize(
    "leave",
    [by_id, by_dropping_it, by_aclose, by_leaving_the_iterator, by_cancelling, by_its_timeout],
)
def test_pages_are_free_within_one_step(
    scripted: Scripted, leave: Callable[[Scripted, list[Generation]], None]
) -> None:
    scripted.executor.hold()
    timeout_s = 0.05 if leave is by_its_timeout else None
    held = [scripted.surge.generate([[1], [2]], LONG, timeout_s=timeout_s)]
    other = scripted.surge.generate([3], SamplingParams(max_tokens=20))
    scripted.executor.let(3)
    scripted.executor.wait_until_held()
    assert scripted.pool.num_used == 3
    leave(scripted, held)
    scripted.executor.let(1)  # the step that it stands in
    wait_until(lambda: scripted.surge.metrics.num_aborted + scripted.surge.metrics.num_timed_out == 2)
    assert scripted.surge.metrics.num_pages_used == 1
    assert scripted.executor.num_steps == 4
    scripted.executor.let(None)
    assert other.result(TIMEOUT_S)[0].token_ids == tokens_of([3], 20)
    check_it_serves(scripted)


def test_abort_by_id_ends_one_prompt_of_a_call_from_any_thread(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([[1], [2]], SamplingParams(max_tokens=20))
    scripted.executor.let(3)
    scripted.executor.wait_until_held()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(scripted.surge.abort, generation.request_ids[0]).result(TIMEOUT_S)
    scripted.executor.let(None)
    aborted, other = generation.result(TIMEOUT_S)
    assert (aborted.finish_reason, other.finish_reason) == ("abort", "length")
    assert aborted.token_ids == tokens_of([1], len(aborted.token_ids))
    assert other.token_ids == tokens_of([2], 20)
    check_it_serves(scripted)


def test_abort_says_whether_there_was_anything_to_abort(scripted: Scripted) -> None:
    generation = scripted.surge.generate([1], SHORT)
    [sample] = generation.result(TIMEOUT_S)
    assert scripted.surge.abort(sample.request_id) is False  # has ended
    assert scripted.surge.abort("there is none") is False
    assert generation.result(TIMEOUT_S) == [sample]
    scripted.surge.pause()
    waits = scripted.surge.generate([1], SHORT)
    assert scripted.surge.abort(waits.request_ids[0]) is True
    assert waits.result(TIMEOUT_S)[0].finish_reason == "abort"
    assert scripted.surge.abort(waits.request_ids[0]) is False
    scripted.surge.stop()
    assert scripted.surge.abort(waits.request_ids[0]) is False  # nor does it need an engine that runs
    assert not scripted.surge._engine._inbox._under_way


def test_an_id_that_is_no_string_is_refused(scripted: Scripted) -> None:
    with pytest.raises(TypeError, match="request_id=7: must be a string"):
        scripted.surge.abort(7)  # pyright: ignore[reportArgumentType]


def test_a_request_whose_time_is_up_ends_with_what_it_has_and_frees_its_pages(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    elapsed_s = 0.0
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + elapsed_s)
    monkeypatch.setattr("vsurge.runtime.loop.time", clock)
    scripted.executor.hold()
    generation = scripted.surge.generate([[1], [2]], LONG, timeout_s=[1000, None])
    scripted.executor.let(3)
    scripted.executor.wait_until_held()
    assert scripted.pool.num_used == 2
    elapsed_s = 1000.0  # in the step
    scripted.executor.let(None)
    timed_out, other = generation.result(TIMEOUT_S)
    assert (timed_out.finish_reason, other.finish_reason) == ("timeout", "length")
    assert timed_out.token_ids == tokens_of([1], len(timed_out.token_ids))
    assert 2 <= len(timed_out.token_ids) <= 4  # the step it stood in was its last
    assert other.token_ids == tokens_of([2], 100)
    assert scripted.surge.metrics.num_timed_out == 1
    check_it_serves(scripted)


def test_a_request_that_waits_in_the_queue_times_out_there(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(rows=1)
    scripted.surge.start()
    scripted.executor.hold()
    first = scripted.surge.generate([1], LONG)
    waits = scripted.surge.generate([2], SHORT, timeout_s=0.01)
    scripted.executor.wait_until_held()
    time.sleep(0.02)
    scripted.executor.let(1)
    [sample] = waits.result(TIMEOUT_S)
    assert (sample.finish_reason, sample.token_ids, sample.metrics.queue_time_s) == ("timeout", (), None)
    assert scripted.executor.num_steps <= 2
    scripted.executor.let(None)
    assert first.result(TIMEOUT_S)[0].token_ids == tokens_of([1], 100)
    check_it_serves(scripted)


@pytest.mark.parametrize("timeout_s", [1e-9, 0.02, 60, 1e300])
def test_a_timeout_may_be_shorter_than_a_step_or_longer_than_any(
    scripted: Scripted, timeout_s: float
) -> None:
    scripted.surge.pause()
    generation = scripted.surge.generate([1], SHORT, timeout_s=timeout_s)
    if timeout_s < 1:
        assert generation.result(TIMEOUT_S)[0].finish_reason == "timeout"
    scripted.surge.resume()
    assert generation.result(1e300)[0].finish_reason == ("timeout" if timeout_s < 1 else "length")
    assert scripted.surge._engine._loop._roster.deadlines.next() is None  # what has ended is not watched
    check_it_serves(scripted)


def test_a_timeout_wakes_an_engine_whose_figures_have_come_to_rest(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsurge.runtime.meter.WINDOW_S", 0.02)
    monkeypatch.setattr("vsurge.runtime.loop.REFRESH_S", 0.01)
    scripted.surge.pause()
    generation = scripted.surge.generate([1], SHORT, timeout_s=0.3)
    assert generation.result(TIMEOUT_S)[0].finish_reason == "timeout"
    scripted.surge.resume()
    check_it_serves(scripted)


@pytest.mark.parametrize(
    ("timeout_s", "error", "message"),
    [
        (0, ValueError, r"timeout_s=0: must lie in \(0.0, infinity\)"),
        (-1.0, ValueError, "timeout_s=-1.0: must lie in"),
        (float("nan"), ValueError, "timeout_s=nan: must lie in"),
        ("5", TypeError, "timeout_s='5': must be a number"),
        (True, TypeError, "timeout_s=True: must be a number"),
        ([1.0], ValueError, "timeout_s: 1 of them for 2 prompts; give one, or one each"),
        ([1.0, 0], ValueError, r"timeout_s\[1\]=0: must lie in"),
    ],
)
def test_a_timeout_that_cannot_work_is_refused(
    scripted: Scripted, timeout_s: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scripted.surge.generate([[1], [2]], SHORT, timeout_s=timeout_s)
    if not isinstance(timeout_s, list):
        with pytest.raises(error, match=message):
            scripted.surge.stop(timeout_s=timeout_s)


def test_a_stop_aborts_what_has_not_finished_in_time_and_says_so(scripted: Scripted) -> None:
    scripted.executor.hold()
    ends = scripted.surge.generate([1], SamplingParams(max_tokens=1))
    scripted.executor.let(1)
    generations = [scripted.surge.generate([i], LONG) for i in range(2, 9)]  # more than there are rows
    scripted.executor.wait_until_held()  # else they might all be cut between two steps
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(scripted.surge.stop, timeout_s=0.02)
        while scripted.surge._engine._inbox.state.value != "stopping":
            assert not stopping.done()
        scripted.executor.let(None)
        assert stopping.result(TIMEOUT_S) is False
    assert ends.result(0.0)[0].finish_reason == "length"
    assert {generation.result(0.0)[0].finish_reason for generation in generations} == {"abort"}
    assert scripted.executor.num_steps < 50
    thread = scripted.surge._engine._inbox.thread
    assert thread is not None
    assert not thread.is_alive()
    scripted.surge.start()
    check_it_serves(scripted)
    assert scripted.surge.stop(timeout_s=TIMEOUT_S) is True  # all finished in time
    assert scripted.surge.stop() is True  # of what does not run


def test_a_stop_that_does_not_drain_takes_no_timeout(scripted: Scripted) -> None:
    with pytest.raises(ValueError, match=r"timeout_s=5\.0: is for drain=True; drain=False aborts at once"):
        scripted.surge.stop(drain=False, timeout_s=5.0)
    check_it_serves(scripted)
