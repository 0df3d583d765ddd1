"""Engines to test: one with the demo checkpoint, and one whose executor is a script and compiles nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from transformers import AutoTokenizer

import vsurge.model.demo
from vsurge.model import Model, load_model
from vsurge.runtime import vSurge
from vsurge.runtime.engine import Engine
from vsurge.runtime.executor import Executor
from vsurge.runtime.page_pool import PagePool
from vsurge.runtime.scheduler import Scheduler, StepPlan

TIMEOUT_S = 30.0
Script = Callable[[list[int], int], int]


@pytest.fixture(scope="session")
def demo_path() -> Path:
    return Path(vsurge.model.demo.__file__).parent


@pytest.fixture(scope="session")
def tokenizer(demo_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_path)


@pytest.fixture(scope="session")
def model(demo_path: Path) -> Model:
    """In float32, so that rounding hardly depends on the size of a batch."""
    return load_model(demo_path, dtype="float32")


@pytest.fixture(scope="session")
def demo_surge(model: Model, tokenizer: Any) -> Iterator[vSurge]:
    surge = vSurge.from_model(
        model,
        tokenizer,
        max_concurrent_decodes=4,
        max_concurrent_prefill=3,
        prefill_lengths=(16, 40),
        max_length=160,
        page_size=16,
        num_pages=24,
        seed=7,
        verbose=False,
    )
    with surge:
        yield surge


@pytest.fixture
def surge(demo_surge: vSurge) -> Iterator[vSurge]:
    """The demo checkpoint behind a running engine, whose pages must all be free again after the test."""
    demo_surge.start()
    yield demo_surge
    gc.collect()
    demo_surge.stop(drain=True)
    assert demo_surge._pool.num_used == 0
    demo_surge.start()


class ScriptedExecutor(Executor):
    """Takes tokens from a script instead of a model, and waits where a test wants it to."""

    def __init__(self) -> None:
        self.script: Script = counting_script
        self.error: BaseException | None = None
        self.is_allocated = False
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

    def compile(self, *, show_progress: bool) -> None:
        pass

    def allocate(self) -> None:
        self.is_allocated = True

    def release(self) -> None:
        self.is_allocated = False

    def run(self, plan: StepPlan) -> jax.Array:
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
        return jnp.asarray(
            [self.script(c.request.prompt_ids, max(c.output_index, 0)) for c in plan.chunks], jnp.int32
        )


def counting_script(prompt_ids: list[int], index: int) -> int:
    """Some token, different for each prompt and index; none of them special."""
    return (sum(prompt_ids) * 31 + index * 7) % 1000 + 50


@dataclass
class Scripted:
    """An engine around a script."""

    surge: vSurge
    executor: ScriptedExecutor
    pool: PagePool
    scheduler: Scheduler = field(repr=False)


@pytest.fixture
def make_scripted(model: Model, tokenizer: Any) -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(
        *, num_pages: int = 24, max_queued_requests: int = 1024, rows: int = 4, processor: Any = tokenizer
    ) -> Scripted:
        pool = PagePool(num_pages, 16)
        scheduler = Scheduler(
            pool, max_concurrent_decodes=rows, max_concurrent_prefill=2, max_prefill_length=32
        )
        executor = ScriptedExecutor()
        engine = Engine(scheduler, executor, max_queued_requests=max_queued_requests, name="scripted")
        surge = vSurge(
            model,
            processor,
            engine=engine,
            executor=executor,
            pool=pool,
            max_length=160,
            eos_token_ids=model.eos_token_ids,
            seed=0,
            verbose=False,
        )
        made.append(Scripted(surge, executor, pool, scheduler))
        return made[-1]

    yield make
    for scripted in made:
        scripted.executor.let(None)
        scripted.surge.stop(drain=False)
        assert scripted.pool.num_used == 0
        assert not scripted.executor.is_allocated


@pytest.fixture
def scripted(make_scripted: Callable[..., Scripted]) -> Scripted:
    """A running one."""
    made = make_scripted()
    made.surge.start()
    return made
