"""Engines that `vsurge bench` measures, and what they are sent, from the command line's arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..benchmarks import measuring
from ..benchmarks.engine.load import LoadRequest, random_requests, read_requests
from ..benchmarks.workload import check_has_no_experts
from ..model import published_config
from ..model.loading import read_config
from ..runtime import vSurge
from .setup import build_engine, build_model, find_model, given

AT_ONCE = {"cpu": 16, "gpu": 256, "tpu": 256}  # sequences that decode together, unless told otherwise
NUM_REQUESTS = 256


def engine_and_requests(args: argparse.Namespace) -> tuple[vSurge, list[LoadRequest]]:
    """An engine, not yet started, and what it is to be sent."""
    if args.requests is not None:
        for name in ("num_requests", "input_tokens", "output_tokens"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise ValueError(f"{option}: has no effect beside --requests {args.requests}")
    count, (inputs, outputs) = given(args.num_requests, NUM_REQUESTS), lengths(args)
    if count < 1:
        raise ValueError(f"--num-requests {count}: must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    folder = dense_model(args)
    model = build_model(args, folder)
    vocab_size = model.config.vocab_size
    if args.requests is not None:
        requests = read_requests(Path(args.requests).expanduser(), vocab_size, seed=args.seed)
    else:
        requests = random_requests(count, vocab_size, inputs, outputs, seed=args.seed)
    longest = max(len(request.prompt) + request.output_tokens for request in requests)
    options = {"max_length": max_length_of(args, longest), "max_queued_requests": len(requests)}
    at_once = min(AT_ONCE[measuring.platform()], len(requests))
    args.max_concurrent_decodes = given(args.max_concurrent_decodes, at_once)
    surge = build_engine(args, folder, None, max_concurrent_decodes=at_once, model=model, **quiet(options))
    return surge, requests


def max_length_of(args: argparse.Namespace, needed: int) -> int:
    """The engine's `max_length`; a request that does not fit would make fewer tokens than are counted."""
    if args.max_length is not None and args.max_length < needed:
        raise ValueError(f"--max-length {args.max_length}: the longest request has {needed} tokens")
    return given(args.max_length, needed)


def dense_model(args: argparse.Namespace) -> Path | None:
    """As `find_model`; a model with experts is refused before it is loaded."""
    folder = find_model(args)
    check_has_no_experts(published_config(args.random_weights) if folder is None else read_config(folder))
    return folder


def quiet(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an engine that is to be measured: no prompt is found again."""
    return {**options, "prefix_caching": False, "verbose": False}


def lengths(args: argparse.Namespace) -> tuple[tuple[int, int], tuple[int, int]]:
    return parse_span("--input-tokens", given(args.input_tokens, args.default_input_tokens)), parse_span(
        "--output-tokens", given(args.output_tokens, args.default_output_tokens)
    )


def parse_span(option: str, text: str) -> tuple[int, int]:
    """From "N" or "N:M", tokens.

    Raises:
        ValueError: neither, or out of order; the option is named.
    """
    first, colon, last = text.partition(":")
    try:
        span = int(first), int(last if colon else first)
    except ValueError:
        span = 0, 0
    if not 1 <= span[0] <= span[1]:
        raise ValueError(f"{option} {text}: must be a number of tokens like 128, or two like 100:1024")
    return span


def parse_rates(text: str) -> list[float]:
    """From "1,2,4.5", requests a second.

    Raises:
        ValueError: no positive numbers.
    """
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"--rate {text}: must be positive numbers like 0.5,1,2")
    return rates


def describe_model(args: argparse.Namespace, surge: vSurge) -> str:
    config = surge.model.config
    weights = args.quantization or config.dtype.name
    if args.random_weights is not None:
        return f"{args.random_weights}, random weights, {weights}"
    return f"{given(args.model, 'the demo checkpoint')}, {weights}"
