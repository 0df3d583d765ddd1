"""The scheduler and the page pool under random arrivals, prefixes, aborts and faults, without a model."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .world import World

STEPS = int(os.environ.get("VSURGE_FUZZ_STEPS", "100_000"))  # that have a plan; an example has some 300
EXAMPLES = 100  # at a time, until there have been so many steps
Action = tuple[Any, ...]


def prompt_of(family: int, shared: int, own: int, index: int) -> list[int]:
    """A prompt that begins as those of its family do."""
    return [family] * shared + [100 + index] * own


actions = st.one_of(
    st.tuples(
        st.just("submit"), st.integers(1, 3), st.integers(0, 20), st.integers(1, 12),  # the prompt
        st.integers(1, 12), st.integers(0, 14), st.integers(-2, 2),
        st.sampled_from([False, False, True]), st.sampled_from([False, False, True]),
    ),
    st.tuples(st.just("continue"), st.integers(0, 1000), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 1000)),
    st.tuples(st.just("fault")),
    st.tuples(st.just("many"), st.integers(0, 2**32), st.integers(1, 200)),
)  # fmt: skip


def many_actions(seed: int, count: int) -> list[Action]:
    """Such as those above; they are drawn in a hundredth of the time, and shrink in their number only."""
    rng = random.Random(seed)
    drawn: list[Callable[[], Action]] = [
        lambda: (
            "submit", rng.randint(1, 3), rng.randint(0, 20), rng.randint(1, 12), rng.randint(1, 12),
            rng.randint(0, 14), rng.randint(-2, 2), rng.random() < 1 / 3, rng.random() < 1 / 3,
        ),
        lambda: ("continue", rng.randint(0, 1000), rng.randint(1, 8)),
        lambda: ("step", rng.randint(1, 6)),
        lambda: ("abort", rng.randint(0, 1000)),
        lambda: ("fault",),
    ]  # fmt: skip
    return [rng.choices(drawn, [4, 1, 5, 1, 0.2])[0]() for _ in range(count)]


def do(world: World, action: str, *values: Any) -> None:
    if action == "submit":
        family, shared, own, new, stop_after, priority, masked, scored = values
        prompt = prompt_of(family, shared, own, len(world.requests) % 3)
        world.submit(prompt, new, stop_after, priority, masked=masked, scored=scored)
    elif action == "continue":
        world.continue_chat(*values)
    elif action == "abort":
        world.abort(*values)
    elif action == "fault":
        world.fault()
    elif action == "many":
        for each in many_actions(*values):
            do(world, *each)
    else:
        for _ in range(values[0]):
            world.step()


def test_every_request_ends_once_and_the_books_balance_after_every_step() -> None:
    num_steps = 0

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(
        st.integers(1, 24), st.integers(1, 6), st.integers(1, 24), st.integers(1, 6), st.integers(1, 24),
        st.integers(0, 2), st.integers(1, 4), st.booleans(), st.sampled_from([1, 1, 2, 3]),
        st.lists(actions, min_size=8, max_size=40),
    )  # fmt: skip
    def in_any_world(
        num_pages: int,
        rows: int,
        budget: int,
        prompts: int,
        prefill_length: int,
        lag: int,
        decode_steps: int,
        prefix_caching: bool,
        replicas: int,
        todo: list[Action],
    ) -> None:
        nonlocal num_steps
        world = World(
            replicas=replicas,
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
        for action in todo:
            do(world, *action)
        world.run_to_the_end()
        num_steps += world.num_steps
        if not prefix_caching:
            assert sum(pool.num_cached for pool in world.pools) == world.scheduler.num_cached_tokens == 0

    for _ in range(STEPS // (50 * EXAMPLES) + 1):  # an example that plans less than 50 would test little
        if num_steps < STEPS:
            in_any_world()
    assert num_steps >= STEPS


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
    whole = world.submit(prompt[:20], 1)  # all of it is cached: its last token is computed, not written
    assert turn
    assert whole
    world.run_to_the_end()
    assert [r.num_cached for r in world.requests] == [0, 20, 20, 19]
    assert (world.scheduler.num_prompt_tokens, world.scheduler.num_cached_tokens) == (21 + 21 + 25 + 20, 59)


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
