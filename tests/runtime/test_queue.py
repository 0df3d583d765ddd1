"""The queue before the batch: how many requests it takes, and which leave it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vsurge.runtime import QueueFull, SamplingParams
from vsurge.runtime.request_builder import RequestBuilder

from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves, tokens_of


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


def test_completions_that_the_queue_has_no_room_for_are_not_even_made(
    make_scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = make_scripted(max_queued_requests=4)
    scripted.surge.start()
    with monkeypatch.context() as patch:
        patch.setattr(RequestBuilder, "build", None)
        with pytest.raises(QueueFull, match="0 requests are waiting and 6 more came"):
            scripted.surge.generate([[1], [2]], SamplingParams(n=2, best_of=3))
    check_it_serves(scripted)


def test_who_lost_its_pages_takes_no_place_in_the_queue(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(rows=4, num_pages=5, max_queued_requests=4)
    scripted.surge.start()
    scripted.executor.hold()
    # Four prompts of a page each, which soon need two: some lose theirs.
    running = scripted.surge.generate([[i] * 14 for i in range(1, 5)], SamplingParams(max_tokens=30))
    scripted.executor.let(6)
    scripted.executor.wait_until_held()
    assert scripted.surge.metrics.num_preempted >= 1
    waiting = [scripted.surge.generate([9, i], SHORT) for i in range(4)]
    with pytest.raises(QueueFull, match="4 requests are waiting and 1 more came"):
        scripted.surge.generate([9], SHORT)
    scripted.executor.let(None)
    samples = running.result(TIMEOUT_S)
    assert [s.token_ids for s in samples] == [tokens_of([i] * 14, 30) for i in range(1, 5)]
    assert sum(s.num_preemptions for s in samples) >= 1
    assert [w.result(TIMEOUT_S)[0].token_ids for w in waiting] == [tokens_of([9, i], 3) for i in range(4)]
    check_it_serves(scripted)
