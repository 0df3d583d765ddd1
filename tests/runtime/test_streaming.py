"""`Generation` in asyncio and without it: what readers get, and that leaving early frees the pages."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vsurge.runtime import EngineError, Generation, ReturnSample, SamplingParams
from vsurge.runtime.channel import Channel

from .conftest import TIMEOUT_S, Scripted, counting_script

PROMPT = [5, 6, 7]
LONG = SamplingParams(max_tokens=100)


def tokens_of(prompt: list[int], count: int) -> tuple[int, ...]:
    return tuple(counting_script(prompt, i) for i in range(count))


def run(coroutine: Any) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, TIMEOUT_S)

    return asyncio.run(bounded())


def check_all_is_free(scripted: Scripted, *, steps_below: int) -> None:
    """The engine goes on, and nothing but this probe, which it serves after what came before, holds pages."""
    scripted.executor.let(None)
    [sample] = scripted.surge.generate([9], SamplingParams(max_tokens=1)).result(TIMEOUT_S)
    assert sample.token_ids == tokens_of([9], 1)
    assert scripted.pool.num_used == 0
    assert scripted.executor.num_steps < steps_below


def check_growth(lists: list[list[ReturnSample]], prompts: list[list[int]], count: int) -> None:
    for samples in lists:
        assert len(samples) == len(prompts)
        for sample, prompt in zip(samples, prompts, strict=True):
            assert sample.token_ids == tokens_of(prompt, sample.num_generated_tokens)
            assert sample.num_prompt_tokens == len(prompt)
            assert (sample.time_to_first_token_s is None) is (sample.num_generated_tokens == 0)
    for before, after in itertools.pairwise(lists):
        assert any(a != b for a, b in zip(before, after, strict=True))
        assert all(b.text.startswith(a.text) for a, b in zip(before, after, strict=True))
    assert [s.finish_reason for s in lists[-1]] == ["length"] * len(prompts)
    assert [s.num_generated_tokens for s in lists[-1]] == [count] * len(prompts)


@pytest.mark.parametrize("stream", [False, True])
def test_async_iteration_gives_growing_lists_to_the_end(scripted: Scripted, stream: bool) -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]

    async def collect() -> list[list[ReturnSample]]:
        generation = scripted.surge.generate(prompts, SamplingParams(max_tokens=9), stream=stream)
        return [samples async for samples in generation]

    check_growth(run(collect()), prompts, 9)


def test_awaiting_a_stream_gives_the_iterator_itself(scripted: Scripted) -> None:
    async def collect() -> list[list[ReturnSample]]:
        generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=9), stream=True)
        awaited = await generation
        assert awaited is generation
        return [samples async for samples in awaited]

    check_growth(run(collect()), [PROMPT], 9)


def test_awaiting_without_a_stream_gives_the_final_list(scripted: Scripted) -> None:
    async def final() -> Any:
        return await scripted.surge.generate([PROMPT, [8]], SamplingParams(max_tokens=4))

    assert [s.token_ids for s in run(final())] == [tokens_of(PROMPT, 4), tokens_of([8], 4)]


def test_plain_iteration_gives_growing_lists_to_the_end(scripted: Scripted) -> None:
    check_growth(list(scripted.surge.generate(PROMPT, SamplingParams(max_tokens=9))), [PROMPT], 9)


def test_a_reader_that_keeps_up_gets_every_token_when_it_comes(scripted: Scripted) -> None:
    scripted.executor.hold()
    scripted.executor.let(2)  # a token is read when the step after its own has been dispatched
    seen: list[int] = []
    for [sample] in scripted.surge.generate(PROMPT, SamplingParams(max_tokens=9)):
        seen.append(sample.num_generated_tokens)
        scripted.executor.let(1)
    assert seen[:7] == list(range(1, 8))
    assert seen[-1] == 9  # the last two may come together: no step after theirs is waited for


def test_a_reader_that_comes_late_gets_the_latest_state_once(scripted: Scripted) -> None:
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=9))
    final = generation.result(TIMEOUT_S)
    assert list(generation) == [final]
    assert list(generation) == []
    assert generation.result(0.0) == final


def test_what_comes_last_is_not_lost_when_it_comes_between_looking_and_waiting() -> None:
    empty = ReturnSample("", (), 0, 0.0, None, None, 1)
    last = ReturnSample("x", (1,), 1, 1.0, 0.1, "stop", 1)

    def make() -> Generation:
        channel = Channel([empty])
        read, published = channel.read, []

        def read_just_before_the_end(seen: int) -> Any:
            news = read(seen)
            if not published:
                published.append(True)
                channel.publish({0: last})
            return news

        channel.read = read_just_before_the_end
        return Generation(channel, lambda: None, stream=True)

    async def collect() -> list[list[ReturnSample]]:
        return [samples async for samples in make()]

    assert list(make()) == [[last]]
    assert run(collect()) == [[last]]


def test_two_readers_of_one_generation_both_come_to_an_end(scripted: Scripted) -> None:
    async def collect() -> tuple[list[list[ReturnSample]], list[list[ReturnSample]]]:
        generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=50))

        async def read() -> list[list[ReturnSample]]:
            return [samples async for samples in generation]

        return await asyncio.gather(read(), read())

    one, other = run(collect())
    together = sorted([*one, *other], key=lambda samples: samples[0].num_generated_tokens)
    check_growth(together, [PROMPT], 50)


def test_an_engine_and_a_generation_belong_to_no_event_loop(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=30), stream=True)
    scripted.executor.let(5)

    async def first() -> list[ReturnSample]:
        return await anext(generation)

    async def rest() -> list[ReturnSample]:
        scripted.executor.let(None)
        return [samples async for samples in generation][-1]

    assert run(first())[0].finish_reason is None
    assert run(rest())[0].token_ids == tokens_of(PROMPT, 30)
    assert run(generation._wait()) is generation


def test_many_threads_and_event_loops_are_served_at_once(scripted: Scripted) -> None:
    def asynchronous(seed: int) -> tuple[int, ...]:
        async def last() -> tuple[int, ...]:
            generation = scripted.surge.generate([seed], SamplingParams(max_tokens=20))
            return [samples async for samples in generation][-1][0].token_ids

        return run(last())

    def synchronous(seed: int) -> tuple[int, ...]:
        return list(scripted.surge.generate([seed], SamplingParams(max_tokens=20)))[-1][0].token_ids

    def blocking(seed: int) -> tuple[int, ...]:
        return scripted.surge.generate([seed], SamplingParams(max_tokens=20)).result(TIMEOUT_S)[0].token_ids

    with ThreadPoolExecutor(12) as pool:
        jobs = [
            (seed, pool.submit(read, seed))
            for seed in range(1, 25)
            for read in (asynchronous, synchronous, blocking)
        ]
        for seed, job in jobs:
            assert job.result(TIMEOUT_S) == tokens_of([seed], 20)
    assert scripted.pool.num_used == 0


def test_result_can_be_asked_again_after_its_timeout(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=3))
    with pytest.raises(TimeoutError, match=r"timeout_s=0.01"):
        generation.result(0.01)
    scripted.executor.let(None)
    assert generation.result(TIMEOUT_S)[0].token_ids == tokens_of(PROMPT, 3)


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
        task = asyncio.create_task(generation._wait())
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


def time_out(generation: Generation) -> None:
    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(generation._wait(), 0.01)

    run(leave())


@pytest.mark.parametrize(
    "leave",
    [leave_by_aclose, leave_by_abort, leave_async_with, cancel_await, cancel_iteration, time_out],
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
    check_all_is_free(scripted, steps_below=90)


def test_dropping_a_generation_frees_its_pages(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([PROMPT, [8]], LONG)
    scripted.executor.let(6)
    next(iter(generation))
    del generation
    check_all_is_free(scripted, steps_below=90)


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
    check_all_is_free(scripted, steps_below=90)


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
    check_all_is_free(scripted, steps_below=20)


def test_aborting_what_has_ended_changes_nothing(scripted: Scripted) -> None:
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=5))
    final = generation.result(TIMEOUT_S)
    generation.abort()
    asyncio.run(generation.aclose())
    check_all_is_free(scripted, steps_below=20)
    assert generation.result(TIMEOUT_S) == final
    assert final[0].finish_reason == "length"


def test_an_event_loop_that_is_closed_while_one_waits_in_it_does_not_harm_the_engine(
    scripted: Scripted,
) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=5))
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it would complain of the task that is left behind
    task = loop.create_task(generation._wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    scripted.executor.let(None)
    assert generation.result(TIMEOUT_S)[0].token_ids == tokens_of(PROMPT, 5)
    assert not task.done()
    check_all_is_free(scripted, steps_below=20)


def test_an_event_loop_that_closes_at_the_moment_it_is_called_does_not_harm_the_engine(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Event loop is closed")

    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=5))
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(generation._wait())
        runner.run(asyncio.sleep(0))
        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", refuse)
            scripted.executor.let(None)
            assert generation.result(TIMEOUT_S)[0].token_ids == tokens_of(PROMPT, 5)
        assert not task.done()
    check_all_is_free(scripted, steps_below=20)


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
        with scripted.surge._engine._lock, channel._lock:
            held.clear()

    in_a_thread(collect)
    check_all_is_free(scripted, steps_below=90)


def test_the_garbage_collector_may_end_a_coroutine_while_its_thread_holds_the_locks(
    scripted: Scripted,
) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, LONG)

    async def wait_a_little() -> None:
        coroutine = generation._wait()
        coroutine.send(None)

        def collect() -> None:
            with scripted.surge._engine._lock, generation._channel._lock:
                coroutine.close()

        in_a_thread(collect)

    run(wait_a_little())
    check_all_is_free(scripted, steps_below=90)


def test_the_engines_thread_cannot_wait_for_itself(scripted: Scripted) -> None:
    errors: list[BaseException] = []
    generations: list[Generation] = []
    ready = threading.Event()

    def script(prompt_ids: list[int], index: int) -> int:
        assert ready.wait(TIMEOUT_S)
        if not errors:
            try:
                generations[0].result()
            except EngineError as error:
                errors.append(error)
        return counting_script(prompt_ids, index)

    scripted.executor.script = script
    generations.append(scripted.surge.generate(PROMPT, SamplingParams(max_tokens=3)))
    ready.set()
    assert generations[0].result(TIMEOUT_S)[0].token_ids == tokens_of(PROMPT, 3)
    assert "own thread" in str(errors[0])
