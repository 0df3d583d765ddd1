"""Whatever callers and steps do, nothing hangs or is lost, and every answer is that of its solo run."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from vsurge.model import Model
from vsurge.runtime import vSurge

from .chaos import Chaos, jobs, solo_runs
from .compilations import heard
from .scripted import TIMEOUT_S, pool_of


@pytest.fixture(scope="module")
def small(model: Model, tokenizer: Any) -> Iterator[vSurge]:
    """An engine whose pages run out, and whose queue is short."""
    surge = vSurge.from_model(
        model,
        tokenizer,
        max_concurrent_decodes=4,
        max_concurrent_prefill=3,
        prefill_lengths=(40,),
        max_length=160,
        page_size=16,
        num_pages=14,
        max_queued_requests=8,
        verbose=False,
    )
    with surge:
        surge.update_params(model.params)  # the first time compiles a copy for each shape
        yield surge


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 200), pytest.param(1, 3000, marks=pytest.mark.slow, id="slow")]
)
def test_random_callers_and_faults(
    small: vSurge, monkeypatch: pytest.MonkeyPatch, seed: int, count: int
) -> None:
    alone = solo_runs(small, jobs(random.Random(seed), 40))
    before = small.metrics
    chaos = Chaos(small, alone, seed, fault_rate=0.02)
    with monkeypatch.context() as patch, heard() as compilations:
        patch.setattr(small._executor, "run", chaos.break_steps(small._executor.run))
        chaos.run(count)
        gc.collect()
        small.generate([1], next(iter(alone))[1]).abort()
        assert small.stop(timeout_s=TIMEOUT_S)  # nothing is left that would hang
        assert compilations == []
    # All of it happened, and often.
    outcomes, metrics = chaos.outcomes, small.metrics
    answered = sum(outcomes[what] for what in ("stop", "length", "abort", "timeout", "failed", "dropped"))
    assert answered == count
    for what in ("stop", "length", "abort", "timeout", "failed", "dropped", "preempted", "found a prefix"):
        assert outcomes[what] >= count // 100, (what, outcomes)
    assert outcomes["refused"] > 0
    assert chaos.num_faults >= 3
    assert metrics.num_requests - before.num_requests == count + 1
    # Who drops one does not see it fail.
    num_failed = metrics.num_failed - before.num_failed
    assert 0 < outcomes["failed"] <= num_failed <= outcomes["failed"] + outcomes["dropped"]
    # Nothing is left of it.
    engine = small._engine
    assert (metrics.num_running, metrics.num_waiting, metrics.num_preempted) == (0, 0, 0)
    assert pool_of(small).num_free == small.num_pages
    pool_of(small).check_integrity([])
    assert not engine._inbox._under_way
    assert not engine._loop._roster.requests
    assert not engine._loop._roster.channels
    assert engine._loop._roster.deadlines.next() is None
    small.start()
    job = next(iter(alone))
    [again] = small.generate([list(job[0])], job[1]).result(TIMEOUT_S)
    assert again.token_ids == alone[job].token_ids
