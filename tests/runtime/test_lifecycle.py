"""Starting and stopping: nothing hangs, nothing is lost, and the cache's memory comes back."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vsurge.runtime import EngineError, EngineStopped, QueueFull, SamplingParams
from vsurge.runtime.inbox import SERVING

from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves


def test_before_the_start_and_after_the_stop_nothing_is_taken(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted()
    for _ in range(2):
        with pytest.raises(EngineStopped, match=r"the engine is stopped: call start\(\) first"):
            scripted.surge.generate([1], SHORT)
        scripted.surge.stop()  # of what does not run: nothing happens
        scripted.surge.start()
        scripted.surge.start()  # of what runs: nothing happens
        check_it_serves(scripted)
        scripted.surge.stop()
        assert not scripted.executor.is_allocated


@pytest.mark.parametrize("drain", [True, False])
def test_stop_finishes_or_aborts_what_runs_and_what_waits(scripted: Scripted, drain: bool) -> None:
    scripted.executor.hold()
    generations = [scripted.surge.generate([i], SamplingParams(max_tokens=10)) for i in range(1, 9)]
    scripted.executor.let(3)
    scripted.executor.wait_until_held()
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(scripted.surge.stop, drain=drain)
        refused_meanwhile(scripted)
        with pytest.raises(EngineError, match="stopping"):
            scripted.surge.start()
        scripted.executor.let(None)
        stopping.result(TIMEOUT_S)
    samples = [generation.result(0.0)[0] for generation in generations]
    assert {s.finish_reason for s in samples} == ({"length"} if drain else {"abort"})
    if drain:
        assert [s.num_generated_tokens for s in samples] == [10] * 8
    assert scripted.pool.num_used == 0
    scripted.surge.start()
    check_it_serves(scripted)


def refused_meanwhile(scripted: Scripted) -> None:
    """Waits until the engine has been told to stop, and sees that it takes nothing then."""

    def submit_until_refused() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(QueueFull):
                scripted.surge.generate([1], SamplingParams(max_tokens=1)).abort()

    with pytest.raises(EngineStopped, match=r"the engine is \w+ing: call start\(\) first"):
        submit_until_refused()


def test_a_stop_that_drains_can_be_hurried_by_one_that_does_not(scripted: Scripted) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([1], LONG)
    scripted.executor.let(3)
    scripted.executor.wait_until_held()  # else it might end before anybody has seen it stop
    with ThreadPoolExecutor(3) as pool:
        draining = pool.submit(scripted.surge.stop, drain=True)
        refused_meanwhile(scripted)
        hurrying = pool.submit(scripted.surge.stop, drain=False)
        while scripted.surge._engine._inbox.state.value != "stopping":
            assert not hurrying.done()
        draining_again = pool.submit(scripted.surge.stop, drain=True)  # takes nothing back
        scripted.executor.let(None)
        for stop in (draining, hurrying, draining_again):
            stop.result(TIMEOUT_S)
    assert generation.result(0.0)[0].finish_reason == "abort"
    assert scripted.executor.num_steps < 50


def test_whoever_submits_while_others_stop_and_start_gets_an_answer(scripted: Scripted) -> None:
    ended = threading.Event()

    def submit(seed: int) -> int:
        answers = 0
        while not ended.is_set() or answers == 0:
            try:
                [sample] = scripted.surge.generate([seed], SHORT).result(TIMEOUT_S)
            except EngineStopped:
                continue
            assert sample.finish_reason in ("length", "abort")
            answers += 1
        return answers

    with ThreadPoolExecutor(4) as pool:
        submitters = [pool.submit(submit, seed) for seed in range(1, 5)]
        try:
            for round_ in range(30):
                scripted.surge.stop(drain=round_ % 2 == 0)
                scripted.surge.start()
        finally:
            ended.set()
        assert all(submitter.result(TIMEOUT_S) for submitter in submitters)
    assert scripted.pool.num_used == 0


@pytest.mark.parametrize("fails", [True, False])
def test_a_with_block_drains_and_one_that_fails_aborts(
    make_scripted: Callable[..., Scripted], fails: bool
) -> None:
    scripted = make_scripted()

    def go_on_when_it_stops() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while scripted.surge._engine._inbox.state in SERVING and time.monotonic() < deadline:
            time.sleep(0.001)
        scripted.executor.let(None)

    def use() -> Any:
        with ThreadPoolExecutor(1) as pool, scripted.surge as surge:
            scripted.executor.hold()
            generations.append(surge.generate([1], LONG))
            scripted.executor.let(1)
            pool.submit(go_on_when_it_stops)
            if fails:
                raise ZeroDivisionError

    generations: list[Any] = []
    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert generations[0].result(0.0)[0].finish_reason == ("abort" if fails else "length")
    assert not scripted.executor.is_allocated


def test_an_engine_that_nobody_refers_to_ends_its_thread(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted()
    scripted.surge.start()
    thread = scripted.surge._engine._inbox.thread
    assert thread is not None
    generation = scripted.surge.generate([1], SHORT)
    alive = weakref.ref(scripted.surge)
    engine, scripted.surge = scripted.surge._engine, None  # pyright: ignore[reportAttributeAccessIssue]
    gc.collect()
    assert generation.result(TIMEOUT_S)[0].finish_reason == "length"  # it still had somebody
    assert alive() is not None
    del generation
    gc.collect()
    assert alive() is None
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    scripted.surge = engine  # pyright: ignore[reportAttributeAccessIssue]  (the fixture stops it once more)


SCRIPT_THAT_JUST_ENDS = """
import sys
from vsurge.model import Qwen3Config, random_model
from vsurge.runtime import SamplingParams, vSurge
config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_q_heads=2,
                     num_kv_heads=1, head_dim=16, max_position_embeddings=100_000)
surge = vSurge.from_model(random_model(config, seed=0), max_concurrent_decodes=1, prefill_lengths=[8],
                          page_size=16, num_pages=6300, verbose=False)
surge.start()
generation = surge.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=90_000, ignore_eos=True))
next(iter(generation))
print("streams", flush=True)
{end}
"""


def test_a_script_that_ends_without_stopping_the_engine_neither_hangs_nor_crashes() -> None:
    scripts = [SCRIPT_THAT_JUST_ENDS.format(end=end) for end in ("", "del surge, generation; sys.exit(0)")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for script in scripts
    ]
    try:
        ended = [(*process.communicate(timeout=120), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()  # nothing happens to one that has ended
    assert ended == [("streams\n", "", 0)] * 2
