"""Engines to test: one with the demo checkpoint, and scripted ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import vsurge.model.demo
from vsurge.model import Model, load_model
from vsurge.runtime import vSurge

from ..devices import TP
from .scripted import Scripted, ScriptedExecutor, options_of, pool_of


@pytest.fixture(scope="session")
def demo_path() -> Path:
    return Path(vsurge.model.demo.__file__).parent


@pytest.fixture(scope="session")
def tokenizer(demo_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_path)


@pytest.fixture(scope="session")
def model(demo_path: Path) -> Model:
    """In float32, so that rounding hardly depends on the size of a batch.

    On as many devices as VSURGE_TEST_TP says (`make test-tp`).
    """
    return load_model(demo_path, dtype="float32", sharding_axis_dims=(1, 1, 1, TP, 1))


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
    gc.collect()
    gc.freeze()  # so that what is loaded by now is not searched again after every test
    with surge:
        yield surge
    gc.unfreeze()


@pytest.fixture
def surge(demo_surge: vSurge) -> Iterator[vSurge]:
    """The demo checkpoint behind a running engine, whose pages must all be free again after the test."""
    demo_surge.start()
    yield demo_surge
    gc.collect()
    demo_surge.stop(drain=True)
    assert pool_of(demo_surge).num_used == 0
    demo_surge.start()


@pytest.fixture
def make_scripted(model: Model, tokenizer: Any) -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(
        *, num_pages: int = 24, max_queued_requests: int = 1024, rows: int = 4, processor: Any = tokenizer
    ) -> Scripted:
        options = replace(
            options_of(model),
            max_concurrent_decodes=rows,
            num_pages=num_pages,
            max_queued_requests=max_queued_requests,
        )
        executor = ScriptedExecutor()
        surge = vSurge(model, processor, options, executor)
        made.append(Scripted(surge, executor, pool_of(surge)))
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
