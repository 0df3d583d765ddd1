"""The engine's thread: takes requests and aborts from callers, runs steps, hands samples to channels."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Sequence

import numpy as np

from .channel import Channel, ReturnSample
from .errors import EngineError, EngineFailed, EngineStopped, QueueFull
from .executor import Executor
from .request import Request
from .scheduler import Scheduler

logger = logging.getLogger("vsurge.runtime")


class State(enum.Enum):
    """Of the engine. DRAINING finishes what it has and takes nothing new; STOPPING aborts it."""

    STOPPED = "stopped"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"


class Engine:
    """Runs requests in a thread of its own. Methods may be called from any other thread.

    The scheduler and the executor belong to the thread; callers leave requests and aborts in an inbox that it
    empties between steps. An exception in the thread reaches every caller that waits, and every later one
    until `start` begins anew.

    Args:
        scheduler, executor: what to run.
        max_queued_requests: requests that may wait for a place in the batch.
        name: of the thread.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, *, max_queued_requests: int, name: str
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._max_queued_requests = max_queued_requests
        self._name = name
        self._lock = threading.Condition()  # guards everything below
        self._state = State.STOPPED
        self._submitted: list[Request] = []
        self._aborted: list[Request] = []
        self._num_waiting = 0  # the scheduler's queue, as of the last step
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        with self._lock:
            return self._state is State.RUNNING

    def start(self) -> None:
        """Starts the thread; nothing happens if it runs.

        Raises:
            EngineError: it is being stopped in another thread.
        """
        with self._lock:
            if self._state is State.RUNNING:
                return
            if self._state is not State.STOPPED:
                raise EngineError("the engine is stopping; call start() once stop() has returned")
            self._executor.allocate()
            self._failure = None
            self._state = State.RUNNING
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self, *, drain: bool) -> None:
        """Ends the thread and gives the cache's memory back; nothing happens if it does not run.

        Args:
            drain: finish all requests first; otherwise they end with finish_reason "abort".
        """
        with self._lock:
            thread = self._thread
            if self._state in (State.RUNNING, State.DRAINING):
                self._state = State.DRAINING if drain else State.STOPPING
                self._lock.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests, all or none.

        Raises:
            EngineStopped: the engine does not run.
            EngineFailed: it does not run because of an exception, its `__cause__`.
            QueueFull: too many requests are waiting.
        """
        with self._lock:
            if self._failure is not None:
                raise EngineFailed("the engine's thread failed; start() begins anew") from self._failure
            if self._state is not State.RUNNING:
                raise EngineStopped(f"the engine is {self._state.value}: call start() first")
            queued = self._num_waiting + len(self._submitted)
            if queued + len(requests) > self._max_queued_requests:
                raise QueueFull(
                    f"{queued} requests are waiting and {len(requests)} more came: "
                    f"max_queued_requests={self._max_queued_requests}"
                )
            self._submitted.extend(requests)
            self._lock.notify_all()

    def abort(self, requests: Sequence[Request]) -> None:
        """Ends requests with finish_reason "abort", those of them that have not ended."""
        with self._lock:
            if self._state is not State.STOPPED:
                self._aborted.extend(requests)
                self._lock.notify_all()

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
        except BaseException as failure:  # noqa: BLE001  (it is passed on to every caller)
            logger.exception("the engine's thread failed")
            self._end(failure)
        else:
            self._end(None)

    def _take_inbox(self) -> bool:
        """Waits for work and takes what callers left; False when the thread is to end."""
        with self._lock:
            while not (self._scheduler.has_work or self._submitted or self._aborted):
                if self._state is not State.RUNNING:
                    return False
                self._lock.wait()
            submitted, self._submitted = self._submitted, []
            aborted, self._aborted = self._aborted, []
            stopping = self._state is State.STOPPING
            for request in submitted:
                self._scheduler.add(request)
            self._num_waiting = len(self._scheduler.waiting)
        if stopping:
            aborted = self._scheduler.unfinished()
        publish([request for request in aborted if self._scheduler.abort(request)])
        return True

    def _step(self) -> None:
        plan = self._scheduler.plan()
        if plan is None:
            return
        with self._lock:
            self._num_waiting = len(self._scheduler.waiting)
        tokens = np.asarray(self._executor.run(plan))
        publish(self._scheduler.commit(plan, tokens[: len(plan.chunks)].tolist()))

    def _end(self, failure: BaseException | None) -> None:
        """Leaves everything as it was before the start; who still waits gets the failure."""
        with self._lock:
            unfinished = [*self._scheduler.unfinished(), *self._submitted]
            self._submitted, self._aborted = [], []
            for request in self._scheduler.unfinished():
                self._scheduler.abort(request)
            self._scheduler.pool.check_integrity()
            self._executor.release()
            self._failure = failure
            self._num_waiting = 0
            self._thread = None
            self._state = State.STOPPED
        for channel in dict.fromkeys(request.channel for request in unfinished):
            error = EngineFailed(f"the engine's thread failed: {failure!r}")
            error.__cause__ = failure
            channel.fail(error)


def publish(changed: list[Request]) -> None:
    """Hands the samples of changed requests to their channels, one message per channel."""
    by_channel: dict[Channel, dict[int, ReturnSample]] = {}
    for request in changed:
        by_channel.setdefault(request.channel, {})[request.index] = request.sample()
    for channel, samples in by_channel.items():
        channel.publish(samples)
