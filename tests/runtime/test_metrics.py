"""What requests and the engine tell about themselves is true, and adds up at every moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest

from vsurge.runtime import EngineMetrics, ReturnSample, SamplingParams, StepFailed, vSurge
from vsurge.runtime.meter import Meter
from vsurge.runtime.metrics import WINDOW_S
from vsurge.runtime.request import Request

from .greedy import GREEDY, STORY
from .scripted import LONG, SHORT, TIMEOUT_S, Scripted, check_it_serves
from .world import World


def check_times(sample: ReturnSample) -> None:
    metrics = sample.metrics
    assert metrics.queue_time_s is not None
    assert metrics.ttft_s is not None
    assert metrics.time_between_tokens_s is not None
    assert metrics.e2e_time_s is not None
    assert 0 <= metrics.queue_time_s <= metrics.ttft_s <= metrics.e2e_time_s
    assert sample.time_to_first_token_s == metrics.ttft_s
    decoding = metrics.time_between_tokens_s * (sample.num_generated_tokens - 1)
    assert metrics.ttft_s + decoding <= metrics.e2e_time_s + 1e-6


def test_each_prompt_of_a_call_has_its_own_figures(surge: vSurge) -> None:
    surge.stop()
    surge.start()  # with an empty cache
    prompt = surge.processor.encode(STORY) * 3
    counts = (24, 3, 17)
    params = [replace(GREEDY, max_tokens=count) for count in counts]
    generation = surge.generate([prompt, [5] * 20, [6, 7]], params)
    seen = list(generation)
    for i, (count, length) in enumerate(zip(counts, (len(prompt), 20, 2), strict=True)):
        sample = seen[-1][i]
        check_times(sample)
        assert (sample.metrics.num_prompt_tokens, sample.metrics.num_generated_tokens) == (length, count)
        before = [samples[i].metrics for samples in seen if samples[i].finish_reason is None]
        assert all(metrics.e2e_time_s is None for metrics in before)
        assert all(metrics.num_prompt_tokens == length for metrics in before)
    [again] = surge.generate([prompt], params[0]).result(TIMEOUT_S)
    assert again.metrics.num_cached_tokens == again.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    assert seen[-1][0].metrics.num_cached_tokens == 0


def test_times_are_those_between_the_events(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(rows=1)
    scripted.surge.start()
    scripted.executor.hold()
    first = scripted.surge.generate([1], SamplingParams(max_tokens=5))
    second = scripted.surge.generate([2], SamplingParams(max_tokens=1))
    scripted.executor.wait_until_held()
    time.sleep(0.05)
    scripted.executor.let(None)
    [one], [two] = first.result(TIMEOUT_S), second.result(TIMEOUT_S)
    check_times(one)
    assert one.metrics.queue_time_s is not None
    assert one.metrics.ttft_s is not None
    assert one.metrics.queue_time_s < 0.05 <= one.metrics.ttft_s  # it was admitted, then stood in a step
    assert two.metrics.queue_time_s is not None
    assert two.metrics.queue_time_s >= 0.05  # it waited for the row
    assert two.metrics.time_between_tokens_s is None  # there is no second token
    assert scripted.surge.generate([3], SHORT).result(TIMEOUT_S)[0].metrics != one.metrics


def check_sums(metrics: EngineMetrics) -> None:
    assert metrics.num_requests == (
        metrics.num_running + metrics.num_waiting + metrics.num_preempted + metrics.num_finished
        + metrics.num_aborted + metrics.num_timed_out + metrics.num_failed
    )  # fmt: skip
    assert metrics.num_pages == metrics.num_pages_used + metrics.num_pages_free + metrics.num_pages_cached
    assert metrics.num_cached_tokens <= metrics.num_prompt_tokens
    assert 0 <= metrics.device_idle_share <= 1
    assert 0 <= metrics.device_idle_seconds <= metrics.work_seconds
    assert 0 <= metrics.prefix_hit_rate <= 1


def test_every_snapshot_adds_up_whoever_reads_it_whenever(make_scripted: Callable[..., Scripted]) -> None:
    scripted = make_scripted(num_pages=12)
    scripted.surge.start()
    ended, seen = threading.Event(), set[EngineMetrics]()

    def read() -> None:
        while not ended.is_set():
            seen.add(scripted.surge.metrics)
            time.sleep(0)

    reader = threading.Thread(target=read)
    reader.start()
    generations = [scripted.surge.generate([i % 7] * (1 + 5 * (i % 9)), LONG) for i in range(60)]
    for generation in generations[::4]:
        generation.abort()
    for generation in generations:
        generation.result(TIMEOUT_S)
    ended.set()
    reader.join(TIMEOUT_S)
    assert len(seen) > 20
    for metrics in seen:
        check_sums(metrics)
    assert max(metrics.num_preempted for metrics in seen) > 0
    last = scripted.surge.metrics
    check_sums(last)
    assert (last.num_requests, last.num_finished + last.num_aborted) == (60, 60)
    assert (last.num_running, last.num_waiting, last.num_preempted, last.num_pages_used) == (0, 0, 0, 0)
    samples = [generation.result(0.0)[0] for generation in generations]
    assert last.num_generated_tokens == sum(sample.num_generated_tokens for sample in samples)
    assert last.num_cached_tokens == sum(sample.num_cached_tokens for sample in samples)
    assert last.num_preemptions == sum(sample.num_preemptions for sample in samples)
    assert last.num_steps == scripted.executor.num_steps
    assert last.prefix_hit_rate == last.num_cached_tokens / last.num_prompt_tokens
    with pytest.raises(FrozenInstanceError):
        last.num_steps = 0  # pyright: ignore[reportAttributeAccessIssue]


def test_who_has_a_result_finds_it_in_the_metrics(scripted: Scripted) -> None:
    for i in range(1, 30):
        scripted.surge.generate([i], SamplingParams(max_tokens=2)).result(TIMEOUT_S)
        assert scripted.surge.metrics.num_finished == i
        assert scripted.surge.metrics.num_generated_tokens == 2 * i
    scripted.executor.fails[scripted.executor.num_steps + 2] = ZeroDivisionError()
    with pytest.raises(StepFailed):
        scripted.surge.generate([[1], [2]], LONG).result(TIMEOUT_S)
    assert scripted.surge.metrics.num_failed == 2
    check_sums(scripted.surge.metrics)
    check_it_serves(scripted)


def test_a_thread_that_fails_counts_all_that_it_had_as_failed(scripted: Scripted) -> None:
    scripted.executor.hold()
    generations = [scripted.surge.generate([i], SHORT) for i in range(8)]
    scripted.executor.error = SystemExit()
    scripted.executor.let(None)
    for generation in generations:
        with pytest.raises(Exception, match="thread failed"):
            generation.result(TIMEOUT_S)
    assert scripted.surge.metrics.num_failed == 8
    assert scripted.surge.stop() is False
    check_sums(scripted.surge.metrics)


def test_programs_are_counted_and_stand_still_while_serving(surge: vSurge) -> None:
    executor = surge._executor
    count = len(executor.decode_buckets) + len(executor.mixed_buckets) + 1  # which writes a row
    assert surge.compile() == surge.metrics.num_compilations == count
    surge.generate(STORY, GREEDY).result(TIMEOUT_S)
    assert surge.metrics.num_compilations == count


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def world() -> World:
    return World(num_pages=8, rows=2, budget=8)


def snapshot(meter: Meter) -> EngineMetrics:
    return meter.snapshot(num_compilations=0)


def test_rates_are_of_the_last_ten_seconds_or_since_the_start(world: World) -> None:
    clock, scheduler = Clock(), world.scheduler
    meter = Meter(scheduler, clock)
    meter.wake()
    clock.now += 2
    scheduler.num_computed_prompt_tokens, scheduler.num_generated_tokens = 100, 40
    metrics = snapshot(meter)
    assert (metrics.prompt_tokens_per_second, metrics.generated_tokens_per_second) == (50, 20)
    clock.now += 4
    scheduler.num_generated_tokens = 100
    assert snapshot(meter).generated_tokens_per_second == 100 / 6
    assert not meter.is_settled
    clock.now += 7  # now the 40 are too old
    metrics = snapshot(meter)
    assert (metrics.prompt_tokens_per_second, metrics.generated_tokens_per_second) == (0, 60 / WINDOW_S)
    meter.rest()
    clock.now += WINDOW_S
    assert snapshot(meter).generated_tokens_per_second == 0
    clock.now += WINDOW_S
    assert snapshot(meter).device_idle_share == 0
    assert meter.is_settled


def test_idle_time_is_that_before_a_step_when_none_is_unfinished_and_counts_work_only(world: World) -> None:
    clock = Clock()
    meter = Meter(world.scheduler, clock)
    clock.now += 100  # nothing to do: counts for nothing
    meter.wake()
    clock.now += 1  # until the first step is dispatched
    meter.dispatched(3, was_busy=False)
    clock.now += 3
    meter.look(is_busy=True)
    clock.now += 1
    meter.look(is_busy=False)  # it ended at some time in this second
    clock.now += 1
    meter.dispatched(5, was_busy=False)
    clock.now += 1
    meter.dispatched(4, was_busy=True)  # behind one that still runs
    clock.now += 1
    metrics = snapshot(meter)
    assert metrics.device_idle_share == (1 + 2) / 8
    assert (metrics.work_seconds, metrics.device_idle_seconds) == (8, 1 + 2)
    assert (metrics.num_steps, metrics.batch_size) == (3, 4)
    meter.rest()
    clock.now += 0.5
    assert snapshot(meter).device_idle_share == (1 + 2) / 8
    assert snapshot(meter).batch_size == 0


def test_an_engine_that_has_nothing_to_do_comes_to_rest_at_zero(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsurge.runtime.meter.WINDOW_S", 0.05)
    monkeypatch.setattr("vsurge.runtime.loop.REFRESH_S", 0.01)
    scripted.surge.generate([1], LONG).result(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while scripted.surge.metrics.generated_tokens_per_second > 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    metrics = scripted.surge.metrics
    assert (metrics.batch_size, metrics.num_generated_tokens) == (0, 100)


def test_a_request_that_was_never_admitted_has_no_queue_time() -> None:
    world = World(num_pages=8, rows=1, budget=8)
    world.submit([1, 2, 3], 4)
    waits = world.submit([1, 2, 3], 4)
    world.step()
    assert isinstance(waits, Request)
    assert world.requests[0].group.progress().sample().metrics.queue_time_s is not None
    assert waits.group.progress().sample().metrics.queue_time_s is None
