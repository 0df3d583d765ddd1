"""Between callers and the engine's thread: the engine's state, who is under way, what is to be done."""

from __future__ import annotations

import enum
import queue
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import EngineFailed, EngineStopped, QueueFull
from .request import Request


class State(enum.Enum):
    """Of the engine. PAUSED runs no step; DRAINING finishes what it has, STOPPING aborts it."""

    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    DRAINING = "draining"
    STOPPING = "stopping"


SERVING = State.RUNNING, State.PAUSED  # what takes requests


@dataclass(frozen=True)
class Update:
    """New weights for the engine.

    Attributes:
        params: a pytree like the old one, on its devices.
        is_done: set once every step that begins uses them.
    """

    params: Any
    is_done: threading.Event


@dataclass(frozen=True)
class Message:
    """What callers tell the thread. "wake": look at the state; "abandon": nobody needs the engine now."""

    kind: Literal["submit", "abort", "update", "wake", "abandon"]
    requests: Sequence[Request] = ()
    update: Update | None = None


class Inbox:
    """What callers leave for the engine's thread, which empties it between steps.

    `abort` and `put` are called by finalizers, which the garbage collector runs in any thread, even one that
    holds the lock. So they take none: they put a message into a `SimpleQueue`, whose `put` is reentrant.

    Args:
        max_queued_requests: requests that may wait to be admitted for the first time. Every request does,
            until the next step at least; one that lost its pages to others waits too, but does not count.

    Attributes:
        lock: guards the other attributes.
        changed: whenever the state or `is_at_rest` does.
        state: where the engine stands.
        failure: the exception that ended the thread, until the next start.
        thread: the latest one.
        is_at_rest: whether it is paused with no step under way.
        has_cut: whether requests were aborted by `stop`, or lost with the thread, since the start.
    """

    def __init__(self, max_queued_requests: int) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.state = State.STOPPED
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.is_at_rest = False
        self.has_cut = False
        self.num_queued = 0  # in the scheduler, not admitted yet, as of the last step
        self.num_submitted = 0  # in here
        self._max_queued_requests = max_queued_requests
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._under_way: dict[str, list[Request]] = {}  # by id

    def check_serves(self) -> None:
        """Call it with the lock.

        Raises:
            EngineStopped: the engine does not run.
            EngineFailed: it does not run because of an exception, its `__cause__`.
        """
        if self.failure is not None:
            raise EngineFailed(
                f"the engine's thread failed, start() begins anew: {self.failure!r}"
            ) from self.failure
        if self.state not in SERVING:
            raise EngineStopped(f"the engine is {self.state.value}: call start() first")

    def check_room(self, count: int) -> None:
        """Call it with the lock.

        Raises:
            QueueFull: with so many requests more, too many would wait.
        """
        queued = self.num_queued + self.num_submitted
        if queued + count > self._max_queued_requests:
            later = count <= self._max_queued_requests
            raise QueueFull(
                f"{queued} requests are waiting and {count} more came: "
                f"max_queued_requests={self._max_queued_requests}; "
                + ("try again later" if later else "pass fewer prompts at a time")
                + " or build the engine with a larger one"
            )

    def enter(self, state: State) -> None:
        """Changes the state and wakes the thread; call it with the lock."""
        self.state, self.is_at_rest = state, False
        self.changed.notify_all()
        self._messages.put(Message("wake"))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests, all or none.

        Raises:
            EngineStopped, EngineFailed: see `check_serves`.
            QueueFull: see `check_room`.
        """
        with self.lock:
            self.check_serves()
            self.check_room(len(requests))
            for request in requests:
                request.channel.publisher = self.thread
                self._under_way.setdefault(request.request_id, []).append(request)
            self.num_submitted += len(requests)
            self._messages.put(Message("submit", requests))

    def abort(self, requests: Sequence[Request]) -> None:
        """Ends requests with finish_reason "abort", those of them that have not ended. Takes no lock."""
        if any(request.finish_reason is None for request in requests):
            self._messages.put(Message("abort", requests))

    def abort_id(self, request_id: str) -> bool:
        """`abort` of all that has this id; False if nothing under way has it."""
        with self.lock:
            requests = list(self._under_way.get(request_id, ()))
        self.abort(requests)
        return bool(requests)

    def put(self, message: Message) -> None:
        """Leaves a message. Takes no lock."""
        self._messages.put(message)

    def take(self, *, wait: bool, timeout_s: float | None = None) -> Message | None:
        """The next message, for the thread; None if there is none, or none came in time."""
        try:
            return self._messages.get(
                block=wait, timeout=None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
            )
        except queue.Empty:
            return None

    def count(self, num_queued: int, *, num_taken: int = 0) -> None:
        """Tells how many wait in the scheduler, and how many submitted ones it has just taken."""
        with self.lock:
            self.num_queued = num_queued
            self.num_submitted -= num_taken

    def rest(self) -> None:
        """Tells who paused the engine that no step is under way."""
        with self.lock:
            if self.state is State.PAUSED and not self.is_at_rest:
                self.is_at_rest = True
                self.changed.notify_all()

    def forget(self, requests: Iterable[Request]) -> None:
        """Takes requests that have ended out of those under way."""
        with self.lock:
            for request in requests:
                same_id = self._under_way.get(request.request_id, [])
                if request in same_id:
                    same_id.remove(request)
                if not same_id:
                    self._under_way.pop(request.request_id, None)

    def close(self, failure: BaseException | None) -> list[Message]:
        """The thread is about to end: what it has not taken. Call it with the lock."""
        messages: list[Message] = []
        while not self._messages.empty():
            messages.append(self._messages.get())
        self._under_way.clear()
        self.num_submitted = self.num_queued = 0
        self.failure = failure
        self.state, self.is_at_rest = State.STOPPED, False
        self.changed.notify_all()
        return messages
