"""The engine's life cycle, as callers see it: start, pause, stop, new weights."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from typing import Any

from .errors import EngineError
from .executor import Executor
from .inbox import SERVING, Inbox, Message, State, Update
from .loop import Loop
from .metrics import EngineMetrics
from .request import Request
from .scheduler import Scheduler


class Engine:
    """Runs requests in a thread of its own. Methods may be called from any other thread.

    The scheduler and the executor belong to the thread (`Loop`); callers leave messages in an inbox that it
    empties between steps. An exception that ends the thread reaches every caller that waits, and every later
    one until `start` begins anew.

    Args:
        scheduler, executor: what to run.
        output_lock: see `Channel`.
        max_queued_requests: see `Inbox`.
        name: of the thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        output_lock: threading.RLock,
        max_queued_requests: int,
        name: str,
    ) -> None:
        self._executor = executor
        self._name = name
        self._inbox = Inbox(max_queued_requests)
        self._loop = Loop(scheduler, executor, self._inbox, output_lock)

    def check_room(self) -> None:
        """What `start` would find of the device's memory.

        Raises:
            OutOfMemory: the cache does not fit the device.
        """
        with self._inbox.lock:
            if self._inbox.state is State.STOPPED:
                self._executor.check_room()

    @property
    def is_paused(self) -> bool:
        with self._inbox.lock:
            return self._inbox.state is State.PAUSED

    @property
    def metrics(self) -> EngineMetrics:
        return self._loop.metrics

    def start(self) -> None:
        """Starts the thread; nothing happens if it runs, paused or not.

        Raises:
            EngineError: it is being stopped in another thread.
            OutOfMemory: the cache does not fit the device.
        """
        inbox = self._inbox
        with inbox.lock:
            if inbox.state in SERVING:
                return
            if inbox.state is not State.STOPPED:
                raise EngineError("the engine is stopping; call start() once stop() has returned")
            self._executor.check_room()
            self._executor.allocate()
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()  # it waits for the lock first
            except RuntimeError:
                self._executor.release()
                raise
            inbox.thread = thread
            inbox.failure, inbox.has_cut = None, False
            inbox.state = State.RUNNING
            _started.add(self)

    def _run(self) -> None:
        with self._inbox.lock:
            pass  # until the start is done
        try:
            self._loop.run()
        finally:
            with self._inbox.lock:
                if self._inbox.thread is threading.current_thread():  # and no later one
                    _started.discard(self)

    def stop(self, *, drain: bool, timeout_s: float | None = None) -> bool:
        """Ends the thread and gives the cache's memory back; nothing happens if it does not run.

        Args:
            drain: finish all requests first, also if it is paused; otherwise they end with "abort".
            timeout_s: seconds after which those that have not finished are aborted after all; None for never.

        Returns:
            False if requests were cut short, by this call, another one or a failure, since the start.
        """
        inbox = self._inbox
        with inbox.lock:
            thread = inbox.thread
            if inbox.state in SERVING or (inbox.state is State.DRAINING and not drain):
                inbox.enter(State.DRAINING if drain else State.STOPPING)
        if thread is None:
            return True
        if thread is threading.current_thread():  # a finalizer may be called in it, and must not wait for it
            return False
        thread.join(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))
        if thread.is_alive():
            with inbox.lock:
                if inbox.thread is thread and inbox.state is State.DRAINING:
                    inbox.enter(State.STOPPING)
            thread.join()
        with inbox.lock:
            return not inbox.has_cut

    def pause(self) -> None:
        """Runs no further step until `resume`; returns once none is under way.

        Raises:
            EngineStopped, EngineFailed: it does not run.
        """
        inbox = self._inbox
        with inbox.lock:
            inbox.check_serves()
            if inbox.state is State.RUNNING:
                inbox.enter(State.PAUSED)
            if inbox.thread is not threading.current_thread():
                inbox.changed.wait_for(lambda: inbox.is_at_rest or inbox.state is not State.PAUSED)

    def resume(self) -> None:
        """Goes on after `pause`; nothing happens if it is not paused.

        Raises:
            EngineStopped, EngineFailed: it does not run.
        """
        inbox = self._inbox
        with inbox.lock:
            inbox.check_serves()
            if inbox.state is State.PAUSED:
                inbox.enter(State.RUNNING)

    def update(self, params: Any) -> None:
        """Swaps the weights between two steps, or at once if it does not run; returns when it is done.

        Args:
            params: like the old ones, and on their devices.
        """
        inbox = self._inbox
        update = Update(params, threading.Event())
        with inbox.lock:
            if inbox.state is State.STOPPED:
                self._executor.update(params)
                return
            thread = inbox.thread
            inbox.put(Message("update", update=update))
        if thread is not threading.current_thread():
            update.is_done.wait()

    def check_queue(self, count: int) -> None:
        """Refuses so many requests before they are made, if `submit` would; raises as `Inbox.check_room`."""
        with self._inbox.lock:
            self._inbox.check_room(count)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests, all or none; raises as `Inbox.submit`."""
        self._inbox.submit(requests)

    def abort(self, requests: Sequence[Request]) -> None:
        """Ends requests with finish_reason "abort", those of them that have not ended. Takes no lock."""
        self._inbox.abort(requests)

    def abort_id(self, request_id: str) -> bool:
        """`abort` of all that has this id; False if nothing under way has it."""
        return self._inbox.abort_id(request_id)

    def abandon(self) -> None:
        """`stop(drain=False)` without waiting for it. Takes no lock."""
        self._inbox.put(Message("abandon"))


_started: set[Engine] = set()


@atexit.register
def _stop_all() -> None:
    """A thread that is inside a program of XLA's when the interpreter goes away would crash the process."""
    for engine in list(_started):
        engine.stop(drain=False)
