"""`vSurge`: the engine's user-facing class."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, TypeVar

from ..model import Model
from .engine import Engine
from .executor import Executor
from .generation import Generation
from .leading_executor import executor_of
from .life_cycle import LifeCycle
from .options import EngineOptions, options_for
from .page_pool import PagePool
from .per_prompt import params_of, priorities_of, timeouts_of
from .processes import Processes
from .prompts import Prompt, as_list, check_template_options, token_ids_of
from .request import Request
from .request_builder import RequestBuilder
from .sampling_params import SamplingParams
from .scheduler import Scheduler

Surge = TypeVar("Surge", bound="vSurge")  # beartype cannot check typing.Self in a decorated class


class vSurge(LifeCycle):
    """An inference engine: continuous batching over a paged cache. Build it with `from_model`.

    `start` it, `generate` from any number of threads and event loops, `stop` it; or use it in a `with` block.
    """

    def __init__(self, model: Model, processor: Any, options: EngineOptions, executor: Executor) -> None:
        self.processor = processor
        self.max_length = options.max_length
        self.num_pages, self.page_size = options.num_pages, options.page_size
        self.eos_token_ids = options.eos_token_ids
        output_lock = threading.RLock()
        self._requests = RequestBuilder(processor, options, model.config.vocab_size, output_lock)
        pools = [PagePool(options.pages_per_replica, options.page_size) for _ in range(options.num_replicas)]
        scheduler = Scheduler(
            *pools,
            max_concurrent_decodes=options.max_concurrent_decodes,
            max_concurrent_prefill=options.max_concurrent_prefill,
            max_prefill_length=options.max_prefill_length,
            max_batched_tokens=options.max_batched_tokens,
            decode_steps=options.decode_steps,
            prefix_caching=options.prefix_caching,
            priority_places=options.max_queued_requests,
        )
        engine = Engine(
            scheduler,
            executor,
            output_lock=output_lock,
            max_queued_requests=options.max_queued_requests,
            name=options.vsurge_name,
        )
        super().__init__(model, engine, executor, verbose=options.verbose)
        # Neither the engine nor its thread holds this object, so it can be dropped.
        weakref.finalize(self, self._engine.abandon).atexit = False

    @classmethod
    def from_model(
        cls: type[Surge],
        model: Model,
        processor: Any = None,
        *,
        max_concurrent_decodes: int = 64,
        max_concurrent_prefill: int | None = None,
        max_prefill_length: int | None = None,
        max_batched_tokens: int | None = None,
        prefill_lengths: Sequence[int] | None = None,
        decode_steps: int = 1,
        prefix_caching: bool = True,
        max_length: int | None = None,
        page_size: int = 128,
        memory_utilization: float = 0.9,
        num_pages: int | None = None,
        max_queued_requests: int = 1024,
        extra_eos_token_ids: Sequence[int] = (),
        seed: int = 0,
        vsurge_name: str = "vsurge",
        verbose: bool = True,
        compilation_cache_dir: str | PathLike[str] | None = None,
        processes: Processes | None = None,
    ) -> Surge:
        """Builds an engine around a model; nothing is compiled or allocated yet.

        Args:
            model: from `load_model` or `random_model`.
            processor: its tokenizer (transformers); None if prompts and output are token ids.
            max_concurrent_decodes: sequences that decode together. Replicas (more than one device along
                `batch_axis`) share them evenly, so it must be a multiple of their number, as must num_pages.
                What is said of a step below holds for the part of it that each replica has.
            max_concurrent_prefill: most prompts in one step; None for as many as it has room for.
            max_prefill_length: most tokens of prompts in one step; longer prompts are processed in chunks.
                None: 1024, or max_length if that is less.
            max_batched_tokens: most tokens in a step that has prompts; whoever decodes takes one each, the
                prompts the rest. With fewer such a step is shorter, and with it the others' time between
                tokens, while prompts take longer. At least max_concurrent_decodes. None: max_prefill_length,
                or twice max_concurrent_decodes if that is more.
            prefill_lengths: sizes of steps with prompts to compile, tokens; a step is padded to the next.
                None for powers of two. The largest must be max_prefill_length, if given;
                max_batched_tokens is one of them anyway.
            decode_steps: tokens that a step without prompts makes for each sequence. More cost less of the
                host's time for each, and are handed out, and requests are admitted or end, only after them.
            prefix_caching: whether the cache's pages are kept after a sequence has ended, for others that
                begin with the same tokens. Results do not depend on it, apart from rounding.
            max_length: longest sequence, prompt and output, tokens; None for the model's own.
            page_size: tokens per page of the cache.
            memory_utilization: share of the accelerator's memory left after the weights that the cache takes,
                in (0, 1]; on a CPU the cache takes 1 GiB instead. It takes less where the engine can use no
                more: max_length tokens for each of max_concurrent_decodes, twice that with prefix_caching.
            num_pages: pages of the cache; None for as many as `memory_utilization` says. A sequence longer
                than all of them together (of a replica's) is refused, or cut off there if its `max_tokens` is
                None.
            max_queued_requests: requests that may wait for a place in the batch, beyond which `generate`
                raises `QueueFull`. All prompts of a call begin by waiting, even while places are free, so it
                also bounds how many one call may pass.
            extra_eos_token_ids: tokens that end a sequence besides the model's.
            seed: of requests without one of their own.
            vsurge_name: of the engine's thread.
            verbose: show progress bars on a terminal.
            compilation_cache_dir: a folder for compiled programs, so that the next engine with the same
                shapes starts sooner; it is made if it does not exist. Trust who can write to it: programs
                are run as they are found. None: jax's own setting (`jax_compilation_cache_dir`).
            processes: from `join_processes`, for a model that lies on the devices of several processes; this
                one is process 0, and the others `follow` it.

        Raises:
            ValueError, TypeError: an option out of range, or one of several processes without `processes`.
            EngineError: this is not process 0.
            OutOfMemory: not even one page fits the device.
        """
        options = options_for(
            model,
            max_concurrent_decodes=max_concurrent_decodes,
            max_concurrent_prefill=max_concurrent_prefill,
            max_prefill_length=max_prefill_length,
            max_batched_tokens=max_batched_tokens,
            prefill_lengths=prefill_lengths,
            decode_steps=decode_steps,
            prefix_caching=prefix_caching,
            max_length=max_length,
            page_size=page_size,
            memory_utilization=memory_utilization,
            num_pages=num_pages,
            max_queued_requests=max_queued_requests,
            extra_eos_token_ids=extra_eos_token_ids,
            seed=seed,
            vsurge_name=vsurge_name,
            verbose=verbose,
            compilation_cache_dir=compilation_cache_dir,
        )
        return cls(model, processor, options, executor_of(model, options, processes))

    def count_tokens(self, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> int:
        """Tokens of one prompt, a string, token ids or chat messages (the template's own tokens included).

        Raises:
            ValueError, TypeError: no prompt, or no options of a template, as for `generate`.
        """
        check_template_options(chat_template_kwargs, [prompt])
        return len(token_ids_of(prompt, self.processor, chat_template_kwargs))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        stream: bool = False,
        *,
        priority: int | Sequence[int] = 0,
        timeout_s: float | int | Sequence[float | int | None] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Queues prompts for generation.

        Args:
            prompts: strings, lists of token ids, or chats (lists of messages with "role" and "content", a
                string or a list of text parts); or one of these, which is a list of one.
            sampling_params: for all prompts, or one per prompt; None for the model's defaults
                (generation_config.json).
            stream: whether awaiting the result gives an iterator instead of the final list.
            priority: for all prompts, or one per prompt; smaller ones are served first. A step of priority
                lets a prompt overtake at most `max_queued_requests` that came before it, so that nobody waits
                for ever.
            timeout_s: for all prompts, or one per prompt: seconds from now after which it ends with what it
                has and finish_reason "timeout", wherever it stands: it may wait, run or be paused. Its pages
                are free one step later. None for any time.
            chat_template_kwargs: options of the chat template, `{"enable_thinking": False}` for one;
                `{"continue_final_message": True}` has the last message continued instead of answered. One
                that the template does not mention is refused.

        Returns:
            A `Generation`: await it, iterate over it (with or without `async`), or call its `result()`.
            Dropping it aborts what is unfinished. An exception in a step fails the prompts of that step; the
            others go on, and come with the `StepFailed` that is raised once all have ended.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot work; the message says which and why.
            QueueFull: more than `max_queued_requests` would wait; none of the prompts is queued.
            EngineStopped, EngineFailed: the engine does not run.
        """
        listed = as_list(prompts)
        check_template_options(chat_template_kwargs, listed)
        params = params_of(sampling_params, len(listed), self.default_sampling_params)
        priorities = priorities_of(priority, len(listed))
        timeouts = timeouts_of(timeout_s, len(listed))
        self._engine.check_queue(sum(one.num_completions for one in params))
        channel, requests = self._requests.build(listed, params, priorities, chat_template_kwargs)
        for request in requests:
            timeout = timeouts[request.index]
            request.deadline = None if timeout is None else request.submitted_at + timeout
        self._engine.submit(requests)
        # It holds on to this object, so that the engine lives as long as somebody waits for its output.
        deltas = frozenset(i for i, p in enumerate(params) if p.output_kind == "delta")
        return Generation(channel, partial(self._abort, requests), stream=stream, deltas=deltas)

    def _abort(self, requests: Sequence[Request]) -> None:
        self._engine.abort(requests)

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """The sampling parameters of generation_config.json, with changes."""
        defaults: dict[str, Any] = dict(self.model.generation_defaults.sampling)
        return SamplingParams(**(defaults | changes))
