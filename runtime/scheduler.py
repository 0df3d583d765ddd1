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

Replicas, of which there is one unless the mesh says otherwise, have rows and pages of their own and share the
queue and the steps: a request is admitted by the one where the pages in use and those that it would have to
fill are the fewest, so that load is spread, and a prefix is looked for where it is cached. Who has lost its
pages may come back to another one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .channel import FinishReason
from .page_pool import PagePool
from .replica import Prompts, Replica, insert
from .request import Request
from .step_plan import Chunk, StepPlan, StepResults


class Scheduler:
    """Plans steps and keeps account of requests, rows and pages.

    Args:
        pools: the pages of each replica's cache, as many for each.
        max_concurrent_decodes: rows of the batch: requests that hold pages at a time. Each replica has an
            equal share of them.
        max_batched_tokens: of a mixed step, in each replica, at least its rows.
        max_prefill_length: tokens of prompts in one step, in each replica; a longer prompt takes several.
        max_concurrent_prefill: prompts in one step, in each replica.
        decode_steps: tokens that one decode step makes for each request.
        priority_places: places in the queue that one step of priority is worth.
        prefix_caching: whether prefixes are looked up in the cache.
    """

    def __init__(
        self,
        *pools: PagePool,
        max_concurrent_decodes: int,
        max_batched_tokens: int,
        max_prefill_length: int,
        max_concurrent_prefill: int,
        decode_steps: int = 1,
        priority_places: int = 1024,
        prefix_caching: bool = True,
    ) -> None:
        self.pools = pools
        self.waiting: list[Request] = []  # in the order of their turns
        self.num_preemptions = 0
        self.num_computed_prompt_tokens = 0  # in planned steps, and tokens computed anew
        self.num_generated_tokens = 0
        self.num_prompt_tokens = 0  # of those admitted for the first time; and how many of these were cached
        self.num_cached_tokens = 0
        self._replicas = [
            Replica(
                index,
                pool,
                num_rows=max_concurrent_decodes // len(pools),
                decode_steps=decode_steps,
                prefix_caching=prefix_caching,
            )
            for index, pool in enumerate(pools)
        ]
        self._max_batched_tokens = max_batched_tokens
        self._max_prefill_length = max_prefill_length
        self._max_concurrent_prefill = max_concurrent_prefill
        self._priority_places = priority_places
        self._num_arrived = 0
        self._num_returning = 0  # of those that wait, how many had been admitted before

    @property
    def running(self) -> list[Request]:
        """Those that have a row; of each replica in the order of their turns."""
        return [request for replica in self._replicas for request in replica.running]

    @property
    def num_running(self) -> int:
        return sum(len(replica.running) for replica in self._replicas)

    @property
    def num_queued(self) -> int:
        """Those that wait to be admitted for the first time."""
        return len(self.waiting) - self._num_returning

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.num_running > 0

    def add(self, request: Request) -> None:
        """Queues a request.

        A step of priority lets it overtake those that came `priority_places` before it, but not all that ever
        came: so nobody waits for ever.
        """
        turn = self._num_arrived + request.priority * self._priority_places
        request.turn = turn, self._num_arrived
        self._num_arrived += 1
        insert(self.waiting, request)

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to do before the tokens of earlier steps are committed."""
        decodes: list[list[Chunk]] = []
        prompts: list[Prompts] = []
        for replica in self._replicas:
            chunks, preempted = replica.decodes()
            self._put_back(preempted)
            budget = min(self._max_batched_tokens - len(chunks), self._max_prefill_length)
            most = self._max_concurrent_prefill
            decodes.append(chunks)
            prompts.append(Prompts(replica, budget=budget, most=most, admits=not preempted))
        self._fill(prompts)
        is_mixed = any(part.chunks for part in prompts)
        planned: list[Chunk] = []
        for replica, chunks, part in zip(self._replicas, decodes, prompts, strict=True):
            if not is_mixed:
                chunks = replica.extended(chunks)  # noqa: PLW2901
            replica.count(chunks)
            planned += chunks
            planned += part.chunks
            self.num_computed_prompt_tokens += part.num_tokens
        if not planned:
            return None
        return StepPlan("mixed" if is_mixed else "decode", tuple(planned), len(self._replicas))

    def _put_back(self, preempted: Sequence[Request]) -> None:
        self.num_preemptions += len(preempted)
        self._num_returning += len(preempted)
        for request in preempted:
            insert(self.waiting, request)

    def _fill(self, prompts: Sequence[Prompts]) -> None:
        """Puts prompts into a step, of those that run and those that wait."""
        while self.waiting:
            request = self.waiting[0]
            for part in prompts:
                part.go_on(before=request.turn)
            # Where one has to wait, those behind it are not asked in this step.
            if request.num_pending or not self._admit(request, prompts):
                break
        for part in prompts:
            part.go_on()

    def _admit(self, request: Request, prompts: Sequence[Prompts]) -> bool:
        """Lets the first of those that wait into the replica that has the most room for it; False if none
        has any."""
        if len(prompts) > 1:
            prompts = sorted(prompts, key=lambda part: part.replica.cost_of(request))
        if not any(part.admit(request) for part in prompts):
            return False
        self.waiting.pop(0)
        if request.num_cached is None:
            request.num_cached = min(request.num_found, request.num_known - 1)
            request.admitted_at = time.perf_counter()
            self.num_prompt_tokens += request.num_known
            self.num_cached_tokens += request.num_cached
        else:
            self._num_returning -= 1
        return True

    @property
    def needs_tokens(self) -> bool:
        """Whether a request runs that can only go on when all of its tokens are known."""
        return any(request.num_pending for replica in self._replicas for request in replica.masked)

    def commit(self, plan: StepPlan, results: StepResults) -> list[Request]:
        """Takes the results of a step, in the order of the plans; the requests that got a token."""
        changed: list[Request] = []
        now = time.perf_counter()
        for i, ((request, start, _, num_outputs), tokens) in enumerate(
            zip(plan.chunks, results.token_ids, strict=True)
        ):
            request.num_pending -= num_outputs
            if request.finish_reason is not None:
                continue
            if results.scores is not None:
                request.take_scores(start, results.scores[i])
            if not num_outputs:
                continue
            logprobs = None if results.logprobs is None else results.logprobs[i]
            for j, token_id in enumerate(tokens[:num_outputs]):
                if request.finish_reason is None:
                    request.accept(token_id, None if logprobs is None else logprobs[j], now)
                    self.num_generated_tokens += token_id >= 0
            changed.append(request)
            if request.row >= 0:
                self._replicas[request.replica].register(request)
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
            self._replicas[request.replica].remove(request)
        else:
            self.waiting.remove(request)
            self._num_returning -= request.num_cached is not None

    def recompute(self) -> None:
        """Lets everything begin anew, after the content of the cache and all that was under way is lost."""
        for replica in self._replicas:
            running = tuple(replica.running)
            for request in running:
                replica.preempt(request)
            self._put_back(running)
            replica.pool.forget()
        for request in self.waiting:
            request.begin_anew()

    def unfinished(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def clear(self) -> list[Request]:
        """Forgets everything, whatever state an exception left it in; the requests that had not ended."""
        unfinished = self.unfinished()
        self.waiting.clear()
        for replica in self._replicas:
            replica.clear()
        self._num_returning = 0
        return unfinished
