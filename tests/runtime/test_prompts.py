"""Prompts and their parameters: every form that callers write, and what is refused at the door, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vsurge.runtime import SamplingParams
from vsurge.runtime.prompts import as_list, token_ids_of

from .scripted import TIMEOUT_S, Scripted, tokens_of

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([], None, ValueError, "prompts: is empty"),
        ("", None, ValueError, r"prompts\[0\]: has no tokens"),
        ([[1], []], None, ValueError, "prompt: is empty"),
        ([1, 1536], None, ValueError, r"prompts\[0\]: token id 1536 is outside the vocabulary, 0 to 1535"),
        ([[1], [-1]], None, ValueError, r"prompts\[1\]: token id -1"),
        ([1, "a"], None, TypeError, "prompt=1: must be a string, token ids or chat messages"),
        ([[1, "a"]], None, TypeError, "'a' is no token id, but other items are"),
        ([{"role": "user"}], None, TypeError, "neither a token id nor a message with 'role' and 'content'"),
        (5, None, TypeError, "prompts=5"),
        (b"hello", None, TypeError, "prompts=b'hello'"),
        ([bytearray(b"hello")], None, TypeError, r"prompt=bytearray\(b'hello'\): must be a string"),
        ("a\ud800b", None, ValueError, r"prompt: .* is no valid Unicode"),
        ("a", SamplingParams(bad_words=["\ud800"]), ValueError, "bad_words: .* is no valid Unicode"),
        ([True, False], None, TypeError, "prompt=True: must be a string, token ids or chat messages"),
        ([[1, True]], None, TypeError, "True is no token id, but other items are"),
        (["a", "b"], [SamplingParams()], ValueError, "sampling_params: 1 of them for 2 prompts"),
        (["a"], ["b"], TypeError, "sampling_params: 'b' is no SamplingParams"),
        ("a", 5, TypeError, "sampling_params=5: must be a SamplingParams or a list of them"),
        ("a", SamplingParams(stop_token_ids=[9999]), ValueError, "stop_token_ids: token id 9999"),
        (
            "a", SamplingParams(stop_token_ids=list(range(15)), min_tokens=1), ValueError,
            "stop_token_ids: 17 with the end-of-sequence tokens, with min_tokens at most 16",
        ),
    ],
)  # fmt: skip
def test_a_prompt_or_parameter_that_cannot_work_is_refused_by_name_and_nothing_is_queued(
    scripted: Scripted, prompts: Any, params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scripted.surge.generate(prompts, params)
    scripted.surge.generate([9], SamplingParams(max_tokens=1)).result(TIMEOUT_S)
    assert scripted.executor.num_steps == 1


def test_a_single_prompt_of_any_form_is_a_list_of_one(scripted: Scripted) -> None:
    for prompts, count in (
        ("a b", 1),
        ([1, 2], 1),
        (CHAT, 1),
        (["a", "b"], 2),
        ([[1], [2]], 2),
        ([CHAT] * 2, 2),
    ):
        assert len(scripted.surge.generate(prompts, SamplingParams(max_tokens=1)).result(TIMEOUT_S)) == count
    mixed = scripted.surge.generate(["a", [1, 2], CHAT], SamplingParams(max_tokens=1)).result(TIMEOUT_S)
    assert [s.num_prompt_tokens for s in mixed] == [
        scripted.surge.count_tokens(p) for p in ("a", [1, 2], CHAT)
    ]


def test_each_prompt_may_have_its_own_parameters(scripted: Scripted) -> None:
    params = [SamplingParams(max_tokens=count) for count in (3, 1, 2)]
    samples = scripted.surge.generate([[1], [2], [3]], params).result(TIMEOUT_S)
    assert [s.num_generated_tokens for s in samples] == [3, 1, 2]


def test_without_a_processor_prompts_are_token_ids_and_there_is_no_text(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted(processor=None)
    scripted.surge.start()
    [sample] = scripted.surge.generate([1, 2], SamplingParams(max_tokens=3)).result(TIMEOUT_S)
    assert (sample.text, sample.num_generated_tokens) == ("", 3)
    for prompt in ("a", CHAT):
        with pytest.raises(
            ValueError, match="needs a processor; without one, prompts are lists of token ids"
        ):
            scripted.surge.generate(prompt)
    with pytest.raises(ValueError, match="stop strings need a processor"):
        scripted.surge.generate([1], SamplingParams(stop="x"))


def test_as_list_tells_one_prompt_from_many() -> None:
    assert as_list("ab") == ["ab"]
    assert as_list(["a", "b"]) == ["a", "b"]
    assert as_list((1, 2)) == [(1, 2)]
    assert as_list(CHAT) == [CHAT]


def test_numpy_integers_are_token_ids(scripted: Scripted) -> None:
    prompt: list[Any] = [np.int64(3), np.int8(4)]
    assert scripted.surge.count_tokens(prompt) == 2
    assert [type(token_id) for token_id in token_ids_of(prompt, None, None)] == [int, int]
    [sample] = scripted.surge.generate(prompt, SamplingParams(max_tokens=2)).result(TIMEOUT_S)
    assert sample.token_ids == tokens_of([3, 4], 2)
