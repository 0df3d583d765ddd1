"""When a step fails, its callers hear of it; when the engine does, every caller, and `start` begins anew."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from vsurge.runtime import EngineFailed, EngineStopped, OutOfMemory, SamplingParams, StepFailed, vSurge
from vsurge.runtime.detokenizer import Detokenizer
from vsurge.runtime.request import NOT_FINITE, LogitsError

from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves, counting_script, run, tokens_of


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


@pytest.mark.parametrize("how", ["fails", "unreadable"])
def test_a_step_that_fails_ends_its_requests_and_no_others(
    make_scripted: Callable[..., Scripted], how: str
) -> None:
    scripted = make_scripted(rows=2)
    scripted.surge.start()
    executor, error = scripted.executor, ZeroDivisionError("broken")
    getattr(executor, how)[4] = error
    executor.hold()
    victims = [scripted.surge.generate([1], LONG), scripted.surge.generate([2], LONG)]
    executor.let(1)
    executor.wait_for_steps(1)
    waiting = [scripted.surge.generate([i], SHORT) for i in range(3, 6)]
    executor.let(None)
    for victim in victims:
        with pytest.raises(StepFailed, match=r"a step of the request failed: ZeroDivisionError") as raised:
            victim.result(TIMEOUT_S)
        assert raised.value.__cause__ is error
    for i, generation in zip(range(3, 6), waiting, strict=True):
        assert generation.result(TIMEOUT_S)[0].token_ids == tokens_of([i], 3)
    assert executor.num_allocations == 2  # what a failed step leaves of the cache is not to be trusted
    check_it_serves(scripted)


def test_who_had_all_of_its_steps_before_the_one_that_fails_gets_all_tokens(scripted: Scripted) -> None:
    executor = scripted.executor
    executor.fails[4] = ZeroDivisionError()
    executor.hold()
    ends, victim = scripted.surge.generate([1], SHORT), scripted.surge.generate([2], LONG)
    executor.let(None)
    assert ends.result(TIMEOUT_S)[0].token_ids == tokens_of([1], 3)  # the last of which were still under way
    with pytest.raises(StepFailed):
        victim.result(TIMEOUT_S)
    check_it_serves(scripted)


def test_who_joined_after_the_step_that_fails_begins_anew_unharmed(scripted: Scripted) -> None:
    executor = scripted.executor
    executor.unreadable[2] = ZeroDivisionError()  # found out once the third step is dispatched
    executor.hold()
    victim = scripted.surge.generate([1], LONG)
    executor.let(1)
    executor.wait_for_steps(1)
    executor.wait_until_held()  # in the second step
    joins = scripted.surge.generate([2] * 5, SHORT)
    executor.let(None)
    with pytest.raises(StepFailed):
        victim.result(TIMEOUT_S)
    [sample] = joins.result(TIMEOUT_S)
    assert sample.token_ids == tokens_of([2] * 5, 3)
    assert sample.num_preemptions == 1
    check_it_serves(scripted)


def test_the_other_prompts_of_a_call_go_on_and_come_with_the_exception(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted(rows=1)
    scripted.surge.start()
    executor = scripted.executor
    executor.fails[5] = ZeroDivisionError()  # the second one of the second prompt
    executor.hold()
    call = scripted.surge.generate([[1], [2], [3]], SHORT)
    other = scripted.surge.generate([4], SHORT)
    executor.let(3)
    executor.wait_until_held()  # in the first step of the second prompt: the first prompt has ended
    assert [sample.finish_reason for sample in next(iter(call))] == ["length", None, None]
    executor.let(None)
    for wait in (lambda: call.result(TIMEOUT_S), lambda: list(call), lambda: run(call._wait())):
        with pytest.raises(StepFailed, match="ZeroDivisionError") as raised:
            wait()
        first, second, third = raised.value.samples
        assert first is not None
        assert second is None
        assert third is not None
        assert [first.token_ids, third.token_ids] == [tokens_of([1], 3), tokens_of([3], 3)]
        assert [first.finish_reason, third.finish_reason] == ["length", "length"]
    assert other.result(TIMEOUT_S)[0].token_ids == tokens_of([4], 3)
    assert scripted.surge.metrics.num_failed == 1
    check_it_serves(scripted)
    assert [prompt[0] for prompt in executor.prompts] == [1, 2, 3, 4, 9]


def test_logits_that_are_no_numbers_fail_their_own_request_only(scripted: Scripted) -> None:
    executor = scripted.executor
    executor.script = lambda ids, index: (
        NOT_FINITE if (ids, index) == ([1], 2) else counting_script(ids, index)
    )
    executor.hold()
    victim, other = scripted.surge.generate([1], LONG), scripted.surge.generate([2], SHORT)
    executor.let(None)
    message = r"LogitsError\(.the model's logits after 3 tokens hold NaN or infinity"
    with pytest.raises(StepFailed, match=message) as raised:
        victim.result(TIMEOUT_S)
    assert isinstance(raised.value.__cause__, LogitsError)
    assert other.result(TIMEOUT_S)[0].token_ids == tokens_of([2], 3)
    assert executor.num_allocations == 1
    assert scripted.surge.metrics.num_failed == 1
    check_it_serves(scripted)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
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
    breaks = scripted.surge.generate([2], replace(SHORT, stop="what ends it"))
    scripted.executor.let(None)
    for generation in (breaks, ends, first):
        with pytest.raises(StepFailed):
            generation.result(TIMEOUT_S)
    monkeypatch.undo()
    check_it_serves(scripted)


def test_a_failure_while_a_text_is_ended_leaves_nothing_behind(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(Detokenizer, "finish", broken)
    with pytest.raises(StepFailed):
        scripted.surge.generate([1], replace(SHORT, stop="what ends it")).result(TIMEOUT_S)
    monkeypatch.undo()
    check_it_serves(scripted)


def test_what_had_ended_before_a_failure_stays_readable(scripted: Scripted) -> None:
    done = scripted.surge.generate([1], SHORT)
    final = done.result(TIMEOUT_S)
    scripted.executor.error = SystemExit()
    with pytest.raises(EngineFailed):
        scripted.surge.generate([2], SHORT).result(TIMEOUT_S)
    assert done.result(TIMEOUT_S) == final
    assert list(done) == [final]


def test_requests_that_no_step_has_seen_get_the_failure_too(scripted: Scripted) -> None:
    scripted.executor.hold()
    first = scripted.surge.generate([1], SHORT)
    scripted.executor.error = SystemExit()
    late = [scripted.surge.generate([i], SHORT) for i in range(2, 30)]
    scripted.executor.let(None)
    for generation in (first, *late):
        with pytest.raises(EngineFailed):
            generation.result(TIMEOUT_S)


def test_a_cache_that_does_not_fit_says_how_large_it_would_be(model: Any) -> None:
    surge = vSurge.from_model(
        model, num_pages=2, page_size=10**9, max_length=64, max_concurrent_decodes=2, verbose=False
    )
    surge.compile = lambda: pytest.fail("compiles first, which takes a while")
    with pytest.raises(OutOfMemory, match=r"num_pages=2: a cache of .* GiB does not fit"):
        surge.start()
    with pytest.raises(EngineStopped):
        surge.generate([1], SHORT)
