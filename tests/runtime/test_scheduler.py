"""The scheduler and the page pool under random arrivals, lengths, aborts and pool sizes, without a model."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsurge.runtime.channel import Channel
from vsurge.runtime.page_pool import PagePool
from vsurge.runtime.request import Request
from vsurge.runtime.sampling_params import SamplingParams
from vsurge.runtime.scheduler import Scheduler, StepPlan

PAGE_SIZE = 4
STOP_TOKEN = 999


def make_request(index: int, prompt_length: int, max_new_tokens: int, stop_after: int) -> Request:
    """One whose script stops it after so many tokens, if max_new_tokens does not."""
    return Request(
        prompt_ids=[index] * prompt_length,
        params=SamplingParams(max_tokens=max_new_tokens),
        stop_token_ids=frozenset([STOP_TOKEN]),
        max_new_tokens=max_new_tokens,
        seed=stop_after,
        channel=Channel([]),
        index=index,
        detokenizer=None,
    )


def token_of(request: Request, output_index: int) -> int:
    stops = output_index + 1 == request.seed
    return STOP_TOKEN if stops else (request.index * 13 + output_index) % 900


class World:
    """A scheduler, a device that runs its plans in order and late, and what must always be true."""

    def __init__(self, *, num_pages: int, rows: int, prompts: int, prefill_length: int, lag: int) -> None:
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.scheduler = Scheduler(
            self.pool,
            max_concurrent_decodes=rows,
            max_concurrent_prefill=prompts,
            max_prefill_length=prefill_length,
        )
        self.rows, self.prompts, self.prefill_length, self.lag = rows, prompts, prefill_length, lag
        self.on_device: deque[tuple[StepPlan, list[int]]] = deque()
        self.requests: list[Request] = []
        self.admitted: list[int] = []
        self.ended: list[int] = []
        self.cached: dict[int, int] = {}
        self.last_kind: str | None = None

    def submit(self, prompt_length: int, max_new_tokens: int, stop_after: int) -> None:
        request = make_request(len(self.requests), prompt_length, max_new_tokens, stop_after)
        if self.pool.pages_for(request.max_tokens_in_cache) <= self.pool.num_pages:  # checked at the door
            self.requests.append(request)
            self.scheduler.add(request)

    def abort(self, choice: int) -> None:
        if self.requests:
            request = self.requests[choice % len(self.requests)]
            had_ended = request.finish_reason is not None
            assert self.scheduler.abort(request) is not had_ended
            if not had_ended:
                assert request.finish_reason == "abort"
                self.ended.append(request.index)
            self.check()

    def step(self) -> None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.check_plan(plan)
            tokens = [token_of(chunk.request, chunk.output_index) for chunk in plan.chunks]
            self.on_device.append((plan, tokens))
        while self.on_device and (plan is None or len(self.on_device) > self.lag):
            changed = self.scheduler.commit(*self.on_device.popleft())
            assert len(set(map(id, changed))) == len(changed)
            self.ended += [r.index for r in changed if r.finish_reason is not None]
        self.check()

    def check_plan(self, plan: StepPlan) -> None:
        requests = [chunk.request for chunk in plan.chunks]
        assert requests
        assert len({r.index for r in requests}) == len(requests)
        assert all(r.finish_reason is None for r in requests)
        assert requests == sorted(requests, key=lambda r: r.index)
        if plan.kind == "prefill":
            assert len(requests) <= self.prompts
            assert sum(chunk.length for chunk in plan.chunks) <= self.prefill_length
            assert all(chunk.start + chunk.length <= len(chunk.request.prompt_ids) for chunk in plan.chunks)
        else:
            assert len(requests) <= self.rows
            assert all(chunk.length == 1 and chunk.output_index > 0 for chunk in plan.chunks)
        for chunk in plan.chunks:  # no token is left out, none is computed twice, all of them fit its pages
            assert chunk.start == self.cached.get(chunk.request.index, 0)
            self.cached[chunk.request.index] = chunk.start + chunk.length
            assert chunk.start + chunk.length <= len(chunk.request.pages) * PAGE_SIZE
            assert chunk.output_index < chunk.request.max_new_tokens
        others = [r for r in self.scheduler.running if r not in requests]
        if plan.kind == "prefill" and self.last_kind == "prefill":
            assert not any(r.can_decode for r in others)
        if plan.kind == "decode" and self.last_kind == "decode":
            assert all(r.is_prefilled for r in others)
        self.last_kind = plan.kind

    def check(self) -> None:
        running = self.scheduler.running
        self.pool.check_integrity()
        pages = [page for request in running for page in request.pages]
        assert len(set(pages)) == len(pages) == self.pool.num_used
        assert self.pool.num_used + self.pool.num_free == self.pool.num_pages
        rows = [request.row for request in running]
        assert len(set(rows)) == len(rows) <= self.rows
        assert all(0 <= row < self.rows for row in rows)
        new = [r.index for r in running if r.index not in self.admitted]
        assert all(index > max(self.admitted, default=-1) for index in new)
        self.admitted += sorted(new)
        assert all(r.index > max(self.admitted, default=-1) for r in self.scheduler.waiting)

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


actions = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 12), st.integers(0, 14)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 1000)),
)


@settings(max_examples=250, deadline=None)  # some 10,000 steps
@given(
    st.integers(1, 24), st.integers(1, 5), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2),
    st.lists(actions, min_size=20, max_size=80),
)  # fmt: skip
def test_every_request_ends_once_and_the_books_balance_after_every_step(
    num_pages: int, rows: int, prompts: int, prefill_length: int, lag: int, todo: list[tuple[str, ...]]
) -> None:
    world = World(num_pages=num_pages, rows=rows, prompts=prompts, prefill_length=prefill_length, lag=lag)
    for action, *values in todo:
        if action == "submit":
            world.submit(*values)  # pyright: ignore[reportArgumentType]
        elif action == "abort":
            world.abort(*values)  # pyright: ignore[reportArgumentType]
        else:
            for _ in range(int(values[0])):
                world.step()
    # Nothing waits for ever: each step moves something on, so what is left bounds the steps.
    left = sum(len(r.prompt_ids) + r.max_new_tokens for r in world.scheduler.unfinished())
    for _ in range(2 * left + world.lag + 1):
        world.step()
    assert not world.scheduler.has_work
    world.check_the_end()


def test_a_prompt_of_many_chunks_lets_the_others_decode_in_between() -> None:
    world = World(num_pages=50, rows=2, prompts=1, prefill_length=4, lag=1)
    world.submit(2, 12, 0)
    world.step()
    world.submit(32, 2, 0)
    kinds: list[str | None] = []
    for _ in range(12):
        world.step()
        kinds.append(world.last_kind)
    assert kinds[:10] == ["decode", "prefill"] * 5


def test_clear_gives_everything_back_in_whatever_state_it_was() -> None:
    world = World(num_pages=8, rows=2, prompts=1, prefill_length=4, lag=1)
    for _ in range(4):
        world.submit(6, 4, 0)
    world.step()
    world.scheduler.running[0].pages.append(7)  # an exception halfway may leave anything
    assert [r.index for r in world.scheduler.clear()] == [0, 1, 2, 3]
    assert (world.pool.num_used, world.scheduler.has_work) == (0, False)
    world.pool.check_integrity()


def test_a_pool_refuses_what_it_does_not_have_and_what_is_not_in_use() -> None:
    pool = PagePool(4, PAGE_SIZE)
    pages = pool.allocate(3)
    with pytest.raises(ValueError, match="num_pages=2: only 1 of 4 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    for wrong in ([pages[0], pages[0]], [3], [4]):
        with pytest.raises(ValueError, match="not all of them are in use"):
            pool.release(wrong)
    pool.release(pages)
    assert (pool.num_free, pool.num_used) == (4, 0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert PagePool(1, PAGE_SIZE).pages_for(tokens) == pages


def test_a_lost_page_is_noticed() -> None:
    pool = PagePool(4, PAGE_SIZE)
    pool._free.pop()
    with pytest.raises(RuntimeError, match="page pool"):
        pool.check_integrity()
