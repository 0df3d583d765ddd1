"""Which tokens of which request run next. Plain Python, no JAX.

A request waits until a row of the batch is free and the pool has pages for all it may ever need, so that
nothing that runs can run out of them. Requests start in order of arrival. Prefill and decode steps take turns
while both have work, so a long prompt, fed in chunks, never holds up the others for more than a chunk.

A step may be planned before the tokens of the one before it are known: what a plan holds counts as computed,
and a token that comes for a request that has ended meanwhile is dropped. The device runs steps in order, so
pages that a request gives back may go to another one at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .page_pool import PagePool
from .request import Request


@dataclass(frozen=True)
class Chunk:
    """`length` tokens of a request, from position `start`."""

    request: Request
    start: int
    length: int

    @property
    def output_index(self) -> int:
        """Which of the request's generated tokens comes out of this chunk; negative if the prompt goes on."""
        return self.start + self.length - len(self.request.prompt_ids)

    @property
    def completes(self) -> bool:
        """Whether a token comes out of this chunk."""
        return self.output_index >= 0


StepKind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class StepPlan:
    """One step: chunks of prompts, or one token of each running request."""

    kind: StepKind
    chunks: tuple[Chunk, ...]


class Scheduler:
    """Plans steps and keeps account of rows and pages.

    Args:
        pool: the pages of the cache.
        max_concurrent_decodes: rows of the batch: requests that hold pages at a time.
        max_concurrent_prefill: prompts in one prefill step.
        max_prefill_length: tokens in one prefill step; a longer prompt takes several.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_concurrent_decodes: int,
        max_concurrent_prefill: int,
        max_prefill_length: int,
    ) -> None:
        self.pool = pool
        self.max_concurrent_prefill = max_concurrent_prefill
        self.max_prefill_length = max_prefill_length
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self._num_rows = max_concurrent_decodes
        self._free_rows = list(range(max_concurrent_decodes))[::-1]
        self._prefilled_last = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to do before the tokens of earlier steps are committed."""
        plan = self._next_plan()
        for chunk in () if plan is None else plan.chunks:
            chunk.request.num_computed += chunk.length
        return plan

    def _next_plan(self) -> StepPlan | None:
        self._admit()
        decodes = [request for request in self.running if request.can_decode]
        if not (decodes and self._prefilled_last):
            chunks = self._prefill_chunks()
            if chunks:
                self._prefilled_last = True
                return StepPlan("prefill", chunks)
        self._prefilled_last = False
        if decodes:
            return StepPlan("decode", tuple(Chunk(r, r.num_computed, 1) for r in decodes))
        return None

    def _admit(self) -> None:
        while self.waiting and self._free_rows:
            num_pages = self.pool.pages_for(self.waiting[0].max_tokens_in_cache)
            if not self.pool.can_allocate(num_pages):
                return
            request = self.waiting.popleft()
            request.pages = self.pool.allocate(num_pages)
            request.row = self._free_rows.pop()
            self.running.append(request)

    def _prefill_chunks(self) -> tuple[Chunk, ...]:
        chunks: list[Chunk] = []
        budget = self.max_prefill_length
        for request in self.running:
            if len(chunks) == self.max_concurrent_prefill or not budget:
                break
            if not request.is_prefilled:
                length = min(budget, len(request.prompt_ids) - request.num_computed)
                chunks.append(Chunk(request, request.num_computed, length))
                budget -= length
        return tuple(chunks)

    def commit(self, plan: StepPlan, token_ids: Sequence[int]) -> list[Request]:
        """Takes the tokens of a step, one per chunk, in the order of the plans; requests that got one.

        The token of a chunk that does not complete its prompt means nothing and is ignored, as is one of a
        request that has ended.
        """
        changed: list[Request] = []
        for chunk, token_id in zip(plan.chunks, token_ids, strict=True):
            request = chunk.request
            if chunk.completes and request.finish_reason is None:
                request.accept(token_id)
                changed.append(request)
                if request.finish_reason is not None:
                    self._retire(request)
        return changed

    def abort(self, request: Request) -> bool:
        """Ends a request wherever it stands; False if it had ended already."""
        if request.finish_reason is not None:
            return False
        request.finish("abort")
        if request in self.running:
            self._retire(request)
        else:
            self.waiting.remove(request)
        return True

    def _retire(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.release(request.pages)
        self._free_rows.append(request.row)
        request.pages, request.row = [], -1

    def unfinished(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def clear(self) -> list[Request]:
        """Forgets everything, whatever state an exception left it in; the requests that had not ended."""
        unfinished = self.unfinished()
        self.waiting.clear()
        self.running.clear()
        self.pool.clear()
        self._free_rows = list(range(self._num_rows))[::-1]
        self._prefilled_last = False
        return unfinished
