"""How long a sequence may be: `max_length`, the cache and `max_tokens` together, and advice that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from vsurge.runtime import SamplingParams

from .scripted import TIMEOUT_S, Scripted, tokens_of

MAX_LENGTH = 160  # of the scripted engine; its pages hold 16 tokens


@pytest.fixture
def small(make_scripted: Callable[..., Scripted]) -> Scripted:
    """An engine whose cache holds 48 tokens, so that a sequence may have 49."""
    made = make_scripted(num_pages=3)
    made.surge.start()
    return made


def test_an_output_larger_than_the_cache_is_refused_with_numbers(small: Scripted) -> None:
    message = (
        r"prompts\[0\]: its 20 tokens and 30 of output need 4 pages of 16 tokens, the whole cache has "
        r"num_pages=3; max_tokens=29 would fit, or build the engine with more pages"
    )
    with pytest.raises(ValueError, match=message):
        small.surge.generate([1] * 20, SamplingParams(max_tokens=30))
    [sample] = small.surge.generate([1] * 20, SamplingParams(max_tokens=29)).result(TIMEOUT_S)
    assert sample.num_generated_tokens == 29  # 48 tokens in the cache: the last one is not written


@pytest.mark.parametrize("prompt_length", [1, 20, 47, 48])
def test_without_max_tokens_the_output_fills_the_cache(small: Scripted, prompt_length: int) -> None:
    prompt = [1] * prompt_length
    [sample] = small.surge.generate(prompt, SamplingParams(max_tokens=None)).result(TIMEOUT_S)
    assert sample.token_ids == tokens_of(prompt, 49 - prompt_length)
    assert sample.finish_reason == "length"


def test_without_max_tokens_max_length_bounds_the_output_where_the_cache_is_larger(
    scripted: Scripted,
) -> None:
    [sample] = scripted.surge.generate([1] * 100, SamplingParams(max_tokens=None)).result(TIMEOUT_S)
    assert sample.num_generated_tokens == MAX_LENGTH - 100


@pytest.mark.parametrize("max_tokens", [None, 1, 30])
def test_a_prompt_larger_than_the_cache_is_refused_with_advice_that_works(
    small: Scripted, max_tokens: int | None
) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(ValueError, match=r"its 49 tokens and \d+ of output need \d pages of 16 ") as refused:
        small.surge.generate([1] * 49, params)
    follow_advice(small, str(refused.value), [1] * 49, params, longest=49)


@pytest.mark.parametrize("max_tokens", [None, 1, 30, 80, 159, 160, 10_000])
@pytest.mark.parametrize("length", [MAX_LENGTH, 1000])
def test_a_prompt_longer_than_max_length_is_refused_with_advice_that_works(
    scripted: Scripted, length: int, max_tokens: int | None
) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(ValueError, match=rf"{length} tokens, must be fewer than max_length=160; ") as refused:
        scripted.surge.generate([1] * length, params)
    follow_advice(scripted, str(refused.value), [1] * length, params, longest=MAX_LENGTH)


def follow_advice(
    scripted: Scripted, message: str, prompt: list[int], params: SamplingParams, *, longest: int
) -> None:
    """It keeps at least half of the longest sequence for the prompt, and the rest suffices for the output."""
    advice = r"truncate_prompt_tokens=(\d+) would keep the last (\d+) and leave room for (\d+) of output"
    found = re.search(advice, message)
    assert found is not None
    keep, kept, room = map(int, found.groups())
    assert keep == kept == longest - room
    assert room == min(params.max_tokens or longest, longest // 2)
    params = replace(params, truncate_prompt_tokens=keep, max_tokens=room if params.max_tokens else None)
    [sample] = scripted.surge.generate(prompt, params).result(TIMEOUT_S)
    assert (sample.num_prompt_tokens, sample.num_generated_tokens) == (keep, room)
