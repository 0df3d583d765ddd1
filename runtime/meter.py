"""Keeps the figures that `EngineMetrics` shows and that neither the scheduler nor the pool has."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .metrics import WINDOW_S, EngineMetrics
from .request import Request
from .scheduler import Scheduler


@dataclass(frozen=True)
class _Mark:
    """Totals at a moment, to take rates from."""

    time: float
    prompt_tokens: int
    generated_tokens: int
    work_s: float
    idle_s: float

    @property
    def totals(self) -> tuple[int, int, float, float]:
        return self.prompt_tokens, self.generated_tokens, self.work_s, self.idle_s


class Meter:
    """Counts requests and steps, and the time in which the device may have idled. For the engine's thread.

    Args:
        scheduler: where the rest is counted.
        clock: seconds, monotonic.
    """

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.perf_counter) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._num_requests = self._num_steps = self._batch_size = 0
        self._ended = {"finished": 0, "abort": 0, "timeout": 0, "failed": 0}
        self._work_s = self._idle_s = 0.0
        self._worked_until: float | None = None  # up to here work is counted; None while there is none
        self._busy_at = 0.0  # the last moment at which the device is known to have had a step of ours
        self.start()

    def start(self) -> None:
        """The rates begin anew."""
        self._started_at = self._clock()
        self._worked_until = None
        self._marks = deque([self._mark(self._started_at)])

    def taken(self, num_requests: int) -> None:
        self._num_requests += num_requests

    def ended(self, request: Request, *, failed: bool) -> None:
        reason = "failed" if failed else str(request.finish_reason)
        self._ended[reason if reason in self._ended else "finished"] += 1

    def rest(self) -> None:
        """There is nothing to do from now on."""
        self._count_work()
        self._worked_until = None
        self._batch_size = 0

    def wake(self) -> None:
        """There is something to do again."""
        if self._worked_until is None:
            self._worked_until = self._busy_at = self._clock()

    def look(self, *, is_busy: bool) -> None:
        """Whether a step is unfinished now."""
        if is_busy:
            self._busy_at = self._clock()

    def dispatched(self, num_sequences: int, *, was_busy: bool) -> None:
        """A step has been dispatched.

        Args:
            num_sequences: in it.
            was_busy: whether the step before it was unfinished then.
        """
        now = self._clock()
        if not was_busy:
            self._idle_s += now - self._busy_at
        self._busy_at = now
        self._num_steps += 1
        self._batch_size = num_sequences

    def _count_work(self) -> None:
        if self._worked_until is not None:
            now = self._clock()
            self._work_s += now - self._worked_until
            self._worked_until = now

    def _mark(self, now: float) -> _Mark:
        scheduler = self._scheduler
        return _Mark(
            now,
            scheduler.num_computed_prompt_tokens,
            scheduler.num_generated_tokens,
            self._work_s,
            self._idle_s,
        )

    def snapshot(self, *, num_compilations: int) -> EngineMetrics:
        """All figures as they are now."""
        self._count_work()
        now, marks = self._clock(), self._marks
        last = self._mark(now)
        marks.append(last)
        while len(marks) > 1 and marks[1].time <= now - WINDOW_S:  # the first to stay: the last before it
            marks.popleft()
        first = marks[0]
        seconds = max(min(WINDOW_S, now - self._started_at), 1e-9)  # a clock may stand still
        work_s = last.work_s - first.work_s
        scheduler, pools = self._scheduler, self._scheduler.pools
        return EngineMetrics(
            num_requests=self._num_requests,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_queued,
            num_preempted=len(scheduler.waiting) - scheduler.num_queued,
            num_finished=self._ended["finished"],
            num_aborted=self._ended["abort"],
            num_timed_out=self._ended["timeout"],
            num_failed=self._ended["failed"],
            num_pages=sum(pool.num_pages for pool in pools),
            num_pages_used=sum(pool.num_used for pool in pools),
            num_pages_free=sum(pool.num_free for pool in pools),
            num_pages_cached=sum(pool.num_cached for pool in pools),
            num_steps=self._num_steps,
            batch_size=self._batch_size,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_computed_prompt_tokens=scheduler.num_computed_prompt_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            prefix_hit_rate=scheduler.num_cached_tokens / max(scheduler.num_prompt_tokens, 1),
            prompt_tokens_per_second=(last.prompt_tokens - first.prompt_tokens) / seconds,
            generated_tokens_per_second=(last.generated_tokens - first.generated_tokens) / seconds,
            num_preemptions=scheduler.num_preemptions,
            num_compilations=num_compilations,
            work_seconds=self._work_s,
            device_idle_seconds=self._idle_s,
            device_idle_share=min(1.0, (last.idle_s - first.idle_s) / work_s) if work_s > 0 else 0.0,
        )

    @property
    def is_settled(self) -> bool:
        """Whether a later snapshot would be like the last one, unless something happens."""
        return self._marks[0].totals == self._marks[-1].totals
