"""What process 0 says and what the others make of it, both in one process; `test_processes` has two."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import jax
import numpy as np
import pytest

import vsurge
from vsurge.model import Model
from vsurge.runtime import EngineError, Processes, processes
from vsurge.runtime.following_executor import FollowingExecutor
from vsurge.runtime.leading_executor import LeadingExecutor

from .scripted import TIMEOUT_S, options_of


class GivenUpError(Exception):
    """Stands for the end of a process."""


class Joined(Processes):
    """Two of them in one process, on the same devices, whose lines are calls of each other."""

    def __init__(self, process_id: int) -> None:
        self.process_id, self.num_processes = process_id, 1
        self.lock = threading.RLock()
        self._num_engines, self._ended, self._updated = 0, None, None
        self._messages = queue.SimpleQueue()
        self._asking = threading.Lock()
        self.given_up: list[str] = []

    def connect(self, other: Joined) -> Wire:
        wire = Wire(other)
        self._lines: Any = {0: wire}
        return wire

    def _give_up(self, reason: str) -> NoReturn:
        self.given_up.append(reason)
        self._messages.put((0, "stop"))
        raise GivenUpError(reason)


class Wire:
    """Stands for a `Line`."""

    def __init__(self, other: Joined) -> None:
        self.other = other
        self.failure: tuple[int, BaseException] | None = None  # after how many messages, and which
        self.said: list[str] = []

    def send(self, message: tuple[Any, ...]) -> None:
        if self.failure is not None and len(self.said) >= self.failure[0]:
            self.failure, failure = (0, BrokenPipeError()), self.failure[1]
            raise failure
        self.said.append(message[1])
        self.other._take(pickle.loads(pickle.dumps(message)))

    def end(self, message: tuple[Any, ...]) -> None:
        with suppress(OSError, GivenUpError):
            self.send(message)
        with suppress(GivenUpError):
            self.other._lose(0, "was lost")


class World:
    """Process 0 and another one, which follows."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.options = model, options_of(model)
        self.leader, self.follower = Joined(0), Joined(1)
        self.wire = self.leader.connect(self.follower)
        self.follower.connect(self.leader)
        self.executors: list[FollowingExecutor] = []

        def made(*arguments: Any) -> FollowingExecutor:
            self.executors.append(FollowingExecutor(*arguments))
            return self.executors[-1]

        monkeypatch.setattr(processes, "FollowingExecutor", made)

    def lead(self, model: Model) -> LeadingExecutor:
        return LeadingExecutor(model, self.options, self.leader)


@pytest.fixture
def world(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(model, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(made.follower.follow, model)
        yield made
        made.leader._messages.put((0, "ended"))  # for who waits, if a test fails
        made.leader._end("stop")
        made.follower._messages.put((0, "stop"))
        following.result(TIMEOUT_S)


def scaled(params: Any, factor: float) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(factor), params)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_weights_go_to_the_engine_that_they_are_for_and_the_old_ones_are_given_up(
    world: World, model: Model
) -> None:
    first, second = world.lead(model), world.lead(model)
    trees = [scaled(model.params, factor) for factor in (2.0, 3.0)]
    placed = [first.place(tree) for tree in trees]  # the second before the first is in use
    first.update(placed[0])
    last = world.lead(replace(model, params=placed[0]))
    last.place(trees[1])  # answered: all before it has been done
    followers = world.executors
    assert_equal(followers[0].params, trees[0])
    assert followers[1].params is model.params
    assert followers[2].params is followers[0].params  # not those that the other process began with
    first.update(placed[1])
    with pytest.raises(
        ValueError, match="the other processes have the new weights only; build with the `model`"
    ):
        world.lead(replace(model, params=placed[0]))
    second.place(trees[0])
    assert_equal(followers[0].params, trees[1])
    assert_equal(first._model.params, trees[1])
    assert_equal(followers[2].params, trees[0])


def test_weights_that_do_not_fit_are_refused_before_anything_is_sent(world: World, model: Model) -> None:
    executor = world.lead(model)
    said = list(world.wire.said)
    with pytest.raises(ValueError, match=r"^params\.final_norm: is float32\[191\], must be"):
        executor.place(replace(model.params, final_norm=model.params.final_norm[:-1]))
    assert world.wire.said == said
    assert not world.follower.given_up


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError("no route"), EngineError),
        (MemoryError("no room"), EngineError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_weights_that_fail_on_the_way_end_the_other_processes_with_the_reason(
    world: World, model: Model, failure: BaseException, raised: type[BaseException]
) -> None:
    executor = world.lead(model)
    world.wire.failure = (3, failure)  # the third array
    with pytest.raises(raised) as found:
        executor.place(scaled(model.params, 2.0))
    assert world.follower.given_up == ["process 0 of 1 was lost"]
    if raised is EngineError:
        assert str(found.value).startswith("new weights failed in process 0: ")
    # nothing is told them any more, and the engine here comes to its end
    executor.release()
    executor.update(model.params)
    with pytest.raises(EngineError, match="the other processes have ended: new weights "):
        executor.allocate()


def test_who_waits_for_an_answer_hears_that_the_others_have_ended(model: Model) -> None:
    leader = Joined(0)
    leader.connect(Joined(1))  # it follows nothing
    executor = LeadingExecutor(model, options_of(model), leader)
    with ThreadPoolExecutor(1) as pool:
        placing = pool.submit(executor.place, model.params)
        while "place" not in leader._lines[0].said:
            pass
        leader._ended = "a step failed"  # and so the other one leaves
        leader._lose(1, "was lost")
        with pytest.raises(EngineError, match="the other processes have ended: a step failed"):
            placing.result(TIMEOUT_S)


def test_a_process_that_is_lost_ends_this_one_unless_all_is_over() -> None:
    process = Joined(1)
    with pytest.raises(GivenUpError, match="process 0 of 1 was lost"):
        process._lose(0, "was lost")
    process._take((0, "stop"))
    process._lose(0, "was lost")
    assert len(process.given_up) == 1


def test_a_process_has_the_number_that_jax_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU's machines have numbers of their own."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    with pytest.raises(ValueError, match="process_id=1: jax numbers this process 0; give that"):
        vsurge.join_processes("localhost:1", process_id=1, num_processes=2)
