"""Mixed steps, prefixes, preemption and several decode steps at once change no token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vsurge.model import Model
from vsurge.runtime import ReturnSample, SamplingParams, vSurge
from vsurge.runtime.step import StepOutput
from vsurge.runtime.step_plan import StepPlan

from .scripted import TIMEOUT_S, Scripted, pool_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.5, seed=5)
STORY = "USER:Write a story about a robot\nASSISTANT:"
OPTIONS: dict[str, Any] = {
    "max_concurrent_decodes": 4,
    "max_concurrent_prefill": 3,
    "prefill_lengths": (16, 40),
    "max_length": 160,
    "page_size": 16,
    "num_pages": 24,
    "verbose": False,
}


@pytest.fixture
def make_surge(surge: vSurge, model: Model) -> Iterator[Callable[..., vSurge]]:
    """Running engines with other options than `surge`, which shares its programs where shapes allow."""
    made: list[vSurge] = []

    def make(*, shared: bool = True, **options: Any) -> vSurge:
        made.append(vSurge.from_model(model, surge.processor, **(OPTIONS | options)))
        if shared:
            made[-1]._executor._programs = surge._executor._programs
        made[-1].start()
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
        assert pool_of(engine).num_used == 0


@pytest.fixture
def plans(surge: vSurge, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The steps that `surge` runs from now on."""
    run, seen = surge._executor.run, list[StepPlan]()

    def watched(plan: StepPlan) -> StepOutput:
        seen.append(plan)
        return run(plan)

    monkeypatch.setattr(surge._executor, "run", watched)
    return seen


def one(engine: vSurge, prompt: Any, params: SamplingParams = GREEDY) -> ReturnSample:
    [sample] = engine.generate(prompt, params).result(TIMEOUT_S)
    return sample


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_prompts_that_come_while_others_decode_change_no_token(
    surge: vSurge, plans: list[StepPlan], params: SamplingParams
) -> None:
    prompts = [[20 + i] * length for i, length in enumerate((3, 90, 7, 61))]
    params = replace(params, max_tokens=40)
    alone = [one(surge, prompt, params).token_ids for prompt in prompts]
    surge.stop()
    surge.start()  # with an empty cache
    plans.clear()
    first = surge.generate(prompts[0], params)
    next(iter(first))  # it decodes
    others = [surge.generate(prompt, params) for prompt in prompts[1:]]
    together = [g.result(TIMEOUT_S)[0].token_ids for g in (first, *others)]
    assert together == alone
    both = [{chunk.is_decode for chunk in plan.chunks} == {True, False} for plan in plans]
    assert sum(both) >= 4  # 158 tokens at up to 39 a step
    assert all(sum(chunk.length for chunk in plan.chunks) <= 40 for plan in plans)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_a_prefix_that_is_found_changes_no_token(
    surge: vSurge, make_surge: Callable[..., vSurge], params: SamplingParams
) -> None:
    without = make_surge(prefix_caching=False)
    head = list(range(30, 80))
    prompts = [head, head, [*head, 5, 6], [*head[:33], 9], head[:48], [1, *head]]
    expected = [one(without, prompt, params) for prompt in prompts]
    assert all(sample.num_cached_tokens == 0 for sample in expected)
    surge.stop()
    surge.start()  # with an empty cache
    got = [one(surge, prompt, params) for prompt in prompts]
    assert [sample.token_ids for sample in got] == [sample.token_ids for sample in expected]
    assert [sample.num_cached_tokens for sample in got] == [0, 48, 48, 32, 47, 0]
    surge.stop()
    surge.start()
    together = surge.generate(prompts, params).result(TIMEOUT_S)
    assert [sample.token_ids for sample in together] == [sample.token_ids for sample in expected]
    assert sum(sample.num_cached_tokens for sample in together) > 0


def test_the_last_token_of_a_prompt_that_is_all_in_the_cache_is_not_written_again(surge: vSurge) -> None:
    surge.stop()
    surge.start()  # with an empty cache
    prompt, shortest = list(range(100, 148)), replace(GREEDY, max_tokens=1)  # three pages
    one(surge, prompt, shortest)
    executor: Any = surge._executor
    first_layer, *others = executor._kv_pages
    assert np.asarray(first_layer.data)[:, 1, :, -1].any(axis=(-1, -2)).sum() == 3  # pages that are full
    emptied = replace(first_layer, data=first_layer.data.at[:, 1, :, -1].set(0))
    executor._kv_pages = (emptied, *others)
    assert one(surge, prompt, shortest).num_cached_tokens == 47
    assert not np.asarray(executor._kv_pages[0].data)[:, 1, :, -1].any()


def test_the_next_turn_of_a_chat_finds_its_prompt_and_the_answer(surge: vSurge) -> None:
    prompt = surge.processor.encode(STORY)
    answer = one(surge, prompt, replace(GREEDY, max_tokens=60)).token_ids
    again = one(surge, [*prompt, *answer, 5, 6, 7])
    assert again.num_cached_tokens == (len(prompt) + len(answer) - 1) // 16 * 16  # the last token was not fed


def test_sequences_that_lose_their_pages_come_to_the_same_end(
    surge: vSurge, make_surge: Callable[..., vSurge]
) -> None:
    prompts = [[40 + i] * (20 + 3 * i) for i in range(5)]
    params = [replace(p, max_tokens=60, seed=i) for i, p in enumerate((GREEDY, DRAWN, GREEDY, DRAWN, GREEDY))]
    alone = [one(surge, *both).token_ids for both in zip(prompts, params, strict=True)]
    small = make_surge(shared=False, num_pages=9, prefill_lengths=(40,))
    samples = small.generate(prompts, params).result(TIMEOUT_S)
    assert [sample.token_ids for sample in samples] == alone
    assert sum(sample.num_preemptions for sample in samples) >= 2
    assert samples[0].num_preemptions == 0


@pytest.mark.parametrize("decode_steps", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_several_decode_steps_at_once_give_the_same_tokens(
    surge: vSurge, make_surge: Callable[..., vSurge], decode_steps: int
) -> None:
    several = make_surge(shared=False, decode_steps=decode_steps, prefill_lengths=(40,))
    text = one(surge, STORY).text
    requests = [
        (STORY, GREEDY),
        (STORY, replace(GREEDY, stop=text[20:23])),
        ([7] * 30, replace(DRAWN, max_tokens=13)),
        ("USER:What is the capital of France?\nASSISTANT:", replace(GREEDY, ignore_eos=False)),
        ([9] * 5, replace(DRAWN, max_tokens=1)),
        ([11], replace(GREEDY, max_tokens=150)),
        (
            STORY,
            replace(GREEDY, min_tokens=9, stop_token_ids=one(surge, STORY).token_ids[:12], max_tokens=20),
        ),
    ]
    prompts, params = map(list, zip(*requests, strict=True))
    expected = surge.generate(prompts, params).result(TIMEOUT_S)
    got = several.generate(prompts, params).result(TIMEOUT_S)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.token_ids, mine.text, mine.finish_reason) == (
            theirs.token_ids,
            theirs.text,
            theirs.finish_reason,
        )


def test_priority_goes_before_arrival(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(rows=1)
    scripted.surge.start()
    scripted.executor.hold()
    first = scripted.surge.generate([1], SamplingParams(max_tokens=2))
    scripted.executor.let(1)
    scripted.executor.wait_for_steps(1)
    low = scripted.surge.generate([[2], [3]], SamplingParams(max_tokens=2), priority=[5, 4])
    high = scripted.surge.generate([4], SamplingParams(max_tokens=2), priority=-1)
    scripted.executor.let(None)
    for generation in (first, low, high):
        generation.result(TIMEOUT_S)
    assert scripted.executor.prompts == [[1], [4], [3], [2]]


@pytest.mark.parametrize(
    ("priority", "error", "message"),
    [
        (1.5, TypeError, "priority=1.5: must be an integer"),
        (2**31, ValueError, "priority=2147483648: must be between -2147483647 and 2147483647"),
        ([1], ValueError, "priority: 1 of them for 2 prompts; give one, or one each"),
        ([1, "2"], TypeError, r"priority\[1\]='2': must be an integer"),
    ],
)
def test_a_priority_that_is_none_is_refused(
    scripted: Scripted, priority: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scripted.surge.generate([[1], [2]], priority=priority)
