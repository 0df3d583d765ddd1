"""One parameter at a time: what it does, and that it is the parameter that does it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vsurge.runtime import SamplingParams, vSurge

from .greedy import CAPITAL, GREEDY, STORY, one


def test_max_tokens_and_max_length_bound_the_output(surge: vSurge) -> None:
    assert one(surge, [5] * 10, max_tokens=7).num_generated_tokens == 7
    sample = one(surge, [5] * 10, max_tokens=None)
    assert (sample.num_generated_tokens, sample.finish_reason) == (150, "length")
    assert one(surge, [5] * 10, max_tokens=10_000).token_ids == sample.token_ids
    assert one(surge, [5] * 159, max_tokens=None).num_generated_tokens == 1  # the longest prompt


def test_end_of_sequence_ends_unless_ignored(surge: vSurge) -> None:
    sample = one(surge, CAPITAL, max_tokens=60, ignore_eos=False)
    assert sample.finish_reason == "stop"
    assert sample.token_ids[-1] in surge.eos_token_ids  # the token belongs to the ids, not to the text
    assert "Paris" in sample.text
    assert "<|" not in sample.text
    ignored = one(surge, CAPITAL, max_tokens=60, ignore_eos=True)
    assert (ignored.finish_reason, ignored.num_generated_tokens) == ("length", 60)
    assert ignored.token_ids[: sample.num_generated_tokens] == sample.token_ids


def test_min_tokens_forbids_ending_tokens_and_stop_strings_until_then(surge: vSurge) -> None:
    short = one(surge, CAPITAL, max_tokens=60, ignore_eos=False)
    count = short.num_generated_tokens
    longer = one(surge, CAPITAL, max_tokens=60, ignore_eos=False, min_tokens=count + 5)
    assert longer.num_generated_tokens > count + 5
    assert not set(longer.token_ids[: count + 5]) & set(surge.eos_token_ids)
    exact = one(surge, CAPITAL, max_tokens=60, ignore_eos=False, min_tokens=count - 1)
    assert exact.token_ids == short.token_ids  # the ending token is the first beyond min_tokens
    stopped = one(surge, CAPITAL, stop="capital")
    assert (
        one(surge, CAPITAL, stop="capital", min_tokens=stopped.num_generated_tokens - 1).text == stopped.text
    )
    assert one(surge, CAPITAL, stop="capital", min_tokens=stopped.num_generated_tokens).text != stopped.text


def test_min_tokens_forbids_end_of_sequence_tokens_also_where_they_would_end_nothing(surge: vSurge) -> None:
    ignored = one(surge, CAPITAL, max_tokens=60)
    [place, *_] = [i for i, token_id in enumerate(ignored.token_ids) if token_id in surge.eos_token_ids]
    longer = one(surge, CAPITAL, max_tokens=60, min_tokens=place + 5)
    assert not set(longer.token_ids[: place + 5]) & set(surge.eos_token_ids)
    assert one(surge, CAPITAL, max_tokens=60, min_tokens=place).token_ids == ignored.token_ids


@pytest.mark.parametrize("stop", [None, "what does not come"])
def test_stop_token_ids_end_and_their_text_is_left_out_unless_included(
    surge: vSurge, stop: str | None
) -> None:
    free = one(surge, STORY)
    token = next(t for i, t in enumerate(free.token_ids) if i > 5 and t not in free.token_ids[:i])
    cut = free.token_ids.index(token)
    stopped = one(surge, STORY, stop_token_ids=[token], stop=stop)
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: cut + 1], "stop")
    assert stopped.text == surge.processor.decode(free.token_ids[:cut])
    included = one(surge, STORY, stop_token_ids=[token], stop=stop, include_stop_str_in_output=True)
    assert included.text == surge.processor.decode(free.token_ids[: cut + 1]) != stopped.text


def test_a_stop_string_ends_the_text_before_it_or_after_it_if_included(surge: vSurge) -> None:
    free = one(surge, STORY)
    stop = free.text[7:16]  # of several tokens
    assert len(surge.processor.encode(stop)) > 1
    before = free.text[: free.text.index(stop)]
    stopped = one(surge, STORY, stop=["never there", stop])
    assert (stopped.text, stopped.finish_reason) == (before, "stop")
    assert stopped.num_generated_tokens < free.num_generated_tokens
    assert one(surge, STORY, stop=stop, include_stop_str_in_output=True).text == before + stop


def test_no_text_that_was_streamed_is_taken_back_by_a_stop_string(surge: vSurge) -> None:
    free = one(surge, STORY)
    stop = free.text[7:16]
    generation = surge.generate(STORY, replace(GREEDY, stop=stop))
    texts = [samples[0].text for samples in generation]
    final = free.text[: free.text.index(stop)]
    assert all(final.startswith(text) for text in texts)
    assert texts[-1] == final


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(surge: vSurge) -> None:
    free = one(surge, STORY)
    assert one(surge, STORY, stop=free.text[-3:] + "never").text == free.text


def test_detokenize_and_skip_special_tokens_decide_what_becomes_text(surge: vSurge) -> None:
    sample = one(surge, CAPITAL, max_tokens=60)
    assert set(sample.token_ids) & {1533, 1534, 1535}
    assert "<|" not in sample.text
    with_special = one(surge, CAPITAL, max_tokens=60, skip_special_tokens=False)
    assert "<|" in with_special.text
    assert with_special.text == surge.processor.decode(sample.token_ids)
    without_text = one(surge, CAPITAL, max_tokens=60, detokenize=False)
    assert (without_text.text, without_text.token_ids) == ("", sample.token_ids)


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_each_cut_makes_a_hot_draw_greedy(surge: vSurge, changes: dict[str, Any]) -> None:
    hot = SamplingParams(temperature=3.0, seed=3, max_tokens=24, ignore_eos=True)
    greedy = one(surge, STORY).token_ids
    assert one(surge, STORY, hot).token_ids != greedy
    assert one(surge, STORY, hot, **changes).token_ids == greedy


def test_values_beyond_float32_and_int32_do_not_break_the_engine(surge: vSurge) -> None:
    wild = SamplingParams(temperature=1e300, top_k=2**70, top_p=1e-300, min_p=1e-300, seed=0, max_tokens=3)
    assert one(surge, STORY, wild, ignore_eos=True).num_generated_tokens == 3
    assert one(surge, STORY, wild, temperature=1e-300, ignore_eos=True).num_generated_tokens == 3


def test_truncate_prompt_tokens_keeps_the_last_ones(surge: vSurge) -> None:
    long = list(range(100, 400))
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: 300 tokens, must be fewer than max_length=160; trunc"
    ):
        surge.generate([[1], long], GREEDY)
    sample = one(surge, long, truncate_prompt_tokens=100)
    assert sample.num_prompt_tokens == 100
    assert sample.token_ids == one(surge, long[-100:]).token_ids
