"""An engine whose executor is a script: it compiles nothing, and its steps come when a test lets them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax.numpy as jnp

from vsurge.model import Model
from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.executor import Executor
from vsurge.runtime.options import EngineOptions
from vsurge.runtime.page_pool import PagePool
from vsurge.runtime.step import StepOutput
from vsurge.runtime.step_plan import StepPlan

from .chunks import output_index

TIMEOUT_S = 30.0
PROMPT = [5, 6, 7]
SHORT, LONG = SamplingParams(max_tokens=3), SamplingParams(max_tokens=100)
Script = Callable[[list[int], int], int]


class ScriptedExecutor(Executor):
    """Takes tokens from a script instead of a model, and waits where a test wants it to."""

    def __init__(self) -> None:
        self.script: Script = counting_script
        self.error: BaseException | None = None  # of every step from now on
        self.fails: dict[int, BaseException] = {}  # step -> when it is dispatched
        self.unreadable: dict[int, BaseException] = {}  # step -> when its tokens are read
        self.is_allocated = False
        self.num_allocations = 0
        self.num_compilations = 0
        self.weights: list[Any] = []  # all that it was given
        self.prompts: list[list[int]] = []  # in the order of their first steps
        self.num_steps = 0
        self._is_held = False
        self._condition = threading.Condition()
        self._allowance: int | None = None

    def hold(self) -> None:
        """Lets no further step run but those that `let` allows."""
        with self._condition:
            self._allowance = 0

    def let(self, num_steps: int | None) -> None:
        """Allows so many more steps; None for any number."""
        with self._condition:
            self._allowance = None if num_steps is None else (self._allowance or 0) + num_steps
            self._condition.notify_all()

    def wait_for_steps(self, num_steps: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self.num_steps >= num_steps, TIMEOUT_S)

    def wait_until_held(self) -> None:
        """Until the engine's thread stands in a step that is not allowed yet."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._is_held and self._allowance == 0, TIMEOUT_S)

    def compile(self, *, show_progress: bool) -> int:  # noqa: ARG002
        return 0

    def place(self, params: Any) -> Any:
        return params

    def update(self, params: Any) -> None:
        self.weights.append(params)

    def check_room(self) -> None:
        pass

    def allocate(self) -> None:
        self.is_allocated = True
        self.num_allocations += 1

    def release(self) -> None:
        self.is_allocated = False

    def run(self, plan: StepPlan) -> StepOutput:
        assert self.is_allocated
        with self._condition:
            self._is_held = True
            self._condition.notify_all()
            assert self._condition.wait_for(lambda: self._allowance != 0, TIMEOUT_S)
            self._is_held = False
            self._allowance = None if self._allowance is None else self._allowance - 1
            self.num_steps += 1
            self._condition.notify_all()
        if self.error is not None:
            raise self.error
        if self.num_steps in self.fails:
            raise self.fails[self.num_steps]
        if self.num_steps in self.unreadable:
            return StepOutput(cast(Any, Unreadable(self.unreadable[self.num_steps])))
        self.prompts += [c.request.prompt_ids for c in plan.chunks if not c.start]
        tokens = [self.script(c.request.prompt_ids, max(output_index(c), 0)) for c in plan.chunks]
        return StepOutput(jnp.asarray([tokens], jnp.int32))


@dataclass
class Unreadable:
    """Tokens of a step that fails on the device: it says so when they are read."""

    error: BaseException

    def is_ready(self) -> bool:
        return True

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise self.error


def counting_script(prompt_ids: list[int], index: int) -> int:
    """Some token, different for each prompt and index; none of them special."""
    return (sum(prompt_ids) * 31 + index * 7) % 1000 + 50


def options_of(model: Model) -> EngineOptions:
    """Of a small engine."""
    return EngineOptions(
        max_concurrent_decodes=4,
        max_concurrent_prefill=2,
        max_prefill_length=32,
        max_batched_tokens=32,
        prefill_lengths=None,
        decode_steps=1,
        prefix_caching=True,
        max_length=160,
        page_size=16,
        num_pages=24,
        max_queued_requests=1024,
        eos_token_ids=model.eos_token_ids,
        seed=0,
        vsurge_name="scripted",
        verbose=False,
    )


@dataclass
class Scripted:
    """An engine around a script."""

    surge: vSurge
    executor: ScriptedExecutor
    pool: PagePool


def pool_of(surge: vSurge) -> PagePool:
    """The pages of an engine that has no replicas."""
    [pool] = surge._engine._loop._scheduler.pools
    return pool


def tokens_of(prompt: list[int], count: int) -> tuple[int, ...]:
    """What `counting_script` makes of a prompt."""
    return tuple(counting_script(prompt, i) for i in range(count))


def run(coroutine: Any) -> Any:
    """`asyncio.run` that fails instead of hanging."""

    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, TIMEOUT_S)

    return asyncio.run(bounded())


def check_it_serves(scripted: Scripted) -> None:
    """The engine goes on, and nothing but this probe, which it serves after what came before, holds pages."""
    scripted.executor.error = None
    scripted.executor.let(None)
    [sample] = scripted.surge.generate([9], SHORT).result(TIMEOUT_S)
    assert sample.token_ids == tokens_of([9], 3)
    assert scripted.pool.num_used == 0
