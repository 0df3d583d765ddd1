"""What the engine's thread does: takes what callers left, runs steps, hands samples to channels."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

from jax.profiler import StepTraceAnnotation, TraceAnnotation

from .channel import Channel, FinishReason, Waiter, wake
from .executor import Executor
from .inbox import SERVING, Inbox, Message, State, Update
from .meter import Meter
from .metrics import EngineMetrics
from .request import Group, Request
from .results import read_results
from .roster import Roster
from .scheduler import Scheduler
from .step import StepOutput
from .step_plan import StepPlan

logger = logging.getLogger("vsurge.runtime")

REFRESH_S = 1.0  # how often an idle engine's rates are brought up to date


@dataclass(frozen=True)
class _Flight:
    """A step that was dispatched, and whose tokens have not been read."""

    number: int
    plan: StepPlan
    output: StepOutput


class Loop:
    """Runs requests. The scheduler and the executor belong to the thread that is in `run`.

    A step is dispatched before the tokens of the one before it are read, so that the device does not wait for
    Python. An exception in a step fails the requests of that step. Any other reaches every caller that waits.

    In a profiler's trace each step is a `vsurge.step` with its number, and in it lie `vsurge.plan`,
    `vsurge.inputs` and `vsurge.dispatch` of that step, and `vsurge.read`, `vsurge.commit` and
    `vsurge.publish` of the one before it.

    Args:
        scheduler, executor: what to run.
        inbox: what callers want.
        output_lock: held while requests change in what their callers see of them (see `Channel`). Whoever
            wants that of the inbox as well takes it second.

    Attributes:
        metrics: the latest; replaced, never changed.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, inbox: Inbox, output_lock: threading.RLock
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._inbox = inbox
        self._output_lock = output_lock
        self._meter = Meter(scheduler)
        self._roster = Roster(self._meter)
        self._updates: list[Update] = []  # they wait until no step is under way
        self._num_steps = 0
        self.metrics: EngineMetrics = self._meter.snapshot(num_compilations=executor.num_compilations)

    def run(self) -> None:
        """Until the engine is to stop; the thread's target."""
        try:
            self._meter.start()
            self._serve()
            for pool in self._scheduler.pools:
                pool.check_integrity()
        except BaseException as failure:
            logger.exception("the engine's thread failed")
            self._end(failure)
        else:
            self._end(None)

    def _serve(self) -> None:
        flight: _Flight | None = None
        while self._attend(flight):
            with StepTraceAnnotation("vsurge.step", step_num=self._num_steps):
                flight = self._step(flight)

    def _step(self, previous: _Flight | None) -> _Flight | None:
        """Dispatches a step and brings the one before it to its end."""
        if previous is not None and self._scheduler.needs_tokens:
            failure = self._commit(previous, None)
            if failure is not None:
                self._recover(previous.plan, failure)
            return None  # what they were needed for may have ended
        with TraceAnnotation("vsurge.plan"):
            plan = self._plan()
        self._look(previous)
        flight, broken = self._dispatch(plan, previous)
        if previous is not None:
            failure = self._commit(previous, flight)
            if failure is not None:  # and with it what was dispatched after it
                broken, flight = (previous.plan, failure), None
        if broken is not None:
            self._recover(*broken)
        return flight

    def _plan(self) -> StepPlan | None:
        if self._updates or self._inbox.state is State.PAUSED:
            return None
        plan = self._scheduler.plan()
        self._inbox.count(self._scheduler.num_queued)
        return plan

    def _dispatch(
        self, plan: StepPlan | None, previous: _Flight | None
    ) -> tuple[_Flight | None, tuple[StepPlan, Exception] | None]:
        """Begins a step: what runs, and what failed."""
        if plan is None:
            return None, None
        try:
            output = self._executor.run(plan)
        except Exception as failure:  # noqa: BLE001  (whatever it is, its requests get it)
            return None, (plan, failure)
        self._meter.dispatched(len(plan.chunks), was_busy=self._look(previous))
        self._num_steps += 1
        return _Flight(self._num_steps - 1, plan, output), None

    def _look(self, flight: _Flight | None) -> bool:
        """Whether the step is on the device now."""
        is_busy = (
            flight is not None and not cast("Any", flight.output.tokens).is_ready()
        )  # jax's stubs lack it
        self._meter.look(is_busy=is_busy)
        return is_busy

    def _commit(self, flight: _Flight, following: _Flight | None) -> Exception | None:
        """Reads a step's tokens and hands them out; the exception if that, or the step itself, fails."""
        plan = flight.plan
        try:
            with TraceAnnotation("vsurge.read", step_num=flight.number):
                results = read_results(plan, flight.output)
            self._meter.look(is_busy=True)  # this one was, up to now or nearly
            with self._output_lock:
                with TraceAnnotation("vsurge.commit", step_num=flight.number):
                    changed = self._scheduler.commit(plan, results)
                self._look(following)
                with TraceAnnotation("vsurge.publish", step_num=flight.number):
                    woken = self._publish(changed)
            wake(woken)
            self._look(following)
        except Exception as failure:  # noqa: BLE001  (as above)
            return failure
        return None

    def _publish(self, changed: Sequence[Request]) -> list[Waiter]:
        """Shows callers what changed requests have come to, with the output lock; whom to wake without it."""
        woken: list[Waiter] = []
        failures = {request.group: request.failure for request in changed if request.failure is not None}
        for group, failure in failures.items():
            logger.error("a request failed: %s", failure)
            woken += self._fail({group}, failure)
        if failures:
            changed = [request for request in changed if request.group not in failures]
        channels: dict[Channel, None] = {}
        for group, request in {request.group: request for request in changed}.items():
            if group.is_due:
                channel = request.channel
                channels[channel] = None
                channel.change(request.index)
                if request.finish_reason is not None and group.is_finished:
                    channel.end(request.index, group.progress())
                    if channel.has_ended:
                        del self._roster.channels[channel]
        self._forget([request for request in changed if request.finish_reason is not None])
        self._measure()
        for channel in channels:
            woken += channel.notify()
        return woken

    def _recover(self, plan: StepPlan, failure: Exception) -> None:
        """Fails the requests of a step, and lets the others begin anew: the cache may be lost."""
        logger.error("a step failed, and with it %d requests", len(plan.chunks), exc_info=failure)
        with self._output_lock:
            woken = self._fail({chunk.request.group for chunk in plan.chunks}, failure)
            self._scheduler.recompute()
        wake(woken)
        self._executor.recover(failure)

    def _fail(self, groups: Set[Group], failure: Exception) -> list[Waiter]:
        """Ends all completions of some prompts and tells their callers why; locks as for `_publish`."""
        for request in self._scheduler.unfinished():
            if request.group in groups:
                self._scheduler.drop(request)
        # Those too that ended in the step, if their samples were not handed out.
        failed = [request for request in self._roster.requests if request.group in groups]
        channels: dict[Channel, None] = {}
        for request in failed:
            channels[request.channel] = None
            request.channel.fail_prompt(request.index, failure)
        self._forget(failed, failed=True)
        self._measure()
        woken: list[Waiter] = []
        for channel in channels:
            woken += channel.notify()
            if channel.has_ended:
                del self._roster.channels[channel]
        return woken

    def _attend(self, flight: _Flight | None) -> bool:
        """Takes what callers left, and waits for it if there is no work; False when the thread is to end."""
        while True:
            if flight is None:
                self._apply_updates()
            self._finish(self._roster.deadlines.due(time.perf_counter()), "timeout")
            state = self._inbox.state
            rests = flight is None and (
                state is State.PAUSED or (state is State.RUNNING and not self._scheduler.has_work)
            )
            if rests:
                self._meter.rest()
                self._measure()
                self._inbox.rest()
            # Nothing is submitted once the state is none of SERVING, so then empty means done.
            message = self._inbox.take(wait=rests, timeout_s=self._patience_s() if rests else None)
            if message is not None:
                self._meter.wake()
                self._handle(message)
            elif not rests:
                break
        if state is State.STOPPING:
            self._cut()
        return flight is not None or self._scheduler.has_work

    def _patience_s(self) -> float | None:
        """How long it may wait for messages; None for any time."""
        deadline = self._roster.deadlines.next()
        left = None if deadline is None else max(0.0, deadline - time.perf_counter())
        if self._meter.is_settled:
            return left
        return REFRESH_S if left is None else min(left, REFRESH_S)

    def _handle(self, message: Message) -> None:
        if message.kind == "submit":
            self._roster.take(message.requests)
            for request in message.requests:
                self._scheduler.add(request)
                self._roster.deadlines.add(request)
            self._inbox.count(self._scheduler.num_queued, num_taken=len(message.requests))
        elif message.kind == "abort":
            self._finish(message.requests, "abort")
        elif message.kind == "update":
            assert message.update is not None
            self._updates.append(message.update)
        elif message.kind == "abandon":
            with self._inbox.lock:
                if self._inbox.state in SERVING or self._inbox.state is State.DRAINING:
                    self._inbox.enter(State.STOPPING)

    def _finish(self, requests: Sequence[Request], reason: FinishReason) -> None:
        """Ends requests early, those that have not ended."""
        if not requests:
            return
        with self._output_lock:
            ended = [request for request in requests if self._scheduler.abort(request, reason)]
            # Counted before their callers hear of it, and submit others in their place.
            self._inbox.count(self._scheduler.num_queued)
            woken = self._publish(ended)
        wake(woken)

    def _cut(self) -> None:
        unfinished = self._scheduler.unfinished()
        if unfinished:
            with self._inbox.lock:
                self._inbox.has_cut = True
            self._finish(unfinished, "abort")

    def _apply_updates(self) -> None:
        """Swaps the weights. What the cache holds was made with the old ones, so all begins anew."""
        for update in self._updates:
            self._executor.update(update.params)
            self._scheduler.recompute()
            update.is_done.set()
        self._updates.clear()

    def _forget(self, ended: Iterable[Request], *, failed: bool = False) -> None:
        requests = self._roster.end(ended, failed=failed)
        if requests:
            self._inbox.forget(requests)

    def _measure(self) -> None:
        self.metrics = self._meter.snapshot(num_compilations=self._executor.num_compilations)

    def _end(self, failure: BaseException | None) -> None:
        """Leaves everything as it was before the start; who still waits gets the failure."""
        unfinished = self._scheduler.clear()
        self._executor.release()
        woken: list[Waiter] = []
        with self._output_lock:
            with self._inbox.lock:
                for message in self._inbox.close(failure):
                    if message.kind == "submit":
                        unfinished.extend(message.requests)
                        self._roster.take(message.requests)
                    elif message.update is not None:
                        self._updates.append(message.update)
                for request in unfinished:
                    request.finish_reason = "abort"  # nothing comes of aborting it later
                self._inbox.has_cut |= bool(self._roster.requests)
                self._roster.end(list(self._roster.requests), failed=True)
                self._meter.rest()
                self._measure()
                for update in self._updates:  # whoever starts next finds them
                    self._executor.update(update.params)
                    update.is_done.set()
                self._updates.clear()
                unanswered = list(self._roster.channels)  # the next thread may add its own after this
                self._roster.channels.clear()
            if failure is not None:  # otherwise everything has ended
                for channel in unanswered:
                    channel.fail(failure)
                    woken += channel.notify()
        wake(woken)
