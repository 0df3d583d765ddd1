"""Replicas share the queue and the steps; each has rows and pages of its own. That the books balance with any
number of them is in test_scheduler.py."""

from __future__ import annotations

from .world import PAGE_SIZE, World


def placed(world: World) -> list[int]:
    return [request.replica for request in world.requests]


def test_requests_are_spread_by_the_pages_that_they_fill() -> None:
    world = World(num_pages=50, rows=8, budget=64, replicas=2)
    for index, pages in enumerate((4, 1, 1, 1, 3)):
        world.submit([index] * (pages * PAGE_SIZE - 1), 2)
    plan = world.step()
    assert plan is not None
    assert placed(world) == [0, 1, 1, 1, 1]
    assert [len(part) for part in plan.parts] == [1, 4]
    world.run_to_the_end()


def test_a_prefix_is_looked_for_where_it_is_cached() -> None:
    world = World(num_pages=50, rows=4, budget=64, replicas=3)
    for index in range(3):
        world.submit([index] * 21, 2)
    world.run_to_the_end()
    for index in (2, 0, 1):
        world.submit([*[index] * 21, 7], 2)
    world.run_to_the_end()
    assert placed(world) == [0, 1, 2, 2, 0, 1]
    assert world.scheduler.num_cached_tokens == 3 * 20


def test_a_crowded_replica_does_not_get_more_for_a_prefix_that_costs_little_to_compute() -> None:
    world = World(num_pages=50, rows=4, budget=64, replicas=2)
    world.submit([1] * 9, 20)
    world.submit([2], 20)
    world.step()
    world.submit([1] * 9, 2)
    world.step()
    assert placed(world) == [0, 1, 0]  # 3 pages in use and 1 to fill, or 1 and 3
    world.submit([1] * 9, 2)
    world.step()
    assert placed(world)[3] == 1
    world.run_to_the_end()


def test_order_and_priority_hold_over_replicas() -> None:
    world = World(num_pages=20, rows=1, budget=64, replicas=2, lag=0)
    for priority in (1, 0, -1, 0, -1):
        world.submit([5], 1, priority=priority)
    world.run_to_the_end()
    assert world.ended == [2, 4, 1, 3, 0]


def test_a_step_is_mixed_for_all_if_one_has_prompts() -> None:
    world = World(num_pages=50, rows=1, budget=64, replicas=2, decode_steps=4)
    world.submit([1] * 3, 12)
    world.step()
    plan = world.step()
    assert plan is not None
    assert (plan.kind, [c.length for c in plan.chunks]) == ("decode", [4])
    world.submit([2] * 3, 12)
    plan = world.step()
    assert plan is not None
    assert plan.kind == "mixed"
    assert [[(c.request.index, c.length) for c in part] for part in plan.parts] == [[(0, 1)], [(1, 3)]]
    plan = world.step()
    assert plan is not None
    assert (plan.kind, [[c.length for c in part] for part in plan.parts]) == ("decode", [[4], [4]])
    world.run_to_the_end()


def test_who_loses_its_pages_may_go_on_in_another_replica() -> None:
    world = World(num_pages=6, rows=3, budget=64, replicas=2, prefix_caching=False, lag=0)
    for prompt, tokens in ([1] * 8, 12), ([2] * 4, 1), ([3] * 8, 1), ([4] * 8, 12):
        world.submit(prompt, tokens)
    world.step()
    assert placed(world) == [0, 1, 1, 0]
    world.run_to_the_end()  # two of them soon leave all pages of their replica
    assert [r.num_preemptions for r in world.requests] == [0, 0, 0, 1]
    assert placed(world) == [0, 1, 1, 1]
