"""Prompts in the forms that callers write them, as token ids."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from .checks import as_flag, is_integer

BYTES = (bytes, bytearray, memoryview)  # sequences of integers, which are no token ids
ChatMessage = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[ChatMessage]

# What apply_chat_template takes besides options of the template: the messages are the prompt, and their text
# is tokenized here.
NOT_TEMPLATE_OPTIONS = (
    "conversation", "conversations", "messages", "tokenize", "tokenizer_kwargs", "sanitize_control_tokens",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
)  # fmt: skip
# And those that are options of apply_chat_template, whatever the template mentions.
FLAGS = ("add_generation_prompt", "continue_final_message")
NOT_IN_TEMPLATE = (*FLAGS, "chat_template")


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list: a string, a flat list of ints or a list of chat messages is a list of one.

    Raises:
        ValueError: there are none.
        TypeError: none of the forms.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, BYTES):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"prompts={prompts!r}: must be a string, token ids, chat messages, or a list of these"
        )
    if len(prompts) == 0:
        raise ValueError("prompts: is empty, give at least one prompt")
    if all(is_integer(p) for p in prompts) or all(isinstance(p, Mapping) for p in prompts):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]


def check_template_options(options: Mapping[str, Any] | None, prompts: Sequence[Prompt]) -> None:
    """Refuses what is no option of the chat template, and any options where no prompt is a chat.

    Raises:
        TypeError: not a mapping, or a flag that is none.
        ValueError: such an option, two that exclude each other, or no chat.
    """
    if options is None:
        return
    if not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"chat_template_kwargs={options!r}: must be a dict of the chat template's options")
    for name in NOT_TEMPLATE_OPTIONS:
        if name in options:
            raise ValueError(
                f"chat_template_kwargs: {name}={options[name]!r} is no option of the template; the prompt "
                "gives the messages, and the engine tokenizes them"
            )
    flags = [as_flag(f"chat_template_kwargs: {name}", options[name]) for name in FLAGS if name in options]
    if flags == [True, True]:
        raise ValueError(
            "chat_template_kwargs: add_generation_prompt=True and continue_final_message=True exclude each "
            "other; a message is either answered or continued"
        )
    if options and not any(_is_chat(prompt) for prompt in prompts):
        raise ValueError(f"chat_template_kwargs={dict(options)}: no prompt is a list of chat messages")


def _is_chat(prompt: Prompt) -> bool:
    return (
        isinstance(prompt, Sequence)  # pyright: ignore[reportUnnecessaryIsInstance]
        and not isinstance(prompt, str)
        and any(isinstance(message, Mapping) for message in prompt)
    )


def token_ids_of(prompt: Prompt, processor: Any, chat_template_kwargs: Mapping[str, Any] | None) -> list[int]:
    """The tokens of one prompt.

    Args:
        prompt: a string, token ids, or chat messages, which go through the processor's chat template. A
            message's content is a string or a list of parts like {"type": "text", "text": ...}, whose texts
            are joined by newlines.
        processor: a tokenizer of transformers; None if the prompt is token ids.
        chat_template_kwargs: options of the chat template, `enable_thinking` for one. Unless they say
            otherwise, the template is asked for the beginning of an answer (`add_generation_prompt`), except
            with `continue_final_message`.

    Raises:
        TypeError: none of the forms.
        ValueError: no processor, no chat template, an option that it does not mention, or a message that it
            refuses.
    """
    if isinstance(prompt, str):
        return list(_need(processor, "a string").encode(valid_text("prompt", prompt)))
    if not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"prompt={prompt!r}: must be a string, token ids or chat messages")
    if len(prompt) == 0:
        raise ValueError("prompt: is empty, it must have at least one token or chat message")
    are_tokens = [is_integer(item) for item in prompt]
    if all(are_tokens):
        return [operator.index(cast("int", item)) for item in prompt]
    if any(are_tokens):
        raise TypeError(f"prompt: {prompt[are_tokens.index(False)]!r} is no token id, but other items are")
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise TypeError(
                f"prompt: {message!r} is neither a token id nor a message with 'role' and 'content'"
            )
    messages = [_with_plain_content(message) for message in cast("Sequence[ChatMessage]", prompt)]
    text = _apply_chat_template(_need(processor, "chat messages"), messages, chat_template_kwargs or {})
    return list(processor.encode(valid_text("prompt", text), add_special_tokens=False))


def valid_text(name: str, text: str) -> str:
    """A parameter that is text, which a tokenizer will take.

    Raises:
        ValueError: it has half of a surrogate pair, as Python writes bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(f"{name}: {part!r} is no valid Unicode: {error.reason}") from error
    return text


def _with_plain_content(message: ChatMessage) -> ChatMessage:
    content = message["content"]
    if content is None or isinstance(content, str):  # None where it calls tools; templates know it
        return message
    if not isinstance(content, Sequence):
        raise TypeError(f"prompt: content={content!r} of a message: must be a string or a list of text parts")
    return {**message, "content": "\n".join(_text_of(part) for part in cast("Sequence[Any]", content))}


def _text_of(part: Any) -> str:
    fields: Mapping[str, Any] = cast("Mapping[str, Any]", part) if isinstance(part, Mapping) else {}
    kind, text = fields.get("type"), fields.get("text")
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"prompt: a part of type {kind!r} in a message's content: only 'text' is supported")
    if kind is None or not isinstance(text, str):
        raise TypeError(
            f"prompt: {part!r} in a message's content: must look like {{'type': 'text', 'text': '...'}}"
        )
    return text


def _apply_chat_template(processor: Any, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> str:
    import jinja2  # transformers needs it for chat templates

    for name in [name for name in options if name not in NOT_IN_TEMPLATE]:
        template = processor.get_chat_template(options.get("chat_template"), options.get("tools"))
        if not re.search(rf"\b{re.escape(str(name))}\b", template):
            raise ValueError(
                f"chat_template_kwargs: {name}={options[name]!r}: the chat template has no such option"
            )
    options = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    try:
        return processor.apply_chat_template(list(messages), tokenize=False, **options)
    except (jinja2.TemplateError, TypeError) as error:  # a template adds strings to what need not be any
        raise ValueError(f"prompt: the chat template refuses its messages: {error}") from error


def _need(processor: Any, form: str) -> Any:
    if processor is None:
        raise ValueError(f"prompts: {form} needs a processor; without one, prompts are lists of token ids")
    return processor
