"""From prompts and sampling parameters to requests, or an error that says what cannot work and why."""

from __future__ import annotations

import itertools
import math
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .channel import Channel
from .checks import check_vocabulary
from .detokenizer import Detokenizer, TokenBytes
from .guided import Grammars
from .options import EngineOptions
from .prompts import Prompt, token_ids_of, valid_text
from .request import Group, Request
from .sampling import MAX_BANNED
from .sampling_params import MAX_SEED, SamplingParams
from .token_mask import BadWords, TokenMask


class RequestBuilder:
    """Makes requests that the engine can serve. Methods may be called from any thread.

    Args:
        processor: the tokenizer; None if prompts and output are token ids.
        options: the engine's.
        vocab_size: the model's.
        lock: of the engine's output (see `Channel`).

    Raises:
        TypeError: a tokenizer of another kind.
    """

    def __init__(
        self, processor: Any, options: EngineOptions, vocab_size: int, lock: threading.RLock
    ) -> None:
        self._processor = processor
        self._options = options
        self._vocab_size = vocab_size
        self._lock = lock
        self._token_bytes = None if processor is None else TokenBytes(processor)
        self._count = itertools.count()
        self._grammars = Grammars(processor, vocab_size, options.eos_token_ids)

    def build(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> tuple[Channel, list[Request]]:
        """The requests of each prompt, one per completion, and the channel that they share.

        Raises:
            ValueError, TypeError: a prompt or parameter that cannot work.
        """
        token_ids = [
            self._prompt_ids(i, prompt, p, chat_template_kwargs)
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]
        groups = [Group() for _ in token_ids]
        channel = Channel([uuid.uuid4().hex for _ in groups], groups, self._lock)
        return channel, [
            request
            for i, (ids, p, priority) in enumerate(zip(token_ids, params, priorities, strict=True))
            for request in self._completions(i, ids, p, priority, channel, groups[i])
        ]

    def _prompt_ids(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]:
        """A prompt's tokens, truncated if the request says so, and checked."""
        ids = token_ids_of(prompt, self._processor, chat_template_kwargs)
        if params.truncate_prompt_tokens is not None:
            ids = ids[-params.truncate_prompt_tokens :]
        if not ids:
            raise ValueError(f"prompts[{index}]: has no tokens")
        check_vocabulary(f"prompts[{index}]", ids, self._vocab_size)
        if len(ids) >= self._options.max_length:
            raise ValueError(
                f"prompts[{index}]: {len(ids)} tokens, must be fewer than "
                f"max_length={self._options.max_length}; {self._truncation(params)}"
            )
        return ids

    def _truncation(self, params: SamplingParams) -> str:
        """Advice that leaves room for the output asked for, but at most half of the longest sequence."""
        longest = self._options.longest_sequence
        room = min(longest // 2, params.max_tokens or longest)
        keep = longest - room
        return f"truncate_prompt_tokens={keep} would keep the last {keep} and leave room for {room} of output"

    def _completions(
        self,
        index: int,
        ids: list[int],
        params: SamplingParams,
        priority: int,
        channel: Channel,
        group: Group,
    ) -> list[Request]:
        """The requests of one prompt."""
        stop_token_ids, banned_token_ids = self._ending_tokens(params)
        max_new_tokens = self._max_new_tokens(index, ids, params)
        banned = self._bad_words(params)
        bias = self._bias(params, banned)
        several = [sequence for sequence in banned if len(sequence) > 1]
        seed = params.seed

        def masks() -> list[TokenMask]:  # each of its own, for they follow the tokens
            grammar = params.guided_decoding
            return [
                *([self._grammars.mask(grammar)] if grammar is not None else []),
                *([BadWords(several)] if several else []),
            ]

        return [
            Request(
                prompt_ids=ids,
                params=params,
                stop_token_ids=stop_token_ids,
                banned_token_ids=banned_token_ids,
                max_new_tokens=max_new_tokens,
                seed=self.draw_seed() if seed is None else (seed + i) & MAX_SEED,
                channel=channel,
                index=index,
                group=group,
                detokenizer=self._detokenizer(params),
                decode=None if self._token_bytes is None else self._token_bytes.text_of,
                bias=bias,
                masks=masks(),
                priority=priority,
                request_id=channel.request_ids[index],
            )
            for i in range(params.num_completions)
        ]

    def _ending_tokens(self, params: SamplingParams) -> tuple[frozenset[int], frozenset[int]]:
        """The tokens that end a completion, and those that must not come before `min_tokens`: end-of-sequence
        tokens also where they would end nothing."""
        check_vocabulary("stop_token_ids", params.stop_token_ids or (), self._vocab_size)
        stop_token_ids = frozenset(params.stop_token_ids or ())
        either = stop_token_ids.union(self._options.eos_token_ids)
        if params.min_tokens and len(either) > MAX_BANNED:
            raise ValueError(
                f"stop_token_ids: {len(either)} with the end-of-sequence tokens, with min_tokens at most "
                f"{MAX_BANNED} are supported"
            )
        banned = either if params.min_tokens else frozenset[int]()
        return stop_token_ids if params.ignore_eos else either, banned

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The tokens of `bad_words`, at the beginning of a text and behind a space."""
        sequences: list[list[int]] = []
        for word in params.bad_words or ():
            if self._processor is None:
                raise ValueError(f"bad_words={params.bad_words!r}: need a processor")
            for text in (word.lstrip() or word, " " + word.lstrip()):
                sequence = self._processor.encode(valid_text("bad_words", text), add_special_tokens=False)
                if sequence not in sequences:
                    sequences.append(sequence)
        return sequences

    def _bias(self, params: SamplingParams, banned: Sequence[Sequence[int]]) -> dict[int, float]:
        """What is added to single tokens' logits."""
        bias: dict[int, float] = dict(params.logit_bias or ())
        check_vocabulary("logit_bias", bias, self._vocab_size)
        allowed = params.allowed_token_ids
        check_vocabulary("allowed_token_ids", allowed or (), self._vocab_size)
        forbidden = {sequence[0] for sequence in banned if len(sequence) == 1}
        if allowed is not None and forbidden.issuperset(allowed):
            raise ValueError(f"allowed_token_ids={list(allowed)}: all of them are bad_words, none is left")
        return bias | dict.fromkeys(forbidden, -math.inf)

    def _max_new_tokens(self, index: int, ids: list[int], params: SamplingParams) -> int:
        """How many tokens may be generated: as many as asked for, within `max_length`; None asks for all."""
        options = self._options
        room = options.longest_sequence - len(ids)
        if params.max_tokens is None:
            wanted = max(1, room)
        else:
            wanted = min(params.max_tokens, options.max_length - len(ids))
        if wanted > room:
            needed = -(-(len(ids) + wanted - 1) // options.page_size)
            advice = f"max_tokens={room} would fit" if room > 0 else self._truncation(params)
            cache = "the whole cache has"
            if options.num_replicas > 1:
                cache = f"each of {options.num_replicas} replicas has its share of"
            raise ValueError(
                f"prompts[{index}]: its {len(ids)} tokens and {wanted} of output need {needed} pages of "
                f"{options.page_size} tokens, {cache} num_pages={options.num_pages}; {advice}, "
                "or build the engine with more pages"
            )
        return wanted

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

    def draw_seed(self) -> int:
        """64 bits, others at every call; the same ones in every engine with the same seed."""
        entropy = [self._options.seed, next(self._count)]
        high, low = np.random.SeedSequence(entropy).generate_state(2).tolist()
        return high << 32 | low
