"""A scheduler, a device that runs its plans, and what must always be true; without a model."""

from __future__ import annotations

import threading
from collections import deque
from functools import cache
from itertools import accumulate
from typing import Any

from vsurge.runtime.channel import Channel
from vsurge.runtime.page_pool import PagePool, chained
from vsurge.runtime.request import Request
from vsurge.runtime.sampling_params import SamplingParams
from vsurge.runtime.scheduler import Scheduler
from vsurge.runtime.step_plan import Chunk, StepKind, StepPlan, StepResults
from vsurge.runtime.token_logprobs import TokenLogprobs
from vsurge.runtime.token_mask import Words

from .chunks import output_index

PAGE_SIZE = 4
STOP_TOKEN = 999


def token_of(request: Request, index: int) -> int:
    """The script: what it is given depends on its prompt alone, and its seed says after how many it stops."""
    stops = index + 1 == request.seed
    return STOP_TOKEN if stops else (sum(request.prompt_ids) * 13 + index) % 900


def tokens_of(request: Request) -> list[int]:
    """All tokens that it could ever have in the cache."""
    return [*request.prompt_ids, *(token_of(request, i) for i in range(request.max_new_tokens))]


@cache
def params_of(max_tokens: int, scored: bool) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scored else None)


@cache
def likelihood_of(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token_id), 1, (), ())


class AnyToken:
    """A mask that forbids nothing; who has one can only go on from known tokens."""

    is_complete = False

    def check(self) -> None:
        pass

    def advance(self, token_id: int) -> None:
        pass

    def restrict(self, words: Words) -> None:
        pass


class World:
    """A scheduler, a device that runs its plans in order and answers late, and what must always be true.

    Each of several replicas has so many pages and rows.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        rows: int,
        replicas: int = 1,
        budget: int,
        prompts: int = 100,
        prefill_length: int = 100,
        lag: int = 1,
        decode_steps: int = 1,
        **options: Any,
    ) -> None:
        self.pools = [PagePool(num_pages, PAGE_SIZE) for _ in range(replicas)]
        self.pool = self.pools[0]
        self.budget = max(budget, rows)
        self.scheduler = Scheduler(
            *self.pools,
            max_concurrent_decodes=rows * replicas,
            max_batched_tokens=self.budget,
            max_concurrent_prefill=prompts,
            max_prefill_length=prefill_length,
            decode_steps=decode_steps,
            **options,
        )
        self.rows, self.prompts, self.prefill_length, self.lag = rows, prompts, prefill_length, lag
        self.decode_steps = decode_steps
        self.on_device: deque[tuple[StepPlan, StepResults]] = deque()
        self.requests: list[Request] = []
        self.ended: list[int] = []
        self.failed: set[int] = set()
        self.computed: dict[int, int] = {}
        # Of each replica: (page, offset) -> all tokens up to this one, hashed
        self.content: list[dict[tuple[int, int], bytes]] = [{} for _ in range(replicas)]
        self.keys: list[list[bytes]] = []  # what should stand there, of each request
        self.num_steps = 0

    def submit(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        stop_after: int = 0,
        priority: int = 0,
        *,
        masked: bool = False,
        scored: bool = False,
    ) -> Request | None:
        request = Request(
            prompt_ids=prompt_ids,
            params=params_of(max_new_tokens, scored),
            stop_token_ids=frozenset([STOP_TOKEN]),
            max_new_tokens=max_new_tokens,
            seed=stop_after,
            channel=Channel([], [], threading.RLock()),
            index=len(self.requests),
            detokenizer=None,
            masks=[AnyToken()] if masked else [],
            priority=priority,
        )
        if self.pool.pages_for(request.max_tokens_in_cache) > self.pool.num_pages:
            return None  # refused at the door
        self.requests.append(request)
        hashed = accumulate(tokens_of(request), lambda key, token: chained(key, [token]), initial=b"")
        self.keys.append(list(hashed)[1:])
        self.scheduler.add(request)
        return request

    def continue_chat(self, choice: int, max_new_tokens: int) -> None:
        """The next turn: an earlier prompt, its answer, and a question."""
        if self.requests:
            before = self.requests[choice % len(self.requests)]
            self.submit([*before.prompt_ids, *before.output_ids, 7], max_new_tokens)

    def abort(self, choice: int) -> None:
        if self.requests:
            request = self.requests[choice % len(self.requests)]
            had_ended = request.finish_reason is not None
            assert self.scheduler.abort(request) is not had_ended
            if not had_ended:
                assert request.finish_reason == "abort"
                self.ended.append(request.index)
            self.check()

    def fault(self) -> None:
        """The oldest step that is under way fails, and all later ones with it."""
        if self.on_device:
            plan, _ = self.on_device.popleft()
            self.on_device.clear()
            for chunk in plan.chunks:
                if self.scheduler.abort(chunk.request):
                    self.ended.append(chunk.request.index)
            self.scheduler.recompute()
            for content in self.content:
                content.clear()
            self.computed.clear()
            self.check()

    def step(self) -> StepPlan | None:
        before = {r.index: r.num_preemptions for r in self.scheduler.running}
        may_decode = [r for r in self.scheduler.running if r.can_decode and not (r.masks and r.num_pending)]
        plan = self.scheduler.plan()
        for index, num_preemptions in before.items():
            if self.requests[index].num_preemptions != num_preemptions:
                self.computed.pop(index)
        if plan is not None:
            self.num_steps += 1
            assert plan.chunks
            for replica, chunks in enumerate(plan.parts):
                kept = [
                    r for r in may_decode if r.replica == replica and r.num_preemptions == before[r.index]
                ]
                self.check_part(plan.kind, chunks, kept)
            assert (plan.kind == "mixed") is any(not chunk.is_decode for chunk in plan.chunks)
            self.check_order(set(before))
            self.run(plan)
            tokens = [
                [
                    token_of(c.request, output_index(c) + i) if i < c.num_outputs else -1
                    for i in range(c.length)
                ]
                for c in plan.chunks
            ]
            scores = [[likelihood_of(token) for token in c.tokens_to_score] for c in plan.chunks]
            self.on_device.append((plan, StepResults(tokens, scores=scores)))
        while self.on_device and (plan is None or len(self.on_device) > self.lag):
            changed = self.scheduler.commit(*self.on_device.popleft())
            assert len(set(map(id, changed))) == len(changed)
            self.ended += [r.index for r in changed if r.finish_reason is not None]
        self.check()
        return plan

    def check_part(self, kind: StepKind, chunks: tuple[Chunk, ...], may_decode: list[Request]) -> None:
        """A replica's part of a plan."""
        requests = [chunk.request for chunk in chunks]
        decodes = [chunk for chunk in chunks if chunk.is_decode]
        prompts = [chunk for chunk in chunks if not chunk.is_decode]
        assert len({r.index for r in requests}) == len(requests) <= self.rows
        assert all(r.finish_reason is None for r in requests)
        assert chunks == (*decodes, *prompts)
        for part in (decodes, prompts):
            assert [c.request.turn for c in part] == sorted(c.request.turn for c in part)
        # Nothing holds up a decode but pages that are not there.
        assert [c.request for c in decodes] == may_decode
        assert len(prompts) <= self.prompts
        assert sum(chunk.length for chunk in prompts) <= self.prefill_length
        if kind == "mixed":
            assert sum(chunk.length for chunk in chunks) <= self.budget
            assert all(chunk.length == 1 for chunk in decodes)
        else:
            assert all(1 <= chunk.length <= self.decode_steps for chunk in decodes)
        for chunk in chunks:
            request, end = chunk.request, chunk.start + chunk.length
            if request.index in self.computed:  # no token is left out, none is computed twice
                assert chunk.start == self.computed[request.index]
            else:  # what was found in the cache are whole pages; the last token is computed in any case
                assert request.num_found % PAGE_SIZE == 0
                assert chunk.start == min(request.num_found, request.num_known - 1)
            self.computed[request.index] = end
            assert end <= len(request.pages) * PAGE_SIZE
            assert end <= request.max_tokens_in_cache
            if request.masks:
                assert chunk.start + chunk.length == request.num_known or not chunk.num_outputs
                assert chunk.num_outputs <= 1
            if chunk.is_decode:
                assert chunk.num_outputs == chunk.length
            else:
                assert end <= request.num_known
                assert chunk.num_outputs == (end == request.num_known)

    def run(self, plan: StepPlan) -> None:
        """Writes a step's tokens, then reads for each what it sees, as a model would."""
        for chunk in plan.chunks:
            request, end = chunk.request, chunk.start + chunk.length
            keys, content = self.keys[request.index], self.content[request.replica]
            for position in range(max(chunk.start, request.num_found), end):
                content[request.pages[position // PAGE_SIZE], position % PAGE_SIZE] = keys[position]
        for chunk in plan.chunks:
            request, end = chunk.request, chunk.start + chunk.length
            content = self.content[request.replica]
            slots = [(page, offset) for page in request.pages for offset in range(PAGE_SIZE)]
            assert [content[slot] for slot in slots[:end]] == self.keys[request.index][:end]

    def check_order(self, ran: set[int]) -> None:
        """Whoever was admitted came before all who still wait."""
        admitted = [r.turn for r in self.scheduler.running if r.index not in ran]
        waiting = [r.turn for r in self.scheduler.waiting]
        assert not admitted or not waiting or max(admitted) < min(waiting)

    def check(self) -> None:
        for replica, pool in enumerate(self.pools):
            running = [request for request in self.scheduler.running if request.replica == replica]
            pool.check_integrity([request.pages for request in running])
            assert pool.num_used + pool.num_free + pool.num_cached == pool.num_pages
            rows = [request.row for request in running]
            assert len(set(rows)) == len(rows) <= self.rows
            assert all(0 <= row < self.rows for row in rows)
        assert self.scheduler.num_running == len(self.scheduler.running)
        assert all(request.row == -1 and not request.pages for request in self.scheduler.waiting)
        assert self.scheduler.num_queued == sum(r.num_cached is None for r in self.scheduler.waiting)

    def run_to_the_end(self) -> None:
        # Of those that run, the one whose turn is first is never stopped; so each needs these steps at most.
        left = sum(len(r.prompt_ids) + 2 * r.max_new_tokens for r in self.scheduler.unfinished())
        for _ in range((self.lag + 1) * left + self.lag + 1):
            if not self.scheduler.has_work and not self.on_device:
                break
            self.step()
        assert not self.scheduler.has_work
        self.check_the_end()

    def check_the_end(self) -> None:
        assert sorted(self.ended) == list(range(len(self.requests)))
        assert all(pool.num_used == 0 for pool in self.pools)
        for request in self.requests:
            expected = [token_of(request, i) for i in range(len(request.output_ids))]
            assert request.output_ids == expected
            stopped = request.output_ids[-1:] == [STOP_TOKEN]
            if request.finish_reason == "stop":
                assert stopped
            elif request.finish_reason == "length":
                assert not stopped
                assert len(request.output_ids) == request.max_new_tokens
            assert len(request.output_ids) <= request.max_new_tokens
            if request.params.prompt_logprobs is not None and request.output_ids:
                assert request.prompt_logprobs[0] is None
                known = [of for of in request.prompt_logprobs if of is not None]
                found = [(token, each.logprob) for of in known for token, each in of.items()]
                assert found == [(token, -float(token)) for token in request.prompt_ids[1:]]
