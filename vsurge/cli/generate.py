"""`vsurge generate`: prompts run concurrently, and their texts are written one after the other."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..runtime import Generation, Processes, ReturnSample
from .setup import (
    build_engine,
    build_model,
    check_sampling_has_effect,
    find_model,
    joined_processes,
    load_tokenizer,
    sampling_changes,
    template_options,
)
from .terminal import stream_in_order, summary

MAX_CONCURRENT_DECODES = 8
NEEDS_TOKENIZER = "needs a tokenizer, and this model has none; give one with --tokenizer"


def run(args: argparse.Namespace) -> None:
    with joined_processes(args) as processes:
        if processes is not None and processes.process_id:
            processes.follow(build_model(args, find_model(args)))
        else:
            _generate(args, processes)


def _generate(args: argparse.Namespace, processes: Processes | None) -> None:
    changes = sampling_changes(args)
    if args.no_thinking and not args.chat:
        raise ValueError("--no-thinking: is for chats, give --chat too (or leave it out)")
    texts = read_prompts(args.prompts)
    folder = find_model(args)
    tokenizer = load_tokenizer(args, folder)
    if tokenizer is None and args.stop:
        raise ValueError(f"--stop {args.stop[0]!r}: {NEEDS_TOKENIZER}")
    prompts = [engine_prompt(text, tokenizer, chat=args.chat) for text in texts]
    template = template_options(args, tokenizer)
    surge = build_engine(
        args, folder, tokenizer, max_concurrent_decodes=MAX_CONCURRENT_DECODES, processes=processes
    )
    check_sampling_has_effect(changes, surge)
    with surge:
        started = time.perf_counter()
        generation = surge.generate(
            prompts,
            surge.default_sampling_params(**changes),
            stream=True,
            chat_template_kwargs=template,
        )
        samples = generation.result() if args.json else _stream(generation, texts, tokenizer)
        seconds = time.perf_counter() - started
    if args.json:
        print(as_json(texts, samples, seconds))
    print(summary(samples, seconds), file=sys.stderr)


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts, with `-` replaced by what stdin holds, less the line end that closes it.

    Raises:
        ValueError: more than one `-`, or an empty prompt.
    """
    if list(arguments).count("-") > 1:
        raise ValueError("prompt '-': stdin can be read only once")
    prompts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in arguments]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index + 1} is empty")
    return prompts


def engine_prompt(text: str, tokenizer: Any, *, chat: bool) -> Any:
    """A prompt as the engine takes it: text, chat messages, or token ids where there is no tokenizer.

    Raises:
        ValueError: no tokenizer and no token ids.
    """
    if tokenizer is not None:
        return [{"role": "user", "content": text}] if chat else text
    if chat:
        raise ValueError(f"--chat: {NEEDS_TOKENIZER}")
    ids = text.split(",")
    if not all(token.strip().isdecimal() for token in ids):
        raise ValueError(
            f"prompt {text!r}: this model has no tokenizer; give one with --tokenizer, or prompts as token "
            "ids like 1,2,3"
        )
    return [int(token) for token in ids]


def _stream(generation: Generation, texts: Sequence[str], tokenizer: Any) -> list[ReturnSample]:
    headings = [""]
    if len(texts) > 1:
        headings = [
            f"{'' if i == 0 else chr(10)}[{i + 1}/{len(texts)}] {text}\n" for i, text in enumerate(texts)
        ]
    return stream_in_order(generation, headings, has_tokenizer=tokenizer is not None)


def as_json(texts: Sequence[str], samples: Sequence[ReturnSample], seconds: float) -> str:
    """The final samples and the run's speed."""
    tokens = sum(sample.num_generated_tokens for sample in samples)
    document = {
        "samples": [{"prompt": text, **asdict(sample)} for text, sample in zip(texts, samples, strict=True)],
        "num_generated_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    return json.dumps(document, ensure_ascii=False)
