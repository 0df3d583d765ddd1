"""From arguments to a tokenizer, an engine and sampling parameters."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import demo_model_path
from ..home import keep_compiled_programs
from ..kernels import SUPPORTED_DTYPES
from ..model import Model, load_model, random_model
from ..model.config import MAX_SIZE, parse_dtype
from ..model.loading import find_checkpoint, read_config
from ..runtime import Processes, SamplingParams, join_processes, vSurge
from ..runtime.cache_size import CPU_CACHE_BYTES
from ..runtime.guided import check_grammar
from .parser import DEFAULT_MEMORY_UTILIZATION

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
SAMPLING = (
    "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "ignore_eos", "truncate_prompt_tokens",
)  # fmt: skip
NARROWING = ("top_p", "top_k", "min_p")  # of a choice among several tokens


def find_model(args: argparse.Namespace) -> Path | None:
    """The model's folder, downloaded first if need be; None for random weights.

    Raises:
        ValueError: a revision of what has none.
        FileNotFoundError: no such model.
        ConfigError: its config.json is not supported.
    """
    if args.revision is not None and args.model is None:
        what = "random weights have" if args.random_weights is not None else "the built-in checkpoint has"
        raise ValueError(f"--revision {args.revision}: {what} no revisions; give a hub id with --model")
    if args.random_weights is not None:
        return None
    folder = find_checkpoint(given(args.model, demo_model_path()), revision=args.revision)
    read_config(folder)  # before transformers does, for the tokenizer, and says less of what is wrong
    return folder


def load_tokenizer(args: argparse.Namespace, folder: Path | None) -> Any:
    """The tokenizer that --tokenizer names, or else the model's; None if it has none.

    Raises:
        ValueError: there is none to be had where one should be.
    """
    source = args.tokenizer
    if source is None and folder is not None and _holds_tokenizer(folder):
        source = folder
    if source is None:
        return None
    name = f"the tokenizer of {folder}" if args.tokenizer is None else f"--tokenizer {source!r}"
    allowed = f"must be a folder with {' or '.join(TOKENIZER_FILES)}, or a hub id like 'Qwen/Qwen3-0.6B'"
    path = Path(source).expanduser()
    # transformers makes an empty tokenizer of a folder that holds none
    if not source or (path.is_dir() and not _holds_tokenizer(path)):
        raise ValueError(f"{name}: {allowed}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path if path.is_dir() else source)
    except Exception as error:  # whatever transformers makes of broken files, all of it is told
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: {allowed}; transformers says: {said}") from error


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def build_engine(
    args: argparse.Namespace,
    folder: Path | None,
    tokenizer: Any,
    *,
    max_concurrent_decodes: int,
    processes: Processes | None = None,
    model: Model | None = None,
    **options: Any,
) -> vSurge:
    """The engine that the arguments describe, not yet started.

    Args:
        args: of `generate`, `chat`, or a benchmark of the engine.
        folder: the model's; None for random weights.
        tokenizer: None for prompts and output in token ids.
        max_concurrent_decodes: unless the arguments say otherwise.
        processes: this one, process 0, and the others; None if it is alone.
        model: that the arguments describe, if it is there already.
        options: of `vSurge.from_model` besides, or instead of what the arguments say.

    Raises:
        ValueError: an option out of range, or one that would have no effect.
    """
    if args.memory_utilization is not None and args.num_pages is not None:
        raise ValueError(
            f"--memory-utilization {args.memory_utilization}: has no effect beside --num-pages "
            f"{args.num_pages}; give one of them"
        )
    memory_utilization = share_of_memory(args, instead="--num-pages N chooses another size")
    described: dict[str, Any] = {
        "max_length": args.max_length,
        "max_batched_tokens": args.max_batched_tokens,
        "page_size": args.page_size,
        "num_pages": args.num_pages,
        "memory_utilization": memory_utilization,
        "seed": given(args.seed, secrets.randbits(32)),
        "processes": processes,
    }
    return vSurge.from_model(
        build_model(args, folder) if model is None else model,
        tokenizer,
        max_concurrent_decodes=given(args.max_concurrent_decodes, max_concurrent_decodes),
        **described | options,
    )


def build_model(args: argparse.Namespace, folder: Path | None) -> Model:
    """The model that the arguments describe.

    Args:
        args: of `generate` or `chat`.
        folder: the model's; None for random weights.

    Raises:
        ValueError: an option out of range.
    """
    dims = axis_dims(args)
    keep_compiled_programs()
    model = _load(args, folder, dims)
    if args.kv_dtype is None:
        return model
    kv_dtype = parse_dtype(args.kv_dtype, "--kv-dtype", SUPPORTED_DTYPES)
    return replace(model, config=replace(model.config, kv_dtype=kv_dtype))


@contextmanager
def joined_processes(args: argparse.Namespace) -> Iterator[Processes | None]:
    """This process and the others, as the arguments of `generate` say; None if it is alone.

    Raises:
        ValueError: some of the options are missing, or out of range.
    """
    options = {"--coordinator": args.coordinator, "--process-id": args.process_id,
        "--num-processes": args.num_processes}  # fmt: skip
    missing = [name for name, value in options.items() if value is None]
    if len(missing) == len(options):
        yield None
        return
    if missing:
        raise ValueError(f"{missing[0]}: is missing; several processes need all of {', '.join(options)}")
    # The library that sums over processes on a CPU writes to descriptor 1, where the texts alone belong.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with join_processes(
        args.coordinator, process_id=args.process_id, num_processes=args.num_processes
    ) as processes:
        yield processes


def share_of_memory(args: argparse.Namespace, *, instead: str | None) -> float:
    """The value of --memory-utilization, or its default.

    Args:
        args: of any command that has the option.
        instead: what to use if the device here is a CPU, where it has no effect; None if it does not matter
            what is here.

    Raises:
        ValueError: out of range, or without effect.
    """
    share = args.memory_utilization
    if share is None:
        return DEFAULT_MEMORY_UTILIZATION
    if not 0 < share <= 1:
        raise ValueError(f"--memory-utilization {share}: must lie in (0, 1]")
    if instead is not None and jax.default_backend() == "cpu":
        size = f"{CPU_CACHE_BYTES / 2**30:g} GiB"
        raise ValueError(
            f"--memory-utilization {share}: has no effect on a CPU, where the cache takes {size}; {instead}"
        )
    return share


def axis_dims(args: argparse.Namespace) -> tuple[int, ...]:
    """The shape of the mesh, from --tp or --sharding-axis-dims.

    Raises:
        ValueError: they make no mesh.
    """
    if args.sharding_axis_dims is None:
        if args.tp is not None and args.tp < 1:
            raise ValueError(f"--tp {args.tp}: must be at least 1")
        return (1, 1, 1, given(args.tp, 1), 1)
    try:
        return tuple(int(size) for size in args.sharding_axis_dims.split(","))
    except ValueError:
        raise ValueError(
            f"--sharding-axis-dims {args.sharding_axis_dims!r}: must be five numbers like 1,1,1,2,1"
        ) from None


def _load(args: argparse.Namespace, folder: Path | None, dims: tuple[int, ...]) -> Model:
    if folder is not None:
        return load_model(
            folder, dtype=args.dtype, quantization_method=args.quantization, sharding_axis_dims=dims
        )
    return random_model(
        args.random_weights,
        seed=given(args.seed, 0),
        dtype=given(args.dtype, jnp.bfloat16),
        quantization_method=args.quantization,
        sharding_axis_dims=dims,
    )


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Ascending numbers from "1,64".

    Raises:
        ValueError: they are none, or too large for a number of tokens.
    """
    try:
        numbers = {int(part) for part in text.split(",")}
    except ValueError:  # one of thousands of digits, too
        numbers = {0}
    if not all(0 < number <= MAX_SIZE for number in numbers):
        raise ValueError(
            f"{option} {text!r}: must be positive numbers with commas between, like 512,2048, each at most "
            f"{MAX_SIZE}"
        )
    return tuple(sorted(numbers))


def given(value: Any, default: Any) -> Any:
    """The value of an option, or its default if it was not given."""
    return default if value is None else value


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the arguments set, checked; the others are the model's to choose.

    Raises:
        ValueError: one that cannot be.
        ImportError: structured output without llguidance.
        OSError: a JSON schema's file that cannot be read.
    """
    changes = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.guided_json is not None:
        try:
            schema = Path(args.guided_json).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--guided-json {args.guided_json}: is no text in UTF-8: {error}") from error
        changes["guided_decoding"] = {"json": schema}
    for kind in ("regex", "choice"):
        if getattr(args, f"guided_{kind}") is not None:
            changes["guided_decoding"] = {kind: getattr(args, f"guided_{kind}")}
    changes["max_tokens"] = given(args.max_tokens, args.default_max_tokens)
    params = SamplingParams(**changes)  # wrong values are known before a model is loaded
    if params.guided_decoding is not None:
        check_grammar(params.guided_decoding)
    return changes


def check_sampling_has_effect(changes: dict[str, Any], surge: vSurge) -> None:
    """Refuses what narrows a choice where the model's defaults leave none.

    With a temperature of 0 that was asked for, the likeliest token is what every such option leaves.

    Args:
        changes: from `sampling_changes`.
        surge: the engine, not yet started.

    Raises:
        ValueError: it would have no effect.
    """
    idle = [f"--{name.replace('_', '-')} {changes[name]}" for name in NARROWING if name in changes]
    greedy = dict(surge.model.generation_defaults.sampling).get("temperature") == 0
    if idle and greedy and "temperature" not in changes:
        raise ValueError(
            f"{', '.join(idle)}: has no effect, for the model's generation_config.json takes the likeliest "
            "token; give --temperature too"
        )


def template_options(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Options of the chat template.

    Raises:
        ValueError: one that the tokenizer's template does not have.
    """
    if not args.no_thinking:
        return {}
    if "enable_thinking" not in tokenizer.get_chat_template():
        raise ValueError("--no-thinking: this model's chat template has no option enable_thinking")
    return {"enable_thinking": False}
