"""A paused engine runs no step, keeps what it has, takes new requests, and can be told anything meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from vsurge.runtime import EngineFailed, EngineStopped, Generation, QueueFull, SamplingParams

from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves, tokens_of


@dataclass
class Paused(Scripted):
    generation: Generation


@pytest.fixture
def paused(scripted: Scripted) -> Paused:
    """One that runs `[1]`, of which some tokens are there."""
    scripted.executor.hold()
    generation = scripted.surge.generate([1], LONG)
    scripted.executor.let(5)
    scripted.executor.wait_until_held()
    with ThreadPoolExecutor(1) as pool:
        pausing = pool.submit(scripted.surge.pause)
        while not scripted.surge.is_paused:
            assert not pausing.done()
        scripted.executor.let(None)
        pausing.result(TIMEOUT_S)
    return Paused(scripted.surge, scripted.executor, scripted.pool, generation)


def test_pause_returns_when_no_step_is_under_way_and_none_runs_until_resume(paused: Paused) -> None:
    num_steps = paused.executor.num_steps
    assert num_steps <= 6  # the five, and the one it stood in
    assert len(next(iter(paused.generation))[0].token_ids) == num_steps  # all of them were read
    assert paused.pool.num_used == 1
    for _ in range(3):
        paused.surge.pause()  # again: nothing happens
        paused.surge.start()  # of what runs: nothing happens
    late = paused.surge.generate([2], SHORT)
    assert not late._channel.wait(0, until_finished=False, timeout_s=0.05)
    assert paused.executor.num_steps == num_steps
    paused.surge.resume()
    paused.surge.resume()  # of what is not paused: nothing happens
    assert not paused.surge.is_paused
    assert paused.generation.result(TIMEOUT_S)[0].token_ids == tokens_of([1], 100)
    assert paused.generation.result(TIMEOUT_S)[0].num_preemptions == 0
    assert late.result(TIMEOUT_S)[0].token_ids == tokens_of([2], 3)
    check_it_serves(paused)


def test_while_paused_the_queue_fills_and_then_refuses(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(rows=4, max_queued_requests=3)
    scripted.surge.start()
    scripted.surge.pause()
    waiting = [scripted.surge.generate([i], SHORT) for i in range(1, 4)]
    deadline = time.monotonic() + TIMEOUT_S
    while scripted.surge.metrics.num_waiting < 3:  # the thread takes them, though it runs none
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with pytest.raises(QueueFull, match="3 requests are waiting and 1 more came"):
        scripted.surge.generate([4], SHORT)
    scripted.surge.resume()
    assert [g.result(TIMEOUT_S)[0].token_ids for g in waiting] == [tokens_of([i], 3) for i in range(1, 4)]
    check_it_serves(scripted)


def test_aborts_and_timeouts_take_effect_while_paused(paused: Paused) -> None:
    waiting = paused.surge.generate([2], LONG, timeout_s=0.01)
    aborted = paused.surge.generate([3], LONG)
    assert waiting.result(TIMEOUT_S)[0].finish_reason == "timeout"
    assert paused.surge.abort(aborted.request_ids[0])
    paused.generation.abort()
    assert aborted.result(TIMEOUT_S)[0].finish_reason == "abort"
    assert paused.generation.result(TIMEOUT_S)[0].finish_reason == "abort"
    assert paused.surge.is_paused
    assert paused.surge.metrics.num_pages_used == 0
    paused.surge.resume()
    check_it_serves(paused)


def test_a_stop_that_drains_lets_a_paused_engine_go_on(paused: Paused) -> None:
    waiting = paused.surge.generate([2], SHORT)
    assert paused.surge.stop(drain=True)
    assert paused.generation.result(0.0)[0].token_ids == tokens_of([1], 100)
    assert waiting.result(0.0)[0].token_ids == tokens_of([2], 3)
    paused.surge.start()
    assert not paused.surge.is_paused
    check_it_serves(paused)


def test_a_stop_that_does_not_drain_ends_a_paused_engine_at_once(paused: Paused) -> None:
    num_steps = paused.executor.num_steps
    assert not paused.surge.stop(drain=False)
    assert paused.generation.result(0.0)[0].finish_reason == "abort"
    assert paused.executor.num_steps == num_steps
    paused.surge.start()
    check_it_serves(paused)


def test_what_does_not_run_can_be_neither_paused_nor_resumed(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted()
    for call in (scripted.surge.pause, scripted.surge.resume):
        with pytest.raises(EngineStopped, match=r"the engine is stopped: call start\(\) first"):
            call()
    scripted.surge.start()
    scripted.executor.error = SystemExit()
    with pytest.raises(EngineFailed):
        scripted.surge.generate([1], SHORT).result(TIMEOUT_S)
    for call in (scripted.surge.pause, scripted.surge.resume):
        with pytest.raises(EngineFailed):
            call()


def test_a_thread_that_fails_lets_go_of_who_wants_to_pause_it(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([1], LONG)
    scripted.executor.wait_until_held()
    with ThreadPoolExecutor(1) as pool:
        pausing = pool.submit(scripted.surge.pause)
        while not scripted.surge.is_paused:
            assert not pausing.done()
        scripted.executor.error = SystemExit()
        scripted.executor.let(None)
        pausing.result(TIMEOUT_S)
    with pytest.raises(EngineFailed):
        generation.result(TIMEOUT_S)


def test_threads_that_pause_and_resume_lose_no_request(scripted: Scripted) -> None:
    ended = threading.Event()

    def pause_and_resume() -> int:
        rounds = 0
        while not ended.is_set():
            scripted.surge.pause()
            scripted.surge.resume()
            time.sleep(0.001)  # else nothing ever runs
            rounds += 1
        return rounds

    with ThreadPoolExecutor(2) as pool:
        pausers = [pool.submit(pause_and_resume) for _ in range(2)]
        try:
            for i in range(1, 30):
                [sample] = scripted.surge.generate([i], SamplingParams(max_tokens=5)).result(TIMEOUT_S)
                assert sample.token_ids == tokens_of([i], 5)
        finally:
            ended.set()
        assert all(pauser.result(TIMEOUT_S) > 0 for pauser in pausers)
    check_it_serves(scripted)
