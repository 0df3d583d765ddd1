"""`vsurge chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from ..runtime import Generation, vSurge
from .setup import (
    build_engine,
    check_sampling_has_effect,
    find_model,
    load_tokenizer,
    sampling_changes,
    template_options,
)
from .terminal import write

PROMPT = "> "


def run(args: argparse.Namespace) -> None:
    changes = sampling_changes(args)
    folder = find_model(args)
    tokenizer = load_tokenizer(args, folder)
    if tokenizer is None:
        raise ValueError("chat needs a tokenizer, and this model has none; give one with --tokenizer")
    template = template_options(args, tokenizer)
    surge = build_engine(args, folder, tokenizer, max_concurrent_decodes=1)
    check_sampling_has_effect(changes, surge)
    with surge:
        chat = Chat(surge, changes, system=args.system, template=template)
        chat.count_tokens([{"role": "user", "content": "?"}])  # no chat template: known at once
        if sys.stdin.isatty():
            note(f"{folder or args.random_weights}: /reset forgets the conversation, Ctrl-C stops an answer, "
                 "Ctrl-D or /exit leaves")  # fmt: skip
        while (line := read_line()) is not None:
            chat.say(line)


def read_line() -> str | None:
    """The next line of the user; None when there is no more. Ctrl-C starts the line anew."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (input() edits lines with it)
    while True:
        try:
            line = input(PROMPT if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            continue
        if line == "/exit":
            return None
        if line:
            return line


def note(text: str) -> None:
    """Says something that is not part of the conversation."""
    print(f"[{text}]", file=sys.stderr, flush=True)


class Chat:
    """A conversation with a model.

    Args:
        surge: running.
        changes: sampling parameters other than the model's defaults.
        system: message to begin with; None for none.
        template: options of the chat template.
    """

    def __init__(
        self, surge: vSurge, changes: dict[str, Any], *, system: str | None, template: dict[str, Any]
    ) -> None:
        self._surge = surge
        self._changes = changes
        self._template = template
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self._capacity = min(surge.max_length, surge.num_pages * surge.page_size)  # tokens
        self.messages: list[dict[str, str]] = list(self._beginning)

    def count_tokens(self, messages: list[dict[str, str]]) -> int:
        return self._surge.count_tokens(messages, chat_template_kwargs=self._template)

    def say(self, line: str) -> None:
        """Answers a line of the user, or does what a line that begins with a slash commands."""
        if line == "/reset":
            self.messages = list(self._beginning)
            note("the conversation begins anew")
        elif line.startswith("/"):
            note(f"{line.split(maxsplit=1)[0]}: no such command; there are /reset and /exit")
        else:
            self._answer([*self.messages, {"role": "user", "content": line}])

    def _answer(self, messages: list[dict[str, str]]) -> None:
        num_tokens = self.count_tokens(messages)
        room = self._capacity - num_tokens
        if room < 1:
            note(
                f"too long: the conversation has {num_tokens} tokens with this message, at most "
                f"{self._capacity - 1} leave room for an answer; /reset begins anew, a larger --max-length "
                "or --num-pages raises the limit as far as model and memory allow"
            )
            return
        with Interruptible() as interruptible:
            generation = self._surge.generate(
                messages, self._params(room), stream=True, chat_template_kwargs=self._template
            )
            interruptible.guard(generation)
            text, finish_reason = "", None
            for (sample,) in generation:
                write(sample.text[len(text) :])
                text, finish_reason = sample.text, sample.finish_reason
        write("" if text.endswith("\n") else "\n")
        if finish_reason == "abort":
            note("stopped")
        elif finish_reason == "length":
            limit = (
                "--max-tokens" if (self._changes["max_tokens"] or room) < room else "the longest conversation"
            )
            note(f"cut off: {limit} is reached")
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def _params(self, room: int) -> Any:
        """The sampling parameters of an answer that may have `room` tokens."""
        max_tokens = min(self._changes["max_tokens"] or room, room)
        min_tokens = min(self._changes.get("min_tokens", 0), max_tokens)
        changes = self._changes | {"max_tokens": max_tokens, "min_tokens": min_tokens}
        return self._surge.default_sampling_params(**changes)


class Interruptible:
    """While it is entered, Ctrl-C aborts the generation that it guards and raises nothing."""

    def __init__(self) -> None:
        self._generation: Generation | None = None
        self._interrupted = False

    def guard(self, generation: Generation) -> None:
        self._generation = generation
        if self._interrupted:
            generation.abort()

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._interrupted = True
        if self._generation is not None:
            self._generation.abort()

    def __enter__(self) -> Interruptible:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)
