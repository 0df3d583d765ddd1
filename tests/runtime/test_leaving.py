"""Leaving a `Generation` early, in every way there is, ends its requests and frees their pages."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable

import pytest

from vsurge.runtime import Generation, SamplingParams

from .scripted import LONG, PROMPT, TIMEOUT_S, Scripted, check_it_serves, run, tokens_of


def check_it_ended_early(scripted: Scripted, *, steps_below: int) -> None:
    check_it_serves(scripted)
    assert scripted.executor.num_steps < steps_below


def leave_by_aclose(generation: Generation) -> None:
    asyncio.run(generation.aclose())


def leave_by_abort(generation: Generation) -> None:
    generation.abort()


def leave_async_with(generation: Generation) -> None:
    async def leave() -> None:
        async with generation as samples:
            await anext(samples)

    run(leave())


def cancel_await(generation: Generation) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(generation)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(leave())


def cancel_iteration(generation: Generation) -> None:
    async def leave() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in generation:
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(leave())


def cancel_gather(generation: Generation) -> None:
    async def leave() -> None:
        gathered = asyncio.gather(generation, asyncio.sleep(0))
        await asyncio.sleep(0)
        gathered.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gathered

    run(leave())


def time_out(generation: Generation) -> None:
    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(generation, 0.01)

    run(leave())


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_aclose,
        leave_by_abort,
        leave_async_with,
        cancel_await,
        cancel_iteration,
        cancel_gather,
        time_out,
    ],
)
def test_leaving_ends_the_requests_as_aborted_and_frees_their_pages(
    scripted: Scripted, leave: Callable[[Generation], None]
) -> None:
    scripted.executor.hold()
    stream = leave in (leave_async_with, cancel_iteration)
    generation = scripted.surge.generate([PROMPT, [8]], LONG, stream=stream)
    scripted.executor.let(6)
    leave(generation)
    scripted.executor.let(None)
    samples = generation.result(TIMEOUT_S)
    assert [s.finish_reason for s in samples] == ["abort", "abort"]
    assert all(
        s.token_ids == tokens_of(p, len(s.token_ids)) for s, p in zip(samples, [PROMPT, [8]], strict=True)
    )
    check_it_ended_early(scripted, steps_below=90)


def test_dropping_a_generation_frees_its_pages(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([PROMPT, [8]], LONG)
    scripted.executor.let(6)
    next(iter(generation))
    del generation
    check_it_ended_early(scripted, steps_below=90)


@pytest.mark.parametrize("kind", ["async", "plain"])
def test_break_out_of_a_loop_frees_the_pages_of_what_nobody_holds(scripted: Scripted, kind: str) -> None:
    scripted.executor.hold()
    scripted.executor.let(6)

    async def leave() -> None:
        async for _ in scripted.surge.generate(PROMPT, LONG, stream=True):
            break

    if kind == "async":
        run(leave())
    else:
        for _ in scripted.surge.generate(PROMPT, LONG):
            break
    gc.collect()
    check_it_ended_early(scripted, steps_below=90)


def test_a_request_that_waits_for_a_place_can_be_aborted(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(rows=1)
    scripted.surge.start()
    scripted.executor.hold()
    first = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=5))
    second = scripted.surge.generate([8], LONG)
    second.abort()
    scripted.executor.let(None)
    assert second.result(TIMEOUT_S)[0].finish_reason == "abort"
    assert second.result(TIMEOUT_S)[0].token_ids == ()
    assert first.result(TIMEOUT_S)[0].token_ids == tokens_of(PROMPT, 5)
    check_it_ended_early(scripted, steps_below=20)


def test_aborting_what_has_ended_changes_nothing(scripted: Scripted) -> None:
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=5))
    final = generation.result(TIMEOUT_S)
    generation.abort()
    asyncio.run(generation.aclose())
    check_it_ended_early(scripted, steps_below=20)
    assert generation.result(TIMEOUT_S) == final
    assert final[0].finish_reason == "length"


def in_a_thread(function: Callable[[], None]) -> None:
    """Runs it where a deadlock would not hang the tests."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "deadlock"


def test_the_garbage_collector_may_drop_a_generation_while_its_thread_holds_the_locks(
    scripted: Scripted,
) -> None:
    scripted.executor.hold()
    held = [scripted.surge.generate(PROMPT, LONG)]
    channel = held[0]._channel

    def collect() -> None:
        with channel._lock, scripted.surge._engine._inbox.lock:
            held.clear()

    in_a_thread(collect)
    check_it_ended_early(scripted, steps_below=90)


def test_the_garbage_collector_may_end_a_coroutine_while_its_thread_holds_the_locks(
    scripted: Scripted,
) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, LONG)

    async def wait_a_little() -> None:
        coroutine = generation._wait()
        coroutine.send(None)

        def collect() -> None:
            with generation._channel._lock, scripted.surge._engine._inbox.lock:
                coroutine.close()

        in_a_thread(collect)

    run(wait_a_little())
    check_it_ended_early(scripted, steps_below=90)
