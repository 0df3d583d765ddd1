"""Which tokens of which request run next. Plain Python, no JAX.

Each step has a budget of tokens. Whoever decodes takes one each, prompts fill the rest in chunks, so a long
prompt never holds up the others for longer than the budget says. Requests take turns in order of priority and
arrival; one is admitted when a row of the batch is free and there are pages for all tokens of it that are
known, apart from those that a prefix in the cache saves. While it decodes it takes pages as it grows. When
there are none, the running request whose turn comes last gives all of its pages back and waits again; its
tokens are computed anew later, which does not change them.

A step may be planned before the tokens of the ones before it are known: what a plan holds counts as computed,
and a token that comes for a request that has ended meanwhile is dropped. The device runs steps in order, so
pages that a request gives back may go to another one at once, and a page may be shared as soon as a step that
fills it is planned.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .channel import FinishReason
from .page_pool import PagePool
from .request import NO_TOKEN, Request
from .token_logprobs import TokenLogprobs

HEADROOM = 64  # one page in so many is left to those that run when a request is admitted


@dataclass(frozen=True)
class Chunk:
    """`length` tokens of a request, from position `start`.

    Attributes:
        num_outputs: tokens that come out of it: 0 if the prompt goes on, 1 at its end; `length` of a decode.
    """

    request: Request
    start: int
    length: int
    num_outputs: int

    @property
    def output_index(self) -> int:
        """Which of the request's generated tokens is the first to come out of this chunk, if any does."""
        return self.start + self.length - self.num_outputs + 1 - len(self.request.prompt_ids)

    @property
    def is_decode(self) -> bool:
        """Whether its first token is one that was generated, and may be known to the device alone."""
        return self.start >= self.request.num_to_prefill

    @property
    def tokens_to_score(self) -> Sequence[int]:
        """Tokens of the prompt whose log-probabilities are wanted: those that follow the chunk's own."""
        request = self.request
        if request.params.prompt_logprobs is None or self.start >= len(request.prompt_ids) - 1:
            return ()
        return request.prompt_ids[self.start + 1 : self.start + self.length + 1]


@dataclass(frozen=True)
class StepResults:
    """What came of a step, chunk by chunk.

    Attributes:
        token_ids: the tokens chosen, of which the first `num_outputs` count; -1 where none was allowed.
        logprobs: of these, where the request wants them; None if none does.
        scores: log-probabilities of `Chunk.tokens_to_score`; None if there are none.
    """

    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[TokenLogprobs] | None] | None = None
    scores: Sequence[Sequence[TokenLogprobs]] | None = None


StepKind = Literal["mixed", "decode"]


@dataclass(frozen=True)
class StepPlan:
    """One step: the next tokens of whoever decodes and, if it is mixed, chunks of prompts behind them."""

    kind: StepKind
    chunks: tuple[Chunk, ...]


class Scheduler:
    """Plans steps and keeps account of rows and pages.

    Args:
        pool: the pages of the cache.
        max_concurrent_decodes: rows of the batch: requests that hold pages at a time.
        max_batched_tokens: of a mixed step, at least the rows.
        max_prefill_length: tokens of prompts in one step; a longer prompt takes several.
        max_concurrent_prefill: prompts in one step.
        decode_steps: tokens that one decode step makes for each request.
        priority_places: places in the queue that one step of priority is worth.
        prefix_caching: whether prefixes are looked up in the cache.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_concurrent_decodes: int,
        max_batched_tokens: int,
        max_prefill_length: int,
        max_concurrent_prefill: int,
        decode_steps: int = 1,
        priority_places: int = 1024,
        prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.waiting: list[Request] = []  # both in the order of their turns
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_computed_prompt_tokens = 0  # in planned steps, and tokens computed anew
        self.num_generated_tokens = 0
        self.num_prompt_tokens = 0  # of those admitted for the first time; and how many of these were cached
        self.num_cached_tokens = 0
        self._max_batched_tokens = max_batched_tokens
        self._max_prefill_length = max_prefill_length
        self._max_concurrent_prefill = max_concurrent_prefill
        self._decode_steps = decode_steps
        self._priority_places = priority_places
        self._prefix_caching = prefix_caching
        self._num_rows = max_concurrent_decodes
        self._free_rows = list(range(max_concurrent_decodes))[::-1]
        self._num_arrived = 0
        self._num_returning = 0  # of those that wait, how many had been admitted before

    @property
    def num_queued(self) -> int:
        """Those that wait to be admitted for the first time."""
        return len(self.waiting) - self._num_returning

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request.

        A step of priority lets it overtake those that came `priority_places` before it, but not all that ever
        came: so nobody waits for ever.
        """
        turn = self._num_arrived + request.priority * self._priority_places
        request.turn = turn, self._num_arrived
        self._num_arrived += 1
        _insert(self.waiting, request)

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to do before the tokens of earlier steps are committed."""
        decodes, has_preempted = self._decodes()
        prompts = self._prompts(self._max_batched_tokens - len(decodes), admits=not has_preempted)
        if not prompts:
            decodes = [self._extended(chunk) for chunk in decodes]
        for chunk in decodes:
            self._count(chunk)
        chunks = (*decodes, *prompts)
        return StepPlan("mixed" if prompts else "decode", chunks) if chunks else None

    def _count(self, chunk: Chunk) -> None:
        """From now on its tokens are computed."""
        chunk.request.num_computed += chunk.length
        chunk.request.num_pending += chunk.num_outputs
        self._register(chunk.request)

    def _decodes(self) -> tuple[list[Chunk], bool]:
        """A token of each request that decodes, and whether one lost its pages for that."""
        chunks, has_preempted = list[Chunk](), False
        for request in tuple(self.running):
            if request.row < 0 or not request.can_decode:
                continue
            if request.masks and request.num_pending:  # what its next token may be is not known yet
                continue
            while not self._grow(request, request.num_computed + 1):
                has_preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                chunks.append(Chunk(request, request.num_computed, 1, 1))
        return chunks, has_preempted

    def _extended(self, chunk: Chunk) -> Chunk:
        """More tokens of a decode, up to `decode_steps`: as many as may come, and have pages."""
        request = chunk.request
        most = 1 if request.masks else request.max_tokens_in_cache - chunk.start
        length = max(1, min(self._decode_steps, most))
        while length > 1 and not self._grow(request, chunk.start + length):
            length -= 1
        return replace(chunk, length=length, num_outputs=length)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Gives it pages for so many tokens; False if there are not as many."""
        missing = self.pool.pages_for(num_tokens) - len(request.pages)
        if missing > 0:
            if not self.pool.can_allocate(missing):
                return False
            request.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        self._take_from(request)
        self.running.remove(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._num_returning += 1
        _insert(self.waiting, request)

    def _prompts(self, budget: int, *, admits: bool) -> list[Chunk]:
        """Chunks of prompts, of those that run and those that wait."""
        budget = min(budget, self._max_prefill_length)
        chunks = list[Chunk]()
        prefilling = [request for request in self.running if not request.is_prefilled]
        while budget > 0 and len(chunks) < self._max_concurrent_prefill:
            overtakes = self.waiting and not (prefilling and prefilling[0].turn < self.waiting[0].turn)
            request = self._admit() if overtakes and admits else None
            if request is None:
                # It is not asked again in this step: pages that those behind it fill now might let it in.
                admits = admits and not overtakes
                if not prefilling:
                    break
                request = prefilling.pop(0)
            rest = request.num_to_prefill - request.num_computed
            length = min(budget, rest)
            chunks.append(Chunk(request, request.num_computed, length, int(length == rest)))
            self._count(chunks[-1])  # at once, for the next one may begin alike
            self.num_computed_prompt_tokens += length
            budget -= length
        return chunks

    def _admit(self) -> Request | None:
        """The request whose turn it is, with a row and pages; None if it has to wait."""
        if not (self.waiting and self._free_rows):
            return None
        request, pool = self.waiting[0], self.pool
        if request.num_pending:  # a token of it is still to come
            return None
        known = request.num_known
        # The tokens of a prompt whose log-probabilities are wanted must be computed.
        scored = request.params.prompt_logprobs is not None and not request.output_ids
        shared = pool.share([] if scored else self._keys(request, known))
        missing = pool.pages_for(known) - len(shared)
        headroom = -(-pool.num_pages // HEADROOM) if self.running else 0
        if not pool.can_allocate(missing + headroom):
            pool.release(shared)
            return None
        self.waiting.pop(0)
        request.pages = shared + pool.allocate(missing)
        request.num_registered = len(shared)
        request.num_found = len(shared) * pool.page_size
        # At least one token must be computed, for the next one to come out of it.
        request.num_computed = min(request.num_found, known - 1)
        request.num_to_prefill = known
        request.row = self._free_rows.pop()
        if request.num_cached is None:
            request.num_cached = request.num_computed
            request.admitted_at = time.perf_counter()
            self.num_prompt_tokens += known
            self.num_cached_tokens += request.num_computed
        else:
            self._num_returning -= 1
        _insert(self.running, request)
        return request

    def _keys(self, request: Request, num_tokens: int) -> list[bytes]:
        return request.keys_of_full_pages(num_tokens, self.pool.page_size) if self._prefix_caching else []

    def _register(self, request: Request) -> None:
        """Lets others share the pages that are full of known tokens."""
        num_tokens = min(request.num_computed, request.num_known)
        if num_tokens // self.pool.page_size > request.num_registered:
            keys = self._keys(request, num_tokens)
            for page in range(request.num_registered, len(keys)):
                self.pool.register(request.pages[page], keys[page])
            request.num_registered = len(keys)

    @property
    def needs_tokens(self) -> bool:
        """Whether a request runs that can only go on when all of its tokens are known."""
        return any(request.masks and request.num_pending for request in self.running)

    def commit(self, plan: StepPlan, results: StepResults) -> list[Request]:
        """Takes the results of a step, in the order of the plans; the requests that got a token."""
        changed: list[Request] = []
        for i, (chunk, tokens) in enumerate(zip(plan.chunks, results.token_ids, strict=True)):
            request = chunk.request
            request.num_pending -= chunk.num_outputs
            if request.finish_reason is not None:
                continue
            if results.scores is not None:
                request.take_scores(chunk.start, results.scores[i])
            if not chunk.num_outputs:
                continue
            logprobs = None if results.logprobs is None else results.logprobs[i]
            for j, token_id in enumerate(tokens[: chunk.num_outputs]):
                if request.finish_reason is None:
                    request.accept(token_id, None if logprobs is None else logprobs[j])
                    self.num_generated_tokens += token_id != NO_TOKEN
            changed.append(request)
            if request.row >= 0:
                self._register(request)
            if request.finish_reason is not None:
                self._retire(request)
        return changed

    def abort(self, request: Request, reason: FinishReason = "abort") -> bool:
        """Ends a request wherever it stands; False if it had ended already."""
        if request.finish_reason is not None:
            return False
        request.finish(reason)
        self._retire(request)
        return True

    def drop(self, request: Request) -> None:
        """Takes out a request that has failed, in whatever state; nothing more is done with its text."""
        request.finish_reason = "abort"
        self._retire(request)

    def _retire(self, request: Request) -> None:
        request.ended_at = time.perf_counter()
        if request.row >= 0:
            self._take_from(request)
            self.running.remove(request)
        else:
            self.waiting.remove(request)
            self._num_returning -= request.num_cached is not None

    def _take_from(self, request: Request) -> None:
        """Its pages and its row."""
        self.pool.release(request.pages)
        self._free_rows.append(request.row)
        request.pages, request.row, request.num_computed, request.num_registered = [], -1, 0, 0

    def recompute(self) -> None:
        """Lets everything begin anew, after the content of the cache and all that was under way is lost."""
        for request in tuple(self.running):
            self._preempt(request)
        for request in self.waiting:
            request.num_pending = 0
        self.pool.forget()

    def unfinished(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def clear(self) -> list[Request]:
        """Forgets everything, whatever state an exception left it in; the requests that had not ended."""
        unfinished = self.unfinished()
        self.waiting.clear()
        self.running.clear()
        self.pool.clear()
        self._num_returning = 0
        self._free_rows = list(range(self._num_rows))[::-1]
        return unfinished


def _insert(requests: list[Request], request: Request) -> None:
    insort(requests, request, key=lambda other: other.turn)
