"""Prompts in the forms that callers write them, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

ChatMessage = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[ChatMessage]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list: a string, a flat list of ints or a list of chat messages is a list of one.

    Raises:
        ValueError: there are none.
        TypeError: none of the forms.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"prompts={prompts!r}: must be a string, token ids, chat messages, or a list of these"
        )
    if len(prompts) == 0:
        raise ValueError("prompts: is empty, give at least one prompt")
    if all(isinstance(p, int) for p in prompts) or all(isinstance(p, Mapping) for p in prompts):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of chat messages."""
    return not isinstance(prompt, str) and any(isinstance(message, Mapping) for message in prompt)


def token_ids_of(prompt: Prompt, processor: Any, chat_template_kwargs: Mapping[str, Any] | None) -> list[int]:
    """The tokens of one prompt.

    Args:
        prompt: a string, token ids, or chat messages, which go through the processor's chat template.
        processor: a tokenizer of transformers; None if the prompt is token ids.
        chat_template_kwargs: options of the chat template, `enable_thinking` for one.

    Raises:
        TypeError: none of the forms.
        ValueError: no processor, no chat template, or a message that the template refuses.
    """
    if isinstance(prompt, str):
        return list(_need(processor, "a string").encode(prompt))
    if not isinstance(prompt, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"prompt={prompt!r}: must be a string, token ids or chat messages")
    if len(prompt) == 0:
        raise ValueError("prompt: is empty, it must have at least one token or chat message")
    are_tokens = [isinstance(item, int) and not isinstance(item, bool) for item in prompt]
    if all(are_tokens):
        return list(prompt)  # pyright: ignore[reportReturnType]
    if any(are_tokens):
        raise TypeError(f"prompt: {prompt[are_tokens.index(False)]!r} is no token id, but other items are")
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise TypeError(
                f"prompt: {message!r} is neither a token id nor a message with 'role' and 'content'"
            )
    text = _apply_chat_template(
        _need(processor, "chat messages"), cast("Sequence[ChatMessage]", prompt), chat_template_kwargs or {}
    )
    return list(processor.encode(text, add_special_tokens=False))


def _apply_chat_template(processor: Any, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> str:
    import jinja2  # transformers needs it for chat templates

    try:
        return processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **options
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"prompt: the chat template refuses its messages: {error}") from error


def _need(processor: Any, form: str) -> Any:
    if processor is None:
        raise ValueError(f"prompts: {form} needs a processor; without one, prompts are lists of token ids")
    return processor
