"""The options of an engine: checked, and those that were left open decided for the model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

from ..model import Model, Qwen3Config
from .cache_size import choose_num_pages
from .checks import (
    as_flag,
    as_integer,
    as_integers,
    as_number,
    as_optional_integer,
    check_vocabulary,
    is_integer,
)

DEFAULT_PREFILL_LENGTH = 1024  # tokens
MAX_TOKENS = 2**31 - 1  # of a cache, whose places are int32


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What `vSurge.from_model` was asked for, for one model.

    Attributes:
        max_concurrent_decodes: rows of the batch: requests that hold pages at a time.
        max_concurrent_prefill: prompts in one step, in each replica.
        max_prefill_length: tokens of prompts in one step, in each replica; a longer prompt takes several.
        max_batched_tokens: tokens in one step that has prompts, with those of whoever decodes beside them, in
            each replica.
        prefill_lengths: sizes of steps with prompts, tokens, in order; None for a default choice.
        decode_steps: tokens that a step without prompts makes for each sequence.
        prefix_caching: whether prefixes are looked up in the cache.
        max_length: longest sequence, prompt and output, tokens.
        page_size: tokens per page of the cache.
        num_pages: pages of the cache.
        max_queued_requests: requests that may wait for a place in the batch.
        eos_token_ids: tokens that end a sequence.
        seed: of requests without one of their own.
        vsurge_name: of the engine's thread.
        verbose: show progress bars on a terminal.
        compilation_cache_dir: where compiled programs are kept; None for jax's own setting.
        num_replicas: that share the rows and the pages evenly.
    """

    max_concurrent_decodes: int
    max_concurrent_prefill: int
    max_prefill_length: int
    max_batched_tokens: int
    prefill_lengths: tuple[int, ...] | None
    decode_steps: int
    prefix_caching: bool
    max_length: int
    page_size: int
    num_pages: int
    max_queued_requests: int
    eos_token_ids: tuple[int, ...]
    seed: int
    vsurge_name: str
    verbose: bool
    compilation_cache_dir: Path | None = None
    num_replicas: int = 1

    @property
    def rows_per_replica(self) -> int:
        """Rows of the batch that each replica has."""
        return self.max_concurrent_decodes // self.num_replicas

    @property
    def pages_per_replica(self) -> int:
        """Pages of the cache that each replica has."""
        return self.num_pages // self.num_replicas

    @property
    def pages_per_seq(self) -> int:
        """Pages of a sequence of `max_length`."""
        return -(-self.max_length // self.page_size)

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a sequence that `max_length` and the cache allow; its last is never in the cache."""
        return min(self.max_length, self.pages_per_replica * self.page_size + 1)


def options_for(
    model: Model,
    *,
    max_concurrent_decodes: int,
    max_concurrent_prefill: int | None,
    max_prefill_length: int | None,
    max_batched_tokens: int | None,
    prefill_lengths: Sequence[int] | None,
    decode_steps: int,
    prefix_caching: bool,
    max_length: int | None,
    page_size: int,
    memory_utilization: float,
    num_pages: int | None,
    max_queued_requests: int,
    extra_eos_token_ids: Sequence[int],
    seed: int,
    vsurge_name: str,
    verbose: bool,
    compilation_cache_dir: str | PathLike[str] | None,
) -> EngineOptions:
    """The options of an engine around a model; parameters and errors are those of `vSurge.from_model`."""
    config = _check_model(model).config
    replicas = model.layout.size("rows")
    total_rows = as_integer("max_concurrent_decodes", max_concurrent_decodes, 1)
    rows = _shared_out("max_concurrent_decodes", total_rows, model)
    page_size = as_integer("page_size", page_size, 1, MAX_TOKENS)
    num_pages = as_optional_integer("num_pages", num_pages, 1, MAX_TOKENS // page_size)
    if num_pages is not None:
        _shared_out("num_pages", num_pages, model)
    share = as_number("memory_utilization", memory_utilization, 0, 1, low_open=True)
    extra_eos = as_integers("extra_eos_token_ids", extra_eos_token_ids, 0)
    check_vocabulary("extra_eos_token_ids", extra_eos, config.vocab_size)
    if not isinstance(vsurge_name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"vsurge_name={vsurge_name!r}: must be a string")
    max_length = _length(max_length, config)
    lengths = None if prefill_lengths is None else as_integers("prefill_lengths", prefill_lengths, 1)
    prefill_length = _prefill_length(max_prefill_length, lengths, max_length)
    prompts = as_optional_integer("max_concurrent_prefill", max_concurrent_prefill, 1)
    caches_prefixes = as_flag("prefix_caching", prefix_caching)
    return EngineOptions(
        max_concurrent_decodes=total_rows,
        max_concurrent_prefill=rows if prompts is None else prompts,
        max_prefill_length=prefill_length,
        max_batched_tokens=_batched_tokens(max_batched_tokens, prefill_length, total_rows, replicas),
        decode_steps=as_integer("decode_steps", decode_steps, 1),
        prefix_caching=caches_prefixes,
        prefill_lengths=None if lengths is None else tuple(sorted(set(lengths))),
        max_length=max_length,
        page_size=page_size,
        max_queued_requests=as_integer("max_queued_requests", max_queued_requests, 1),
        eos_token_ids=tuple(dict.fromkeys([*model.eos_token_ids, *extra_eos])),
        seed=as_integer("seed", seed, 0),
        vsurge_name=vsurge_name,
        verbose=as_flag("verbose", verbose),
        compilation_cache_dir=_folder("compilation_cache_dir", compilation_cache_dir),
        num_replicas=replicas,
        num_pages=num_pages  # last: it looks at the device
        or choose_num_pages(
            model,
            page_size=page_size,
            memory_utilization=share,
            max_useful_pages=total_rows * -(-max_length // page_size) * (2 if caches_prefixes else 1),
            num_rows=total_rows,
        ),
    )


def _check_model(model: Any) -> Model:
    if isinstance(model, str | PathLike):
        raise TypeError(f"model={str(model)!r}: must be a Model; load it first with load_model(...)")  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(model, Model):
        raise TypeError(f"model={model!r}: must be a Model, from load_model or random_model")
    batch_axis, axes = model.partition_axis.batch_axis, vars(model.partition_axis)
    also = [field for field, axis in axes.items() if axis == batch_axis and field != "batch_axis"]
    if also and model.layout.size("rows") > 1:
        raise ValueError(
            f"model: batch_axis={batch_axis!r} is its {also[0]} too; each replica needs a whole model, so "
            "the batch must have an axis of its own, or one of 1 device"
        )
    for name in ("attention", "decode_attention"):
        if getattr(model.config, name) == "reference":
            raise ValueError(
                f"{name}='reference' in the model's config: the reference computes in NumPy, outside of any "
                f"compiled program, and an engine compiles its steps; use {name}=None or 'xla'"
            )
    return model


def _shared_out(name: str, number: int, model: Model) -> int:
    """The share of each replica."""
    replicas = model.layout.size("rows")
    if number % replicas:
        raise ValueError(
            f"{name}={number}: must be a multiple of the {replicas} replicas along "
            f"batch_axis={model.partition_axis.batch_axis!r}, which share them evenly"
        )
    return number // replicas


def _folder(name: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | PathLike):
        raise TypeError(f"{name}={value!r}: must be the path of a folder, or None")
    if not fspath(value):  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"{name}={value!r}: must be the path of a folder, or None")  # Path("") is "."
    return Path(value)  # pyright: ignore[reportUnknownArgumentType]


def _length(wanted: int | None, config: Qwen3Config) -> int:
    if is_integer(wanted) and not 2 <= cast("int", wanted) <= config.max_length:
        raise ValueError(f"max_length={wanted}: must lie between 2 and the model's {config.max_length}")
    length = as_optional_integer("max_length", wanted, 2)
    return config.max_length if length is None else length


def _prefill_length(wanted: int | None, lengths: tuple[int, ...] | None, max_length: int) -> int:
    wanted = as_optional_integer("max_prefill_length", wanted, 1)
    if lengths is not None:
        if not lengths:
            raise ValueError("prefill_lengths: is empty, give at least one number of tokens, or None")
        if wanted is not None and max(lengths) != wanted:
            raise ValueError(
                f"prefill_lengths={list(lengths)}: the largest must be max_prefill_length={wanted}"
            )
        if max(lengths) > max_length:
            raise ValueError(
                f"prefill_lengths={list(lengths)}: must lie between 1 and max_length={max_length}"
            )
        wanted = max(lengths)
    if wanted is None:
        return min(DEFAULT_PREFILL_LENGTH, max_length)
    if wanted > max_length:
        raise ValueError(f"max_prefill_length={wanted}: must lie between 1 and max_length={max_length}")
    return wanted


def _batched_tokens(wanted: int | None, prefill_length: int, rows: int, replicas: int) -> int:
    wanted = as_optional_integer("max_batched_tokens", wanted, 1)
    if wanted is None:
        return max(prefill_length, 2 * rows // replicas)
    if wanted * replicas < rows:
        each = f" over {replicas} replicas" if replicas > 1 else ""
        raise ValueError(
            f"max_batched_tokens={wanted}: must be at least max_concurrent_decodes={rows}{each}, one token "
            "for each"
        )
    return wanted
