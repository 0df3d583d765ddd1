"""`Generation` and asyncio: what awaits it, and that it belongs to no event loop."""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vsurge.runtime import ReturnSample, SamplingParams

from .scripted import PROMPT, TIMEOUT_S, Scripted, check_it_serves, run, tokens_of


@pytest.mark.parametrize("wrap", [asyncio.wait_for, asyncio.ensure_future, asyncio.shield, None])
def test_a_generation_is_awaited_as_it_is(scripted: Scripted, wrap: Any) -> None:
    async def final() -> Any:
        generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=4))
        if wrap is None:
            return await generation
        return await (wrap(generation, TIMEOUT_S) if wrap is asyncio.wait_for else wrap(generation))

    assert run(final())[0].token_ids == tokens_of(PROMPT, 4)


def test_generations_are_gathered_as_they_are(scripted: Scripted) -> None:
    async def gathered() -> Any:
        params = SamplingParams(max_tokens=4)
        return await asyncio.gather(*(scripted.surge.generate([seed], params) for seed in range(1, 9)))

    assert [final[0].token_ids for final in run(gathered())] == [tokens_of([seed], 4) for seed in range(1, 9)]


def test_a_generation_is_awaited_again_and_again_even_by_many(scripted: Scripted) -> None:
    async def several() -> list[Any]:
        generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=4))
        return [*await asyncio.gather(generation, generation), await generation]

    finals = run(several())
    assert [final[0].token_ids for final in finals] == [tokens_of(PROMPT, 4)] * 3


def test_a_generation_is_no_coroutine_but_becomes_a_task_by_ensure_future(scripted: Scripted) -> None:
    async def wait() -> Any:
        generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=4))
        assert inspect.isawaitable(generation)
        assert not inspect.iscoroutine(generation)
        with pytest.raises(TypeError, match="a coroutine was expected"):
            await asyncio.create_task(generation)  # pyright: ignore[reportArgumentType]
        done, _ = await asyncio.wait([asyncio.ensure_future(generation)])
        return done.pop().result()

    assert run(wait())[0].token_ids == tokens_of(PROMPT, 4)


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
    check_it_serves(scripted)


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
    check_it_serves(scripted)
