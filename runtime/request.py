"""One completion's way through the engine, and those of one prompt together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from .channel import Channel, FinishReason
from .detokenizer import Detokenizer, Transcript
from .page_pool import chained
from .progress import GroupProgress, Output, Progress
from .sampling_params import SamplingParams
from .token_logprobs import Logprob, TokenLogprobs
from .token_mask import MaskError, TokenMask

NO_TOKEN, NOT_FINITE = -1, -2  # what a step gives where no token was allowed, or a logit was NaN or infinite


class LogitsError(RuntimeError):
    """A model has computed no distribution to choose a token from."""


@dataclass(eq=False, slots=True)
class Request:
    """One completion of a prompt, and where it stands. Owned by the engine's thread.

    Attributes:
        prompt_ids: the prompt's tokens.
        params: how to sample, and when to end.
        stop_token_ids: tokens that end it: `params.stop_token_ids` and, unless ignored, end-of-sequence.
        banned_token_ids: tokens that are not chosen before `params.min_tokens`.
        max_new_tokens: `params.max_tokens` and `max_length` together.
        seed: of its random numbers, 64 bits.
        channel, index: where its samples go, and which of the channel's prompts it is.
        group: the completions of that prompt, this one among them.
        detokenizer: None if no text is wanted.
        decode: the text of one token, for its log-probabilities; None without a processor.
        bias: what is added to the logits of single tokens; -inf forbids.
        masks: which tokens may be next, as a function of those before.
        priority: those with a smaller one go first.
        request_id: what its caller may abort it by; unlike that of any other prompt.
        deadline: when it ends with "timeout", on the clock of `submitted_at`; None for never.
        turn: its place in the queue; smaller ones are served first, and are the last to lose their pages.
        failure: why it cannot go on, though its step was in order; its callers get that.
        output_ids: generated tokens.
        logprobs: of these, if they are wanted.
        prompt_logprobs: of the prompt's, as far as they are known; the first token has none.
        cumulative_logprob: the sum over the generated tokens, if they are wanted.
        num_computed: tokens whose keys and values are in the cache once all planned steps have run.
        num_found: tokens whose keys and values were in the cache when it was admitted; they are not written
            again, though the last one may be computed again.
        num_to_prefill: tokens that were known when it was admitted: after them it decodes.
        num_cached: tokens of the prompt that it found in the cache when it was first admitted; None before.
        num_preemptions: how often it lost its pages and was put back into the queue.
        num_pending: tokens that planned steps will bring.
        replica: which replica it runs on, or ran on last.
        row: its row in that replica's batch while it runs.
        pages: its pages of that replica's cache, in order.
        page_keys: see `keys_of_full_pages`.
        num_registered: pages that the pool knows by their keys.
        full_at: with how many tokens in the cache the next of its pages is full.
        max_tokens_in_cache: the most tokens of it that the cache will ever hold: the last one is never fed
            back.
        wants_logprobs: whether those of its tokens are wanted; the best of several completions are found by
            them.
        waits_for_the_end: whether nothing is handed out before all completions of the prompt have ended.
        watched: the detokenizer, if its text may end the completion; otherwise the readers have it.
        num_without_text: of the generated tokens, those at the end whose text is not wanted.
    """

    prompt_ids: list[int]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    max_new_tokens: int
    seed: int
    channel: Channel
    index: int
    detokenizer: Detokenizer | None
    group: Group = field(default_factory=lambda: Group())  # noqa: PLW0108
    banned_token_ids: frozenset[int] = frozenset()
    decode: Callable[[int], str] | None = None
    bias: dict[int, float] = field(default_factory=dict[int, float])
    masks: Sequence[TokenMask] = ()
    priority: int = 0
    request_id: str = ""
    deadline: float | None = None
    turn: tuple[int, int] = (0, 0)
    submitted_at: float = field(default_factory=time.perf_counter)
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    finish_reason: FinishReason | None = None
    failure: MaskError | LogitsError | None = None
    output_ids: list[int] = field(default_factory=list[int])
    logprobs: list[dict[int, Logprob]] = field(default_factory=list[dict[int, Logprob]])
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    cumulative_logprob: float = 0.0
    num_computed: int = 0
    num_found: int = 0
    num_to_prefill: int = 0
    num_cached: int | None = None
    num_preemptions: int = 0
    num_pending: int = 0
    replica: int = 0
    row: int = -1
    pages: list[int] = field(default_factory=list[int])
    page_keys: list[bytes] = field(default_factory=list[bytes])
    num_registered: int = 0
    full_at: int = 0
    max_tokens_in_cache: int = field(init=False)
    wants_logprobs: bool = field(init=False)
    waits_for_the_end: bool = field(init=False)
    watched: Detokenizer | None = field(init=False)
    num_without_text: int = 0
    _output: Output = field(init=False)

    def __post_init__(self) -> None:
        self.group.requests.append(self)
        params = self.params
        self.max_tokens_in_cache = len(self.prompt_ids) + self.max_new_tokens - 1
        has_spare = params.num_completions > params.n  # completions, of which only the best are handed out
        self.wants_logprobs = params.logprobs is not None or has_spare
        self.waits_for_the_end = params.output_kind == "final_only" or has_spare
        text = self.detokenizer
        self.watched = text if text is not None and text.has_stop_strings else None
        self._output = Output(
            self.request_id,
            len(self.prompt_ids),
            self.submitted_at,
            self.output_ids,
            text if text is None or self.watched is not None else Transcript(text, self.output_ids),
            None if params.logprobs is None else self.logprobs,
            None if params.prompt_logprobs is None else self.prompt_logprobs,
        )

    @property
    def is_biased(self) -> bool:
        """Whether anything is added to its logits, or only some tokens are allowed."""
        return bool(self.bias) or self.params.allowed_token_ids is not None

    @property
    def num_known(self) -> int:
        """Tokens of the prompt and those that were read back from the device."""
        return len(self.prompt_ids) + len(self.output_ids)

    def known_tokens(self, start: int, stop: int) -> Sequence[int]:
        """The tokens of positions start to stop, all of them known."""
        length = len(self.prompt_ids)
        if stop <= length:
            return self.prompt_ids[start:stop]
        return [*self.prompt_ids[start:], *self.output_ids[max(0, start - length) : stop - length]]

    def keys_of_full_pages(self, num_tokens: int, page_size: int) -> list[bytes]:
        """The keys of the pages that the first tokens fill; all of these tokens must be known."""
        keys = self.page_keys
        for page in range(len(keys), num_tokens // page_size):
            tokens = self.known_tokens(page * page_size, (page + 1) * page_size)
            keys.append(chained(keys[-1] if keys else b"", tokens))
        return keys[: num_tokens // page_size]

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= self.num_to_prefill

    @property
    def can_decode(self) -> bool:
        """Whether another token may be planned; each needs the one before it in the cache."""
        return self.num_to_prefill <= self.num_computed < self.max_tokens_in_cache

    def take_scores(self, start: int, scores: Sequence[TokenLogprobs]) -> None:
        """Takes the log-probabilities of the prompt's tokens behind position `start`, if they are new."""
        for position, score in enumerate(scores, start + 1):
            if position == len(self.prompt_logprobs):  # it may have been taken before its pages were lost
                found = score.of(self.prompt_ids[position], self.params.prompt_logprobs or 0, self.decode)
                self.prompt_logprobs.append(found)

    def begin_anew(self) -> None:
        """All is computed again from the tokens that are known, perhaps with other weights.

        Log-probabilities of the prompt stay only beside output, which was drawn from the same weights.
        """
        self.num_pending = 0
        if not self.output_ids and len(self.prompt_logprobs) > 1:
            self.prompt_logprobs = [None]  # another list, for readers may look at this one
            self._output = replace(self._output, prompt_logprobs=self.prompt_logprobs)

    def accept(self, token_id: int, logprobs: TokenLogprobs | None, at: float) -> None:
        """Takes a generated token, read at that moment, and finds out whether it is the last; none at all
        ends it as well, and so do logits that are no numbers."""
        if token_id < 0:
            self._end_without(token_id)
            return
        self.last_token_at = at
        if self.first_token_at is None:
            self.first_token_at = at
        self.output_ids.append(token_id)
        num_generated = len(self.output_ids)
        if logprobs is not None:
            self.cumulative_logprob += logprobs.chosen
            if self.params.logprobs is not None:
                self.logprobs.append(logprobs.of(token_id, self.params.logprobs, self.decode))
        if self.masks and not self._masks_can(lambda mask: mask.advance(token_id)):
            return
        watched = self.watched
        if token_id in self.stop_token_ids:
            if not self.params.include_stop_str_in_output:
                self.num_without_text = 1
            elif watched is not None:
                watched.add(token_id, may_stop=False)
            self.finish("stop")
        elif watched is not None and watched.add(token_id, may_stop=num_generated > self.params.min_tokens):
            self.finish_reason = "stop"
        elif self.masks and any(mask.is_complete for mask in self.masks):
            self.finish("stop")
        elif num_generated >= self.max_new_tokens:
            self.finish("length")

    def _masks_can(self, do: Callable[[TokenMask], None]) -> bool:
        """Whether all of them could do it; if not, that has ended it."""
        try:
            for mask in self.masks:
                do(mask)
        except MaskError as failure:
            self.failure = failure
            self.finish("abort")
            return False
        return True

    def _end_without(self, token_id: int) -> None:
        """Ends it where a step gave `NO_TOKEN` or `NOT_FINITE`."""
        if token_id == NO_TOKEN:
            if self._masks_can(lambda mask: mask.check()):
                self.finish("stop")
            return
        self.failure = LogitsError(
            f"the model's logits after {self.num_known} tokens hold NaN or infinity: its weights do, or "
            "numbers overflow on the way"
        )
        self.finish("abort")

    def finish(self, reason: FinishReason) -> None:
        """Ends it, with all the text it has."""
        self.finish_reason = reason
        if self.watched is not None:
            self.watched.finish()

    def let_go(self) -> None:
        """After its end: it and its group have each other, and neither would be freed before the other."""
        if self.group.is_finished:
            self.group.requests.clear()

    def progress(self) -> Progress:
        """How far it has come now."""
        num_tokens, watched = len(self.output_ids), self.watched
        return Progress(
            self._output,
            num_tokens,
            num_tokens - self.num_without_text if watched is None else watched.num_characters,
            len(self.prompt_logprobs),
            self.admitted_at,
            self.first_token_at,
            self.last_token_at,
            self.ended_at,
            self.finish_reason,
            self.num_cached or 0,
            self.num_preemptions,
            self.cumulative_logprob if self.wants_logprobs else None,
        )

    def nothing(self) -> Progress:
        """What `progress` was before anything had come."""
        return Progress(self._output, 0, 0, 0, None, None, None, None, None, 0, 0, None)


@dataclass(eq=False, slots=True)
class Group:
    """The completions of one prompt, `n` or `best_of` of them.

    Attributes:
        requests: one for each.
    """

    requests: list[Request] = field(default_factory=list[Request])

    @property
    def is_due(self) -> bool:
        """Whether what there is may be handed out."""
        return not self.requests[0].waits_for_the_end or self.is_finished

    @property
    def is_finished(self) -> bool:
        return all(request.finish_reason is not None for request in self.requests)

    def progress(self) -> Progress | GroupProgress:
        """How far the prompt has come for its callers; of several completions, the likeliest ones."""
        requests, n = self.requests, self.requests[0].params.n
        if not self.is_due:
            completions = tuple(request.nothing() for request in requests[:n])
        elif len(requests) > n:
            likeliest = sorted(requests, key=lambda request: request.cumulative_logprob, reverse=True)
            completions = tuple(request.progress() for request in likeliest[:n])
        else:
            completions = tuple(request.progress() for request in requests)
        return completions[0] if n == 1 else GroupProgress(completions)
