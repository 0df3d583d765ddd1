"""Several completions of one prompt, and what a reader gets of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from vsurge.runtime import QueueFull, ReturnSample, SamplingParams, vSurge

from .greedy import CAPITAL, STORY, one
from .scripted import SHORT, TIMEOUT_S, Scripted, tokens_of

HOT = SamplingParams(temperature=3.0, seed=40, max_tokens=12, ignore_eos=True)


def listed(value: Any) -> list[Any]:
    assert isinstance(value, list)
    return cast("list[Any]", value)


def test_n_gives_lists_whose_entries_are_those_of_the_seeds_that_follow(surge: vSurge) -> None:
    [sample] = surge.generate(STORY, replace(HOT, n=3, logprobs=1)).result(TIMEOUT_S)
    alone = [one(surge, STORY, HOT, seed=40 + i, logprobs=1) for i in range(3)]
    for name in ("text", "token_ids", "finish_reason", "num_generated_tokens", "num_preemptions"):
        assert getattr(sample, name) == [getattr(each, name) for each in alone], name
    assert len(set(listed(sample.token_ids))) == 3
    assert [len(logprobs) for logprobs in listed(sample.logprobs)] == [12] * 3
    assert sample.num_prompt_tokens == alone[0].num_prompt_tokens


def test_completions_share_the_prompts_pages(surge: vSurge) -> None:
    prompt = [7] * 50  # three full pages of 16
    cached_before = surge.metrics.num_cached_tokens
    surge.generate(prompt, replace(HOT, n=4)).result(TIMEOUT_S)
    assert surge.metrics.num_cached_tokens - cached_before >= 3 * 48


def test_best_of_gives_the_likeliest_in_order_once_all_have_ended(surge: vSurge) -> None:
    every = [one(surge, STORY, HOT, seed=40 + i, logprobs=0) for i in range(5)]
    likeliest = sorted(every, key=lambda sample: -(sample.cumulative_logprob or 0))[:2]
    seen = list(surge.generate(STORY, replace(HOT, n=2, best_of=5)))
    assert len(seen) == 1
    [sample] = seen[0]
    assert sample.token_ids == [each.token_ids for each in likeliest]
    assert sample.logprobs == [None, None]
    single = one(surge, STORY, HOT, best_of=5)
    assert single.token_ids == likeliest[0].token_ids


def test_unseeded_completions_differ(surge: vSurge) -> None:
    [sample] = surge.generate(STORY, replace(HOT, seed=None, n=4)).result(TIMEOUT_S)
    assert len(set(listed(sample.token_ids))) == 4


def test_a_sample_of_several_is_finished_when_the_last_one_is(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([5], SamplingParams(n=2, max_tokens=2))
    assert not any(sample.is_finished for sample in generation._latest())
    assert generation._latest()[0].text == ["", ""]
    scripted.executor.let(None)
    [sample] = generation.result(TIMEOUT_S)
    assert sample.finish_reason == ["length", "length"]
    assert sample.token_ids == [tokens_of([5], 2)] * 2


def test_every_completion_waits_in_the_queue(make_scripted: Callable[..., Scripted]) -> None:
    made = make_scripted(max_queued_requests=3)
    made.surge.start()
    with pytest.raises(QueueFull, match="0 requests are waiting and 4 more came"):
        made.surge.generate([5], SamplingParams(n=4))
    made.surge.generate([5], replace(SHORT, n=3)).result(TIMEOUT_S)


def test_aborting_ends_every_completion(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([5], SamplingParams(n=3, best_of=4, max_tokens=50))
    generation.abort()
    scripted.executor.let(None)
    [sample] = generation.result(TIMEOUT_S)
    assert sample.finish_reason == ["abort"] * 3


@pytest.mark.parametrize("n", [1, 2])
def test_deltas_add_up_to_the_whole(surge: vSurge, n: int) -> None:
    params = replace(HOT, n=n, logprobs=1)
    [whole] = surge.generate(STORY, params).result(TIMEOUT_S)
    generation = surge.generate([STORY, CAPITAL], [replace(params, output_kind="delta"), params])
    parts = list(generation)
    assert len(parts) > 1

    def total(name: str) -> Any:
        each = [getattr(samples[0], name) for samples in parts]
        return [joined(one) for one in zip(*each, strict=True)] if n > 1 else joined(each)

    assert total("text") == whole.text
    assert total("token_ids") == whole.token_ids
    assert [list(entry) for entry in _flat(total("logprobs"))] == [
        list(entry) for entry in _flat(whole.logprobs)
    ]
    assert parts[-1][0].num_generated_tokens == whole.num_generated_tokens
    assert len(_flat(parts[-1][1].token_ids)) == 12 * n  # the other one is cumulative
    assert generation.result(TIMEOUT_S)[0].text == whole.text  # whoever does not iterate gets everything


def joined(parts: Any) -> Any:
    return "".join(parts) if isinstance(parts[0], str) else sum(parts, ())


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in value] if isinstance(values, list) else list(values)


def test_final_only_is_silent_until_the_end_and_the_others_are_not(surge: vSurge) -> None:
    final = replace(HOT, output_kind="final_only")
    [quiet] = list(surge.generate(STORY, final))
    assert quiet[0].token_ids == one(surge, STORY, HOT).token_ids

    async def both() -> list[list[ReturnSample]]:
        return [samples async for samples in surge.generate([STORY, CAPITAL], [final, HOT], stream=True)]

    seen = asyncio.run(both())
    assert {len(samples[0].token_ids) for samples in seen} == {0, 12}
    assert len({len(samples[1].token_ids) for samples in seen}) > 2
