"""Chats: what goes through the template, with which of its options, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vsurge.runtime.prompts import NOT_TEMPLATE_OPTIONS, token_ids_of

from .scripted import Scripted

CHAT = [{"role": "user", "content": "Hi"}]
OPEN_ANSWER = [*CHAT, {"role": "assistant", "content": "Hello, my name"}]
BEGIN_ANSWER = "<|im_start|>assistant\n"

# Messages of wrong types; the type checker of the tests must not get there first.


@pytest.fixture
def text_of(tokenizer: Any) -> Callable[..., str]:
    """What the template makes of a chat."""

    def text(chat: Any, **options: Any) -> str:
        return tokenizer.decode(token_ids_of(chat, tokenizer, options))

    return text


@pytest.fixture(params=["generate", "count_tokens"])
def take(request: pytest.FixtureRequest, scripted: Scripted) -> Callable[..., Any]:
    """Either of the methods that take a prompt."""
    return getattr(scripted.surge, request.param)


@pytest.mark.parametrize("prompt", ["a", [1, 2]])
def test_options_of_a_template_need_a_chat(take: Callable[..., Any], prompt: Any) -> None:
    with pytest.raises(
        ValueError, match=r"chat_template_kwargs={'enable.*no prompt is a list of chat messages"
    ):
        take(prompt, chat_template_kwargs={"enable_thinking": False})
    take(prompt, chat_template_kwargs={})


@pytest.mark.parametrize("name", NOT_TEMPLATE_OPTIONS)
def test_what_is_no_option_of_a_template_is_refused_by_name(take: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs: {name}=None is no option of the template"):
        take(CHAT, chat_template_kwargs={name: None})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"thinking": False}, ValueError, "thinking=False: the chat template has no such option"),
        ({"tools": []}, ValueError, r"tools=\[\]: the chat template has no such option"),
        ({5: 1}, ValueError, "5=1: the chat template has no such option"),
        ({"continue_final_message": "yes"}, TypeError, "continue_final_message='yes': must be True or False"),
        (
            {"continue_final_message": True, "add_generation_prompt": True}, ValueError,
            "add_generation_prompt=True and continue_final_message=True exclude each other",
        ),
    ],
)  # fmt: skip
def test_options_that_would_have_no_effect_are_refused_by_name(
    take: Callable[..., Any], options: dict[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^chat_template_kwargs: {message}"):
        take(CHAT, chat_template_kwargs=options)


def test_an_option_of_a_template_that_comes_with_it_is_taken(text_of: Callable[..., str]) -> None:
    assert text_of(CHAT, chat_template="{{ greeting }}", greeting="Hello") == "Hello"


def test_options_must_be_a_mapping(take: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"chat_template_kwargs=\['enable_thinking'\]: must be a dict"):
        take(CHAT, chat_template_kwargs=["enable_thinking"])


def test_one_chat_among_the_prompts_is_enough_for_options(scripted: Scripted) -> None:
    options = {"enable_thinking": False}
    scripted.surge.generate(["a", [1], CHAT], chat_template_kwargs=options)
    with pytest.raises(TypeError, match="prompt=1: must be a string, token ids or chat messages"):
        scripted.surge.generate([1, CHAT], chat_template_kwargs=options)  # pyright: ignore[reportArgumentType]


def test_the_template_begins_an_answer_unless_told_otherwise(text_of: Callable[..., str]) -> None:
    assert text_of(CHAT).endswith(BEGIN_ANSWER)
    assert text_of(CHAT) == text_of(CHAT, add_generation_prompt=False) + BEGIN_ANSWER


def test_the_final_message_can_be_continued(text_of: Callable[..., str]) -> None:
    assert text_of(OPEN_ANSWER, continue_final_message=True).endswith(BEGIN_ANSWER + "Hello, my name")
    assert text_of(OPEN_ANSWER).endswith("Hello, my name<|im_end|>\n" + BEGIN_ANSWER)


def test_the_text_parts_of_a_message_are_joined_by_newlines(text_of: Callable[..., str]) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    in_parts: list[dict[str, Any]] = [CHAT[0], {"role": "user", "content": parts}]
    assert text_of(in_parts) == text_of([CHAT[0], {"role": "user", "content": "One\ntwo"}])
    assert in_parts[1]["content"] is parts  # the caller's messages stay as they are


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([{"type": "image_url", "image_url": {}}], ValueError, "a part of type 'image_url' .* only 'text'"),
        ([{"type": "text"}], TypeError, r"{'type': 'text'} in a message's content: must look like"),
        ([{"text": "Hi"}], TypeError, "must look like {'type': 'text', 'text': '...'}"),
        (["Hi"], TypeError, "'Hi' in a message's content: must look like"),
        (
            {"text": "Hi"},
            TypeError,
            "content={'text': 'Hi'} of a message: must be a string or a list of text",
        ),
        (5, TypeError, "content=5 of a message: must be a string or a list of text parts"),
        (None, ValueError, "the chat template refuses its messages"),
    ],
)
def test_other_content_is_refused_by_name(
    take: Callable[..., Any], content: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        take([CHAT[0], {"role": "user", "content": content}])


def test_what_a_chat_template_refuses_is_a_value_error(tokenizer: Any) -> None:
    for template, reason in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['role'] + 1 }}", "can only concatenate str"),
    ):
        with pytest.raises(ValueError, match=f"the chat template refuses its messages: {reason}"):
            token_ids_of(CHAT, tokenizer, {"chat_template": template})


def test_a_tokenizer_adds_its_own_special_tokens_to_a_string_but_not_to_a_chat() -> None:
    calls: list[dict[str, Any]] = []

    def encode(text: str, **options: Any) -> list[int]:
        calls.append(options)
        return [1]

    processor = SimpleNamespace(encode=encode, apply_chat_template=lambda *_, **__: "text")
    token_ids_of("a", processor, None)
    token_ids_of(CHAT, processor, None)
    assert calls == [{}, {"add_special_tokens": False}]
