"""The queue before the batch: how many requests it takes, and which leave it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vsurge.runtime import QueueFull, SamplingParams

from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves


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
    with pytest.raises(
        QueueFull, match="1 requests are waiting and 3 more came: max_queued_requests=3; try again later"
    ):
        scripted.surge.generate([[1], [2], [3]], SHORT)
    waiting += [scripted.surge.generate([[3], [4]], SHORT)]
    with pytest.raises(QueueFull, match="3 requests are waiting and 1 more came"):
        scripted.surge.generate([1], SHORT)
    scripted.executor.let(None)
    assert running.result(TIMEOUT_S)
    assert [len(w.result(TIMEOUT_S)) for w in waiting] == [1, 2]
    check_it_serves(scripted)
    inbox = scripted.surge._engine._inbox
    assert inbox.num_queued == inbox.num_submitted == 0


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


def test_all_prompts_of_a_call_begin_in_the_queue_though_places_are_free(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted(rows=4, max_queued_requests=2)
    scripted.surge.start()
    message = "0 requests are waiting and 3 more came: max_queued_requests=2; pass fewer prompts at a time or"
    with pytest.raises(QueueFull, match=message):
        scripted.surge.generate([[1], [2], [3]], SHORT)
    assert len(scripted.surge.generate([[1], [2]], SHORT).result(TIMEOUT_S)) == 2
    check_it_serves(scripted)
