"""`vSurge`: the engine's user-facing class."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ..model import Model
from .cache_size import choose_num_pages
from .channel import Channel, ReturnSample
from .detokenizer import Detokenizer, TokenBytes
from .engine import Engine
from .executor import Executor
from .generation import Generation
from .page_pool import PagePool
from .prompts import Prompt, as_list, is_chat, token_ids_of
from .request import Request
from .sampling import MAX_BANNED
from .sampling_params import SamplingParams
from .scheduler import Scheduler

logger = logging.getLogger("vsurge.runtime")

DEFAULT_PREFILL_LENGTH = 1024  # tokens
Surge = TypeVar("Surge", bound="vSurge")  # beartype cannot check typing.Self in a decorated class


class vSurge:
    """An inference engine: continuous batching over a paged cache. Build it with `from_model`.

    `start` it, `generate` from any number of threads and event loops, `stop` it; or use it in a `with` block.
    """

    def __init__(
        self,
        model: Model,
        processor: Any,
        *,
        engine: Engine,
        executor: Executor,
        pool: PagePool,
        max_length: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
        verbose: bool,
    ) -> None:
        self.model = model
        self.processor = processor
        self.max_length = max_length
        self.num_pages, self.page_size = pool.num_pages, pool.page_size
        self.eos_token_ids = eos_token_ids
        self._token_bytes = None if processor is None else TokenBytes(processor)
        self._engine = engine
        self._executor = executor
        self._pool = pool
        self._seed = seed
        self._count = itertools.count()
        self._verbose = verbose
        # Neither the engine nor its thread holds this object, so it can be dropped.
        weakref.finalize(self, engine.abandon).atexit = False

    @classmethod
    def from_model(
        cls: type[Surge],
        model: Model,
        processor: Any = None,
        *,
        max_concurrent_decodes: int = 64,
        max_concurrent_prefill: int = 1,
        max_prefill_length: int | None = None,
        prefill_lengths: Sequence[int] | None = None,
        max_length: int | None = None,
        page_size: int = 128,
        memory_utilization: float = 0.9,
        num_pages: int | None = None,
        max_queued_requests: int = 1024,
        extra_eos_token_ids: Sequence[int] = (),
        seed: int = 0,
        vsurge_name: str = "vsurge",
        verbose: bool = True,
    ) -> Surge:
        """Builds an engine around a model; nothing is compiled or allocated yet.

        Args:
            model: from `load_model` or `random_model`.
            processor: its tokenizer (transformers); None if prompts and output are token ids.
            max_concurrent_decodes: sequences that decode together.
            max_concurrent_prefill: prompts that prefill together.
            max_prefill_length: tokens in one prefill step; longer prompts are processed in chunks of as many.
                None: 1024, or max_length if that is less.
            prefill_lengths: sizes of prefill steps to compile, tokens; a step is padded to the next one. None
                for powers of two up to max_prefill_length. The largest must be max_prefill_length, if given.
            max_length: longest sequence, prompt and output, tokens; None for the model's own.
            page_size: tokens per page of the cache.
            memory_utilization: share of the accelerator's memory left after the weights that the cache takes,
                in (0, 1]; on a CPU the cache takes 1 GiB instead.
            num_pages: pages of the cache; None for as many as `memory_utilization` says.
            max_queued_requests: requests that may wait; `generate` raises `QueueFull` beyond.
            extra_eos_token_ids: tokens that end a sequence besides the model's.
            seed: of requests without one of their own.
            vsurge_name: of the engine's thread.
            verbose: show progress bars on a terminal.

        Raises:
            ValueError, TypeError: an option out of range.
            OutOfMemory: not even one page fits the device.
        """
        config = model.config
        _check_integers(
            at_least=1,
            max_concurrent_decodes=max_concurrent_decodes,
            max_concurrent_prefill=max_concurrent_prefill,
            max_prefill_length=max_prefill_length,
            max_length=max_length,
            page_size=page_size,
            num_pages=num_pages,
            max_queued_requests=max_queued_requests,
        )
        _check_integers(at_least=0, seed=seed)
        max_length = config.max_length if max_length is None else max_length
        if not 2 <= max_length <= config.max_length:
            raise ValueError(
                f"max_length={max_length}: must lie between 2 and the model's {config.max_length}"
            )
        max_prefill_length = _prefill_length(max_prefill_length, prefill_lengths, max_length)
        if not 0 < memory_utilization <= 1:
            raise ValueError(f"memory_utilization={memory_utilization}: must lie in (0, 1]")
        eos_token_ids = tuple(dict.fromkeys([*model.eos_token_ids, *extra_eos_token_ids]))
        _check_token_ids("extra_eos_token_ids", extra_eos_token_ids, config.vocab_size)
        if num_pages is None:
            num_pages = choose_num_pages(
                model,
                page_size=page_size,
                memory_utilization=memory_utilization,
                max_useful_pages=max_concurrent_decodes * -(-max_length // page_size),
            )
        pool = PagePool(num_pages, page_size)
        scheduler = Scheduler(
            pool,
            max_concurrent_decodes=max_concurrent_decodes,
            max_concurrent_prefill=max_concurrent_prefill,
            max_prefill_length=max_prefill_length,
        )
        executor = Executor(
            model,
            num_pages=num_pages,
            page_size=page_size,
            max_length=max_length,
            max_concurrent_decodes=max_concurrent_decodes,
            max_concurrent_prefill=max_concurrent_prefill,
            max_prefill_length=max_prefill_length,
            prefill_lengths=None if prefill_lengths is None else sorted(set(prefill_lengths)),
        )
        engine = Engine(scheduler, executor, max_queued_requests=max_queued_requests, name=vsurge_name)
        return cls(
            model,
            processor,
            engine=engine,
            executor=executor,
            pool=pool,
            max_length=max_length,
            eos_token_ids=eos_token_ids,
            seed=seed,
            verbose=verbose,
        )

    create_odriver = from_model

    def compile(self) -> None:
        """Compiles the programs of all buckets, with a progress bar; what is compiled stays so.

        jax's persistent compilation cache is used if it is set up (`jax_compilation_cache_dir`).
        """
        self._executor.compile(show_progress=self._verbose)

    def start(self) -> None:
        """Starts the engine; compiles first what `compile` has not, so that serving never does."""
        self.compile()
        self._engine.start()

    def stop(self, *, drain: bool = True) -> None:
        """Stops the engine and gives the cache's memory back; `start` may be called again.

        Args:
            drain: finish all requests first; otherwise they end with finish_reason "abort".
        """
        self._engine.stop(drain=drain)

    def __enter__(self: Surge) -> Surge:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(drain=error is None)

    def count_tokens(self, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> int:
        """Tokens of one prompt, a string, token ids or chat messages (the template's own tokens included)."""
        return len(token_ids_of(prompt, self.processor, chat_template_kwargs))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        stream: bool = False,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Queues prompts for generation.

        Args:
            prompts: strings, lists of token ids, or chats (lists of messages with "role" and "content"); or
                one of these, which is a list of one.
            sampling_params: for all prompts, or one per prompt; None for the model's defaults
                (generation_config.json).
            stream: whether awaiting the result gives an iterator instead of the final list.
            chat_template_kwargs: options of the chat template, `{"enable_thinking": False}` for one.

        Returns:
            A `Generation`: await it, iterate over it (with or without `async`), or call its `result()`.
            Dropping it aborts what is unfinished.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot work; the message says which and why.
            QueueFull: too many requests are waiting.
            EngineStopped, EngineFailed: the engine does not run.
        """
        listed = as_list(prompts)
        if chat_template_kwargs and not any(is_chat(prompt) for prompt in listed):
            raise ValueError(
                f"chat_template_kwargs={dict(chat_template_kwargs)}: no prompt is a list of chat messages"
            )
        params = self._params_of(sampling_params, len(listed))
        token_ids = [
            self._prompt_ids(i, prompt, p, chat_template_kwargs)
            for i, (prompt, p) in enumerate(zip(listed, params, strict=True))
        ]
        empty = [ReturnSample("", (), 0, 0.0, None, None, len(ids)) for ids in token_ids]
        channel = Channel(empty)
        requests = [
            self._request(i, ids, p, channel)
            for i, (ids, p) in enumerate(zip(token_ids, params, strict=True))
        ]
        self._engine.submit(requests)
        # It holds on to this object, so that the engine lives as long as somebody waits for its output.
        return Generation(channel, partial(self._abort, requests), stream=stream)

    def _abort(self, requests: Sequence[Request]) -> None:
        self._engine.abort(requests)

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """The sampling parameters of generation_config.json, with changes."""
        defaults: dict[str, Any] = dict(self.model.generation_defaults.sampling)
        return SamplingParams(**(defaults | changes))

    def _params_of(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            return [self.default_sampling_params()] * count
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        listed = list(sampling_params)
        if len(listed) != count:
            raise ValueError(
                f"sampling_params: {len(listed)} of them for {count} prompts; give one, or one each"
            )
        for params in listed:
            if not isinstance(params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"sampling_params: {params!r} is no SamplingParams")
        return listed

    def _prompt_ids(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]:
        """A prompt's tokens, truncated if the request says so, and checked."""
        ids = token_ids_of(prompt, self.processor, chat_template_kwargs)
        if params.truncate_prompt_tokens is not None:
            ids = ids[-params.truncate_prompt_tokens :]
        if not ids:
            raise ValueError(f"prompts[{index}]: has no tokens")
        _check_token_ids(f"prompts[{index}]", ids, self.model.config.vocab_size)
        if len(ids) >= self.max_length:
            raise ValueError(
                f"prompts[{index}]: {len(ids)} tokens, must be fewer than max_length={self.max_length}; "
                f"truncate_prompt_tokens={max(1, self.max_length - (params.max_tokens or 1))} would keep its "
                "last tokens"
            )
        return ids

    def _request(self, index: int, ids: list[int], params: SamplingParams, channel: Channel) -> Request:
        room = self.max_length - len(ids)
        stop_token_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_token_ids |= set(self.eos_token_ids)
        _check_token_ids("stop_token_ids", params.stop_token_ids or (), self.model.config.vocab_size)
        if params.min_tokens and len(stop_token_ids) > MAX_BANNED:
            raise ValueError(
                f"stop_token_ids: {len(stop_token_ids)} with the end-of-sequence tokens, with min_tokens at "
                f"most {MAX_BANNED} are supported"
            )
        request = Request(
            prompt_ids=ids,
            params=params,
            stop_token_ids=stop_token_ids,
            max_new_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            seed=self._draw_seed() if params.seed is None else params.seed,
            channel=channel,
            index=index,
            detokenizer=self._detokenizer(params),
        )
        needed = self._pool.pages_for(request.max_tokens_in_cache)
        if needed > self.num_pages:
            raise ValueError(
                f"prompts[{index}]: its {len(ids)} tokens and max_tokens={request.max_new_tokens} more need "
                f"{needed} pages of {self.page_size} tokens, the whole cache has {self.num_pages}; ask for "
                "fewer tokens or build the engine with a larger num_pages"
            )
        return request

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self._token_bytes is None:
            if params.stop_strings:
                raise ValueError(f"stop={params.stop!r}: stop strings need a processor")
            return None
        if not params.detokenize:
            return None
        return Detokenizer(
            self._token_bytes,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
        )

    def _draw_seed(self) -> int:
        high, low = np.random.SeedSequence([self._seed, next(self._count)]).generate_state(2).tolist()
        return high << 32 | low


def _prefill_length(wanted: int | None, lengths: Sequence[int] | None, max_length: int) -> int:
    if lengths is not None:
        if not lengths or any(length < 1 for length in lengths):
            raise ValueError(f"prefill_lengths={list(lengths)}: must be positive numbers of tokens")
        if wanted is not None and max(lengths) != wanted:
            raise ValueError(
                f"prefill_lengths={list(lengths)}: the largest must be max_prefill_length={wanted}"
            )
        wanted = max(lengths)
    if wanted is None:
        return min(DEFAULT_PREFILL_LENGTH, max_length)
    if not 1 <= wanted <= max_length:
        raise ValueError(f"max_prefill_length={wanted}: must lie between 1 and max_length={max_length}")
    return wanted


def _check_integers(*, at_least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is None:  # where that is allowed, it has a meaning of its own
            continue
        if isinstance(value, bool) or not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name}={value!r}: must be an integer")
        if value < at_least:
            raise ValueError(f"{name}={value}: must be at least {at_least}")


def _check_token_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name}: token id {token_id} is outside the vocabulary, 0 to {vocab_size - 1}")
