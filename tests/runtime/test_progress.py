"""A sample is made by who reads it, and is what there was when it was handed out, whatever came since."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

import vsurge.runtime.progress
from vsurge.runtime import ReturnSample, SamplingParams
from vsurge.runtime.channel import Channel
from vsurge.runtime.detokenizer import Detokenizer, TokenBytes
from vsurge.runtime.request import Group, Request
from vsurge.runtime.token_logprobs import TokenLogprobs

from .scripted import PROMPT, TIMEOUT_S, Scripted, tokens_of

SCORE = TokenLogprobs(-0.5, 1, (7,), (-0.5,))


def request_of(tokenizer: Any, params: SamplingParams, group: Group | None = None) -> Request:
    detokenizer = Detokenizer(TokenBytes(tokenizer), skip_special_tokens=True, stop=(), include_stop=False)
    return Request(
        prompt_ids=PROMPT,
        params=params,
        stop_token_ids=frozenset(),
        max_new_tokens=9,
        seed=0,
        channel=Channel([], [], threading.RLock()),
        index=0,
        detokenizer=detokenizer,
        group=group or Group(),
        request_id="x",
    )


def test_a_sample_is_of_its_moment_however_late_it_is_made(tokenizer: Any) -> None:
    request = request_of(tokenizer, SamplingParams(logprobs=0, prompt_logprobs=0))
    ids = tokenizer.encode("one two three four five six seven eight nine")[:9]
    at_once: list[ReturnSample] = []
    progress = [request.group.progress()]
    at_once.append(progress[0].sample())
    for i, token_id in enumerate(ids):
        request.take_scores(i, [SCORE] if i < len(PROMPT) - 1 else [])
        request.accept(token_id, SCORE, request.submitted_at + i)
        progress.append(request.group.progress())
        at_once.append(progress[-1].sample())
    assert [each.sample() for each in progress] == at_once
    for i, sample in enumerate(at_once):
        assert sample.token_ids == tuple(ids[:i])
        assert sample.text == tokenizer.decode(ids[:i])
        assert (sample.finish_reason, sample.metrics.num_generated_tokens) == (
            "length" if i == 9 else None,
            i,
        )
        assert sample.logprobs is not None
        assert sample.prompt_logprobs is not None
        assert (len(sample.logprobs), len(sample.prompt_logprobs)) == (i, min(i + 1, len(PROMPT)))
        assert sample.cumulative_logprob == -0.5 * i
        assert sample.tokens_per_second == pytest.approx(i / max(i - 1, 1e-9))  # up to its latest token
        assert sample.metrics.time_between_tokens_s == (None if i < 2 else pytest.approx(1.0))


def test_scores_that_are_computed_anew_leave_earlier_samples_alone(tokenizer: Any) -> None:
    request = request_of(tokenizer, SamplingParams(prompt_logprobs=0))
    request.take_scores(0, [SCORE])
    before = request.progress()
    request.begin_anew()
    assert request.progress().sample().prompt_logprobs == (None,)
    request.take_scores(0, [replace(SCORE, chosen=-2.0)])
    for progress, chosen in ((before, SCORE.chosen), (request.progress(), -2.0)):
        scores = progress.sample().prompt_logprobs
        assert scores is not None
        assert scores[1] is not None
        assert scores[1][PROMPT[1]].logprob == chosen


def test_completions_of_one_prompt_are_of_one_moment(tokenizer: Any) -> None:
    params, group = SamplingParams(n=2), Group()
    first, second = request_of(tokenizer, params, group), request_of(tokenizer, params, group)
    first.accept(50, None, first.submitted_at)
    before = group.progress()
    second.accept(60, None, first.submitted_at)
    first.finish("abort")
    sample: Any = before.sample()
    assert (sample.token_ids, sample.finish_reason) == ([(50,), ()], [None, None])
    assert not sample.is_finished
    assert not group.is_finished
    second.finish("abort")
    assert group.is_finished
    assert group.progress().sample().is_finished


def test_nobody_makes_what_nobody_reads(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[threading.Thread] = []

    class Counted(ReturnSample):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            makers.append(threading.current_thread())
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(vsurge.runtime.progress, "ReturnSample", Counted)
    prompts = [PROMPT, [8], [9, 10]]
    generation = scripted.surge.generate(prompts, SamplingParams(max_tokens=50))
    samples = generation.result(TIMEOUT_S)
    assert [sample.token_ids for sample in samples] == [tokens_of(prompt, 50) for prompt in prompts]
    assert generation.result(TIMEOUT_S) == samples  # made once
    assert makers == [threading.current_thread()] * len(prompts)
