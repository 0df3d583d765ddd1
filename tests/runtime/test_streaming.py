"""What readers of a `Generation` get: growing lists to the end, the latest state, nothing lost."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import numpy as np
import pytest

from vsurge.runtime import EngineError, Generation, ReturnSample, SamplingParams
from vsurge.runtime.channel import Channel, wake

from .scripted import PROMPT, TIMEOUT_S, Scripted, counting_script, run, tokens_of


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
    last = ReturnSample("x", (1,), 1, 1.0, 0.1, "stop", 1)
    lock = threading.RLock()

    class AsRead:
        def progress(self) -> AsRead:
            return self

        def sample(self) -> ReturnSample:
            return last

    class EndsOnceRead(Channel):
        """Its output comes just after a reader has looked for the first time."""

        has_come = False

        def read(self, seen: int) -> Any:
            news = super().read(seen)
            if not self.has_come:
                self.has_come = True
                with lock:
                    self.change(0)
                    self.end(0, AsRead())
                    wake(self.notify())
            return news

    def make() -> Generation:
        return Generation(EndsOnceRead(["x"], [AsRead()], lock), lambda: None, stream=True)

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


def test_result_can_be_asked_again_after_its_timeout(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=3))
    with pytest.raises(TimeoutError, match=r"timeout_s=0.01"):
        generation.result(0.01)
    scripted.executor.let(None)
    assert generation.result(TIMEOUT_S)[0].token_ids == tokens_of(PROMPT, 3)


@pytest.mark.parametrize("timeout_s", ["1", True, -1, float("nan"), float("inf")])
def test_a_timeout_of_a_result_is_a_number(scripted: Scripted, timeout_s: Any) -> None:
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=3))
    with pytest.raises((ValueError, TypeError), match=f"^timeout_s={timeout_s!r}: must "):
        generation.result(timeout_s)
    numpys: Any = np.float32(TIMEOUT_S)
    assert generation.result(numpys)[0].token_ids == tokens_of(PROMPT, 3)


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


def test_a_reader_never_looks_at_a_step_whose_tokens_are_half_taken(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler: Any = scripted.surge._engine._loop._scheduler
    commit, log, readers = scheduler.commit, list[int | str](), list[threading.Thread]()

    def read() -> None:
        [sample] = generation._latest()
        log.append(sample.num_generated_tokens)

    def commit_while_someone_reads(*args: Any) -> Any:
        changed = commit(*args)  # the requests have their tokens, and nothing has been said of it
        readers.append(threading.Thread(target=read))
        readers[-1].start()
        readers[-1].join(0.05)
        log.append("said")
        return changed

    scripted.executor.hold()
    generation = scripted.surge.generate(PROMPT, SamplingParams(max_tokens=1))
    monkeypatch.setattr(scheduler, "commit", commit_while_someone_reads)
    scripted.executor.let(None)
    generation.result(TIMEOUT_S)
    [reader] = readers
    reader.join(TIMEOUT_S)
    assert log == ["said", 1]
