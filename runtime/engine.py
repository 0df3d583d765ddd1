"""The engine's thread: takes requests and aborts from callers, runs steps, hands samples to channels."""

from __future__ import annotations

import atexit
import enum
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .channel import Channel, ReturnSample
from .errors import EngineError, EngineFailed, EngineStopped, QueueFull
from .executor import Executor
from .request import Request
from .results import read_results
from .scheduler import Scheduler, StepPlan
from .step import StepOutput

logger = logging.getLogger("vsurge.runtime")


class State(enum.Enum):
    """Of the engine. DRAINING finishes what it has and takes nothing new; STOPPING aborts it."""

    STOPPED = "stopped"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(frozen=True)
class _Message:
    """What callers tell the thread. "wake": look at the state; "abandon": nobody needs the engine now."""

    kind: Literal["submit", "abort", "wake", "abandon"]
    requests: Sequence[Request] = ()


class Engine:
    """Runs requests in a thread of its own. Methods may be called from any other thread.

    The scheduler and the executor belong to the thread; callers leave messages in an inbox that it empties
    between steps. A step is dispatched before the tokens of the one before it are read, so that the device
    does not wait for Python. An exception in a step fails the requests of that step. Any other in the thread
    reaches every caller that waits, and every later one until `start` begins anew.

    `abort` and `abandon` are called by finalizers, which the garbage collector runs in any thread, even one
    that holds the lock. So they take none: they put a message into a `SimpleQueue`, whose `put` is reentrant.

    Args:
        scheduler, executor: what to run.
        max_queued_requests: requests that may wait for a place in the batch. Every request waits for one,
            until the next step at least.
        name: of the thread.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, *, max_queued_requests: int, name: str
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._max_queued_requests = max_queued_requests
        self._name = name
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._open: dict[Channel, None] = {}  # what still waits for output; the thread's alone
        self._lock = threading.Lock()  # guards everything below
        self._state = State.STOPPED
        self._num_submitted = 0  # requests in the inbox
        self._num_waiting = 0  # requests in the scheduler's queue, as of the last step
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
            OutOfMemory: the cache does not fit the device.
        """
        with self._lock:
            if self._state is State.RUNNING:
                return
            if self._state is not State.STOPPED:
                raise EngineError("the engine is stopping; call start() once stop() has returned")
            self._executor.allocate()
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()  # it waits for the lock first
            except RuntimeError:
                self._executor.release()
                raise
            self._thread = thread
            self._failure = None
            self._state = State.RUNNING
            _started.add(self)

    def stop(self, *, drain: bool) -> None:
        """Ends the thread and gives the cache's memory back; nothing happens if it does not run.

        Args:
            drain: finish all requests first; otherwise they end with finish_reason "abort".
        """
        with self._lock:
            thread = self._thread
            if self._state in (State.RUNNING, State.DRAINING):
                self._state = State.DRAINING if drain else State.STOPPING
                self._inbox.put(_Message("wake"))
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
                raise EngineFailed(
                    f"the engine's thread failed, start() begins anew: {self._failure!r}"
                ) from self._failure
            if self._state is not State.RUNNING:
                raise EngineStopped(f"the engine is {self._state.value}: call start() first")
            queued = self._num_waiting + self._num_submitted
            if queued + len(requests) > self._max_queued_requests:
                later = len(requests) <= self._max_queued_requests
                raise QueueFull(
                    f"{queued} requests are waiting and {len(requests)} more came: "
                    f"max_queued_requests={self._max_queued_requests}; "
                    + ("try again later" if later else "pass fewer prompts at a time")
                    + " or build the engine with a larger one"
                )
            for request in requests:
                request.channel.publisher = self._thread
            self._num_submitted += len(requests)
            self._inbox.put(_Message("submit", requests))

    def abort(self, requests: Sequence[Request]) -> None:
        """Ends requests with finish_reason "abort", those of them that have not ended. Takes no lock."""
        if any(request.finish_reason is None for request in requests):
            self._inbox.put(_Message("abort", requests))

    def abandon(self) -> None:
        """`stop(drain=False)` without waiting for it. Takes no lock."""
        self._inbox.put(_Message("abandon"))

    def _run(self) -> None:
        try:
            self._serve()
            self._scheduler.pool.check_integrity()
        except BaseException as failure:
            logger.exception("the engine's thread failed")
            self._end(failure)
        else:
            self._end(None)

    def _serve(self) -> None:
        dispatched: tuple[StepPlan, StepOutput] | None = None
        while self._take_inbox():
            if dispatched is not None and self._scheduler.needs_tokens:
                failure = self._commit(*dispatched)
                if failure is not None:
                    self._recover(dispatched[0], failure)
                dispatched = None
                continue  # what they were needed for may have ended
            previous, plan = dispatched, self._scheduler.plan()
            self._count_waiting()
            dispatched, broken = self._dispatch(plan)
            if previous is not None:
                failure = self._commit(*previous)
                if failure is not None:  # and with it what was dispatched after it
                    broken, dispatched = (previous[0], failure), None
            if broken is not None:
                self._recover(*broken)
        if dispatched is not None:  # of requests that have ended meanwhile
            dispatched[1].wait()

    def _dispatch(
        self, plan: StepPlan | None
    ) -> tuple[tuple[StepPlan, StepOutput] | None, tuple[StepPlan, Exception] | None]:
        """Begins a step: what runs, and what failed."""
        if plan is None:
            return None, None
        try:
            return (plan, self._executor.run(plan)), None
        except Exception as failure:  # noqa: BLE001  (whatever it is, its requests get it)
            return None, (plan, failure)

    def _recover(self, plan: StepPlan, failure: Exception) -> None:
        """Fails the requests of a step, and lets the others begin anew: the cache may be lost."""
        logger.error("a step failed, and with it %d requests", len(plan.chunks), exc_info=failure)
        channels = {chunk.request.channel for chunk in plan.chunks}
        for request in self._scheduler.unfinished():
            if request.channel in channels:
                self._scheduler.drop(request)
        for channel in channels & self._open.keys():
            channel.fail(failure, in_a_step=True)
            del self._open[channel]
        self._scheduler.recompute()
        self._executor.release()
        self._executor.allocate()

    def _take_inbox(self) -> bool:
        """Takes what callers left, and waits for it if there is no work; False when the thread is to end."""
        while True:
            with self._lock:
                state = self._state
            try:
                # Nothing is submitted once the state is another than RUNNING, so then empty means done.
                block = state is State.RUNNING and not self._scheduler.has_work
                message = self._inbox.get(block=block)
            except queue.Empty:
                break
            self._handle(message)
        if state is State.STOPPING:
            self._abort(self._scheduler.unfinished())
        return self._scheduler.has_work

    def _handle(self, message: _Message) -> None:
        if message.kind == "submit":
            for request in message.requests:
                self._open[request.channel] = None
                self._scheduler.add(request)
            with self._lock:
                self._num_submitted -= len(message.requests)
                self._num_waiting = len(self._scheduler.waiting)
        elif message.kind == "abort":
            self._abort(message.requests)
        elif message.kind == "abandon":
            with self._lock:
                self._state = State.STOPPING

    def _abort(self, requests: Sequence[Request]) -> None:
        aborted = [request for request in requests if self._scheduler.abort(request)]
        self._count_waiting()  # before their callers hear of it, and submit others in their place
        self._publish(aborted)

    def _count_waiting(self) -> None:
        with self._lock:
            self._num_waiting = len(self._scheduler.waiting)

    def _commit(self, plan: StepPlan, output: StepOutput) -> Exception | None:
        """Reads a step's tokens and hands them out; the exception if that, or the step itself, fails."""
        try:
            self._publish(self._scheduler.commit(plan, read_results(plan, output)))
        except Exception as failure:  # noqa: BLE001  (as above)
            return failure
        return None

    def _publish(self, changed: list[Request]) -> None:
        """Hands the samples of changed requests to their channels, one message per channel."""
        by_channel: dict[Channel, dict[int, ReturnSample]] = {}
        for request in changed:
            if request.group.is_due:
                by_channel.setdefault(request.channel, {})[request.index] = request.group.sample()
        for channel, samples in by_channel.items():
            channel.publish(samples)
            if channel.is_over():
                del self._open[channel]

    def _end(self, failure: BaseException | None) -> None:
        """Leaves everything as it was before the start; who still waits gets the failure."""
        unfinished = self._scheduler.clear()
        self._executor.release()
        with self._lock:
            while not self._inbox.empty():
                message = self._inbox.get()
                if message.kind == "submit":
                    unfinished.extend(message.requests)
                    self._open.update(dict.fromkeys(request.channel for request in message.requests))
            for request in unfinished:
                request.finish_reason = "abort"  # nothing comes of aborting it later
            self._num_submitted = self._num_waiting = 0
            self._failure = failure
            self._state = State.STOPPED
            unanswered, self._open = self._open, {}  # the next thread may have one of its own already
            _started.discard(self)
        if failure is not None:  # otherwise everything has ended
            for channel in unanswered:
                channel.fail(failure, in_a_step=False)


_started: set[Engine] = set()


@atexit.register
def _stop_all() -> None:
    """A thread that is inside a program of XLA's when the interpreter goes away would crash the process."""
    for engine in list(_started):
        engine.stop(drain=False)
