"""The scheduler and the page pool under random arrivals, prefixes, aborts and faults, without a model."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsurge.runtime.channel import Channel
from vsurge.runtime.page_pool import PagePool, chained
from vsurge.runtime.request import Request
from vsurge.runtime.sampling_params import SamplingParams
from vsurge.runtime.scheduler import Scheduler, StepPlan

PAGE_SIZE = 4
STOP_TOKEN = 999
EXAMPLES = int(os.environ.get("VSURGE_FUZZ_EXAMPLES", "600"))  # of some 170 steps each


def token_of(request: Request, output_index: int) -> int:
    """The script: what it is given depends on its prompt alone, and its seed says after how many it stops."""
    stops = output_index + 1 == request.seed
    return STOP_TOKEN if stops else (sum(request.prompt_ids) * 13 + output_index) % 900


def tokens_of(request: Request) -> list[int]:
    """All tokens that it could ever have in the cache."""
    return [*request.prompt_ids, *(token_of(request, i) for i in range(request.max_new_tokens))]


class World:
    """A scheduler, a device that runs its plans in order and answers late, and what must always be true."""

    def __init__(
        self,
        *,
        num_pages: int,
        rows: int,
        budget: int,
        prompts: int = 100,
        prefill_length: int = 100,
        lag: int = 1,
        decode_steps: int = 1,
        **options: Any,
    ) -> None:
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.budget = max(budget, rows)
        self.scheduler = Scheduler(
            self.pool,
            max_concurrent_decodes=rows,
            max_batched_tokens=self.budget,
            max_concurrent_prefill=prompts,
            max_prefill_length=prefill_length,
            decode_steps=decode_steps,
            **options,
        )
        self.rows, self.prompts, self.prefill_length, self.lag = rows, prompts, prefill_length, lag
        self.decode_steps = decode_steps
        self.on_device: deque[tuple[StepPlan, list[list[int]]]] = deque()
        self.requests: list[Request] = []
        self.ended: list[int] = []
        self.failed: set[int] = set()
        self.computed: dict[int, int] = {}
        self.content: dict[tuple[int, int], bytes] = {}  # (page, offset) -> all tokens up to this one, hashed
        self.num_steps = 0

    def submit(
        self, prompt_ids: list[int], max_new_tokens: int, stop_after: int = 0, priority: int = 0
    ) -> Request | None:
        request = Request(
            prompt_ids=prompt_ids,
            params=SamplingParams(max_tokens=max_new_tokens),
            stop_token_ids=frozenset([STOP_TOKEN]),
            max_new_tokens=max_new_tokens,
            seed=stop_after,
            channel=Channel([]),
            index=len(self.requests),
            detokenizer=None,
            priority=priority,
        )
        if self.pool.pages_for(request.max_tokens_in_cache) > self.pool.num_pages:
            return None  # refused at the door
        self.requests.append(request)
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
            self.content.clear()
            self.computed.clear()
            self.check()

    def step(self) -> StepPlan | None:
        before = {r.index: r.num_preemptions for r in self.scheduler.running}
        may_decode = [r for r in self.scheduler.running if r.can_decode]
        plan = self.scheduler.plan()
        for request in self.requests:
            if request.num_preemptions != before.get(request.index, request.num_preemptions):
                self.computed.pop(request.index)
        if plan is not None:
            self.num_steps += 1
            self.check_plan(plan, may_decode)
            self.check_order(set(before))
            self.run(plan)
            tokens = [
                [
                    token_of(c.request, c.output_index + i) if i < c.num_outputs else -1
                    for i in range(c.length)
                ]
                for c in plan.chunks
            ]
            self.on_device.append((plan, tokens))
        while self.on_device and (plan is None or len(self.on_device) > self.lag):
            changed = self.scheduler.commit(*self.on_device.popleft())
            assert len(set(map(id, changed))) == len(changed)
            self.ended += [r.index for r in changed if r.finish_reason is not None]
        self.check()
        return plan

    def check_plan(self, plan: StepPlan, may_decode: list[Request]) -> None:
        requests = [chunk.request for chunk in plan.chunks]
        decodes = [chunk for chunk in plan.chunks if chunk.is_decode]
        prompts = [chunk for chunk in plan.chunks if not chunk.is_decode]
        assert requests
        assert len({r.index for r in requests}) == len(requests) <= self.rows
        assert all(r.finish_reason is None for r in requests)
        assert plan.chunks == (*decodes, *prompts)
        for part in (decodes, prompts):
            assert [c.request.turn for c in part] == sorted(c.request.turn for c in part)
        # Nothing holds up a decode but pages that are not there.
        assert [c.request for c in decodes] == [r for r in may_decode if r.row >= 0]
        if prompts:
            assert plan.kind == "mixed"
            assert len(prompts) <= self.prompts
            assert sum(chunk.length for chunk in prompts) <= self.prefill_length
            assert sum(chunk.length for chunk in plan.chunks) <= self.budget
            assert all(chunk.length == 1 for chunk in decodes)
        else:
            assert plan.kind == "decode"
            assert all(1 <= chunk.length <= self.decode_steps for chunk in decodes)
        for chunk in plan.chunks:
            request, end = chunk.request, chunk.start + chunk.length
            if request.index in self.computed:  # no token is left out, none is computed twice
                assert chunk.start == self.computed[request.index]
            else:  # what was found in the cache are whole pages
                assert chunk.start % PAGE_SIZE == 0
                assert chunk.start < request.num_known
            self.computed[request.index] = end
            assert end <= len(request.pages) * PAGE_SIZE
            assert end <= request.max_tokens_in_cache
            if chunk.is_decode:
                assert chunk.num_outputs == chunk.length
            else:
                assert end <= request.num_known
                assert chunk.num_outputs == (end == request.num_known)

    def run(self, plan: StepPlan) -> None:
        """Writes a step's tokens, then reads for each what it sees, as a model would."""
        for chunk in plan.chunks:
            tokens, key = tokens_of(chunk.request), b""
            for position in range(chunk.start + chunk.length):
                key = chained(key, [tokens[position]])
                if position >= chunk.start:
                    page, offset = divmod(position, PAGE_SIZE)
                    self.content[chunk.request.pages[page], offset] = key
        for chunk in plan.chunks:
            tokens, key = tokens_of(chunk.request), b""
            for position in range(chunk.start + chunk.length):
                key = chained(key, [tokens[position]])
                page, offset = divmod(position, PAGE_SIZE)
                assert self.content[chunk.request.pages[page], offset] == key

    def check_order(self, ran: set[int]) -> None:
        """Whoever was admitted came before all who still wait."""
        admitted = [r.turn for r in self.scheduler.running if r.index not in ran]
        waiting = [r.turn for r in self.scheduler.waiting]
        assert not admitted or not waiting or max(admitted) < min(waiting)

    def check(self) -> None:
        running, pool = self.scheduler.running, self.pool
        pool.check_integrity([request.pages for request in running])
        assert pool.num_used + pool.num_free + pool.num_cached == pool.num_pages
        rows = [request.row for request in running]
        assert len(set(rows)) == len(rows) <= self.rows
        assert all(0 <= row < self.rows for row in rows)
        assert all(request.row == -1 and not request.pages for request in self.scheduler.waiting)

    def run_to_the_end(self) -> None:
        # Of those that run, the one whose turn is first is never stopped; so each needs these steps at most.
        left = sum(len(r.prompt_ids) + 2 * r.max_new_tokens for r in self.scheduler.unfinished())
        for _ in range((self.lag + 1) * left + self.lag + 1):
            self.step()
        assert not self.scheduler.has_work
        self.check_the_end()

    def check_the_end(self) -> None:
        assert sorted(self.ended) == list(range(len(self.requests)))
        assert self.pool.num_used == 0
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


def prompt_of(family: int, shared: int, own: int, index: int) -> list[int]:
    """A prompt that begins as those of its family do."""
    return [family] * shared + [100 + index] * own


actions = st.one_of(
    st.tuples(
        st.just("submit"), st.integers(1, 3), st.integers(0, 20), st.integers(1, 12),  # the prompt
        st.integers(1, 12), st.integers(0, 14), st.integers(-2, 2),
    ),
    st.tuples(st.just("continue"), st.integers(0, 1000), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 1000)),
    st.tuples(st.just("fault")),
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.integers(1, 24), st.integers(1, 6), st.integers(1, 24), st.integers(1, 6), st.integers(1, 24),
    st.integers(0, 2), st.integers(1, 4), st.booleans(), st.lists(actions, min_size=20, max_size=80),
)  # fmt: skip
def test_every_request_ends_once_and_the_books_balance_after_every_step(
    num_pages: int,
    rows: int,
    budget: int,
    prompts: int,
    prefill_length: int,
    lag: int,
    decode_steps: int,
    prefix_caching: bool,
    todo: list[tuple[Any, ...]],
) -> None:
    world = World(
        num_pages=num_pages,
        rows=rows,
        budget=budget,
        prompts=prompts,
        prefill_length=prefill_length,
        lag=lag,
        decode_steps=decode_steps,
        prefix_caching=prefix_caching,
        priority_places=10,
    )
    for action, *values in todo:
        if action == "submit":
            family, shared, own, new, stop_after, priority = values
            prompt = prompt_of(family, shared, own, len(world.requests) % 3)
            world.submit(prompt, new, stop_after, priority)
        elif action == "continue":
            world.continue_chat(*values)
        elif action == "abort":
            world.abort(*values)
        elif action == "fault":
            world.fault()
        else:
            for _ in range(values[0]):
                world.step()
    world.run_to_the_end()
    if not prefix_caching:
        assert world.pool.num_cached == world.scheduler.num_cached_tokens == 0


def test_a_long_prompt_is_fed_beside_the_decodes_of_others() -> None:
    world = World(num_pages=50, rows=2, budget=5)
    world.submit([1, 1], 12)
    world.step()
    world.submit([2] * 32, 2)
    for start in range(0, 32, 4):
        plan = world.step()
        assert plan is not None
        assert plan.kind == "mixed"
        assert [(c.request.index, c.length, c.is_decode) for c in plan.chunks] == [
            (0, 1, True),
            (1, 4, False),
        ]
        assert plan.chunks[1].start == start


def test_several_prompts_share_a_step_unless_told_otherwise() -> None:
    for prompts in (1, 3):
        world = World(num_pages=50, rows=4, budget=20, prompts=prompts)
        for index in range(4):
            world.submit([index] * 5, 2)
        plan = world.step()
        assert plan is not None
        assert len(plan.chunks) == prompts


def test_a_prefix_is_computed_once() -> None:
    world = World(num_pages=50, rows=4, budget=64)
    prompt = list(range(1, 22))
    first = world.submit(prompt, 3)
    same = world.submit(prompt, 3)  # in the same step: its pages are written before anything is read
    assert first
    assert same
    plan = world.step()
    assert plan is not None
    assert [(c.start, c.length) for c in plan.chunks] == [(0, 21), (20, 1)]
    world.run_to_the_end()
    turn = world.submit([*prompt, *first.output_ids, 5], 3)  # the whole pages of prompt and answer
    whole = world.submit(prompt[:20], 1)  # all of it is cached: one page is computed for its last token
    assert turn
    assert whole
    world.run_to_the_end()
    assert [r.num_cached for r in world.requests] == [0, 20, 20, 16]
    assert (world.scheduler.num_prompt_tokens, world.scheduler.num_cached_tokens) == (21 + 21 + 25 + 20, 56)


@pytest.mark.parametrize(("index", "cached"), [(1, 8), (3, 8), (2, 0)])
def test_pages_of_prefixes_are_taken_least_recently_used_first(index: int, cached: int) -> None:
    world = World(num_pages=8, rows=1, budget=64)
    for used in (1, 2, 1, 3):  # two full pages each; 1 is used again
        world.submit([used] * 9, 1)
        world.run_to_the_end()
    assert world.pool.num_cached == 6
    world.submit([4] * 16, 1)  # needs four pages: two free ones, and those of 2
    world.run_to_the_end()
    again = world.submit([index] * 9, 1)
    assert again
    world.run_to_the_end()
    assert again.num_cached == cached


def test_who_came_last_gives_way_when_pages_run_out_and_loses_nothing() -> None:
    world = World(num_pages=6, rows=3, budget=64, prefix_caching=False)
    old, young = world.submit([1] * 8, 12), world.submit([2] * 8, 12)
    assert old
    assert young
    world.run_to_the_end()
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert world.scheduler.num_preemptions == 1
    assert world.ended == [0, 1]
    assert len(young.output_ids) == 12


def test_the_lower_priority_gives_way_whoever_came_first() -> None:
    world = World(num_pages=6, rows=3, budget=64, prefix_caching=False)
    old, young = world.submit([1] * 8, 12, priority=1), world.submit([2] * 8, 12)
    assert old
    assert young
    world.run_to_the_end()
    assert (old.num_preemptions, young.num_preemptions) == (1, 0)


def test_priority_decides_before_arrival() -> None:
    world = World(num_pages=20, rows=1, budget=64)
    for priority in (1, 0, -1, 0, -1):
        world.submit([5], 1, priority=priority)
    world.run_to_the_end()
    assert world.ended == [2, 4, 1, 3, 0]


@given(st.integers(1, 30), st.integers(1, 3))
@settings(deadline=None)
def test_nobody_waits_for_ever_behind_a_stream_of_higher_priority(places: int, rows: int) -> None:
    world = World(num_pages=20, rows=rows, budget=64, priority_places=places, lag=0)
    low = world.submit([1], 1, priority=1)
    assert low
    for _ in range(places + 1):  # more than these never go before it
        for _ in range(rows + 1):  # more than can be served
            world.submit([2], 1, priority=0)
        world.step()
    assert low.finish_reason == "length"


def test_decode_steps_stop_where_a_request_does() -> None:
    world = World(num_pages=50, rows=2, budget=64, decode_steps=4)
    world.submit([1] * 3, 6)
    world.submit([2] * 3, 12)
    lengths = [[c.length for c in plan.chunks] for _ in range(4) if (plan := world.step())]
    assert lengths == [[3, 3], [4, 4], [1, 4], [3]]
    world.run_to_the_end()


def test_decode_steps_take_nobodys_pages() -> None:
    world = World(num_pages=5, rows=2, budget=64, decode_steps=4, prefix_caching=False)
    for index in range(2):
        world.submit([index] * 6, 5)
    world.step()
    plan = world.step()
    assert plan is not None
    assert [chunk.length for chunk in plan.chunks] == [4, 2]  # there is one page more, for the first one
    assert world.scheduler.num_preemptions == 0
    world.run_to_the_end()


def test_clear_gives_everything_back_in_whatever_state_it_was() -> None:
    world = World(num_pages=8, rows=2, budget=4)
    for _ in range(4):
        world.submit([1] * 6, 4)
    world.step()
    world.scheduler.running[0].pages.append(7)  # an exception halfway may leave anything
    assert [r.index for r in world.scheduler.clear()] == [0, 1, 2, 3]
    assert (world.pool.num_used, world.scheduler.has_work) == (0, False)
    world.pool.check_integrity()
