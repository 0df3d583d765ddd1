"""Between the engine's thread and whoever waits for its output, in asyncio or not.

What the engine publishes is cumulative; a reader always gets the latest state. So a reader that falls behind
skips intermediate states instead of making them pile up, and the engine never waits for a reader.

The garbage collector may end an abandoned coroutine in any thread and at any allocation, so also in a thread
that holds a channel's lock. Nothing here that may run in that way takes a lock: a coroutine that is cancelled
or abandoned leaves its waiter behind, for `_notify` to clear.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from .errors import EngineError, EngineFailed, StepFailed
from .metrics import RequestMetrics
from .token_logprobs import Logprob

FinishReason = Literal["stop", "length", "abort", "timeout"]

# With n > 1 a sample has lists of these, which is left out of the types that a checker sees.
if TYPE_CHECKING:
    Text: TypeAlias = str
    TokenIds: TypeAlias = tuple[int, ...]
    Count: TypeAlias = int
    Number: TypeAlias = float
    OptionalNumber: TypeAlias = float | None
    OptionalReason: TypeAlias = FinishReason | None
    OptionalLogprobs: TypeAlias = tuple[dict[int, Logprob], ...] | None
    Metrics: TypeAlias = RequestMetrics
else:
    Text = TokenIds = Count = Number = OptionalNumber = OptionalReason = OptionalLogprobs = Metrics = Any


@dataclass(frozen=True)
class ReturnSample:
    """What has been generated for one prompt so far.

    With `n` > 1 all but those of the prompt are lists with an entry for each completion.

    Attributes:
        text: all text so far; empty with detokenize=False or without a processor.
        token_ids: all generated tokens so far, the one that ended it included.
        num_generated_tokens: how many those are.
        tokens_per_second: those over the time since the request was submitted.
        time_to_first_token_s: from submission to the first token, seconds; None before it.
        finish_reason: "stop" (an end-of-sequence token, stop token or stop string), "length" (max_tokens or
            max_length), "abort", "timeout" (its `timeout_s` was over); None while it goes on.
        num_preemptions: how often its tokens had to be computed anew, because its pages were given to others,
            a step of theirs failed, or the weights changed.
        logprobs: of each generated token, by token id: itself and the `logprobs` likeliest in its place; None
            if they are not asked for.
        cumulative_logprob: the sum of the generated tokens' log-probabilities; None likewise.
        metrics: how long it waited and took.
        num_prompt_tokens: length of the prompt after any truncation.
        num_cached_tokens: of these, those that were found in the cache.
        prompt_logprobs: as `logprobs`, of each token of the prompt, as far as it is processed; None for the
            first, which nothing comes before.
        request_id: `vSurge.abort` takes it; unlike that of any other prompt.
    """

    text: Text
    token_ids: TokenIds
    num_generated_tokens: Count
    tokens_per_second: Number
    time_to_first_token_s: OptionalNumber
    finish_reason: OptionalReason
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_preemptions: Count = 0
    logprobs: OptionalLogprobs = None
    cumulative_logprob: OptionalNumber = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    request_id: str = ""
    metrics: Metrics = field(default_factory=RequestMetrics)

    @property
    def is_finished(self) -> bool:
        """Whether it, and with n > 1 each of its completions, has ended."""
        reasons: Any = self.finish_reason
        return None not in (reasons if isinstance(reasons, list) else [reasons])


@dataclass(frozen=True, eq=False)
class _Waiter:
    """A coroutine that waits, and for what."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    seen: int
    until_finished: bool


@runtime_checkable
class Snapshot(Protocol):
    """A sample that is made when it is read."""

    @property
    def is_finished(self) -> bool: ...

    def sample(self) -> ReturnSample: ...


class Channel:
    """Carries the samples of one `generate` call from the engine to its readers; safe between threads.

    Attributes:
        publisher: the engine's thread, which must not wait for itself.
        request_ids: of the prompts, in their order.
    """

    def __init__(self, initial: list[ReturnSample]) -> None:
        self.request_ids = tuple(sample.request_id for sample in initial)
        self.publisher: threading.Thread | None = None
        self._lock = threading.Lock()  # guards everything below
        self._changed = threading.Condition(self._lock)
        self._latest: list[ReturnSample | Snapshot] = [*initial]
        self._unfinished = set(range(len(initial)))
        self._version = 0
        self._failure: BaseException | None = None
        self._failed_as: tuple[type[EngineError], str] = (EngineError, "")
        self._waiters: list[_Waiter] = []
        self._num_waiting = 0  # threads

    def replace(self, changed: Mapping[int, Snapshot]) -> tuple[bool, list[_Waiter]]:
        """Replaces some prompts' samples, for `publish`: whether all have ended, and which coroutines are to
        be woken."""
        with self._lock:
            latest = list(self._latest)
            for index, snapshot in changed.items():
                latest[index] = snapshot
                if snapshot.is_finished:
                    self._unfinished.discard(index)
            self._latest = latest
            self._version += 1
            return self._ended(), self._notify()

    def fail(self, failure: BaseException, *, in_a_step: bool) -> None:
        """Gives the readers an exception, if they have not got everything already. For the engine.

        Args:
            failure: its cause.
            in_a_step: whether only a step failed, and not the engine.
        """
        with self._lock:
            if not self._unfinished:
                return
            self._failure = failure
            self._failed_as = (
                (StepFailed, "a step of the request failed")
                if in_a_step
                else (EngineFailed, "the engine's thread failed")
            )
            woken = self._notify()
        _wake(woken)

    def read(self, seen: int) -> tuple[int, list[ReturnSample]] | None:
        """The current version and samples if newer than version `seen`; None if not.

        Raises:
            EngineFailed, StepFailed: from the exception that ended the engine, or the request.
        """
        with self._lock:
            failure, (kind, message) = self._failure, self._failed_as
            version, latest = self._version, self._latest
        if failure is not None:  # an exception of its own for every reader: raising one changes it
            raise kind(f"{message}: {failure!r}") from failure
        if version == seen:
            return None
        samples = [each if isinstance(each, ReturnSample) else each.sample() for each in latest]
        with self._lock:
            if self._version == version:  # what does not change needs not be made again
                self._latest = [*samples]
        return version, samples

    def is_over(self) -> bool:
        """Whether the requests have ended, well or with an exception. What comes last may be unread yet."""
        with self._lock:
            return self._ended()

    def wait(self, seen: int, *, until_finished: bool, timeout_s: float | None = None) -> bool:
        """Blocks until all has ended or, unless `until_finished`, there is something newer than `seen`.

        Returns:
            False after the timeout.

        Raises:
            EngineError: called in the engine's own thread, where nothing could ever arrive.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while not self._ready(seen, until_finished):
                if threading.current_thread() is self.publisher:
                    raise EngineError("the engine's own thread cannot wait for its output")
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                self._num_waiting += 1
                try:
                    self._changed.wait(None if remaining is None else min(remaining, threading.TIMEOUT_MAX))
                finally:
                    self._num_waiting -= 1
            return True

    async def wait_async(self, seen: int, *, until_finished: bool) -> None:
        """`wait` for a coroutine, in any event loop."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, loop.create_future(), seen, until_finished)
        with self._lock:
            if self._ready(seen, until_finished):
                return
            self._waiters.append(waiter)
        await waiter.future

    def _ended(self) -> bool:
        return self._failure is not None or not self._unfinished

    def _ready(self, seen: int, until_finished: bool) -> bool:
        return self._ended() or (not until_finished and self._version != seen)

    def _notify(self) -> list[_Waiter]:
        """Wakes the threads that wait; the coroutines that are to be woken."""
        if self._num_waiting:
            self._changed.notify_all()
        if not self._waiters:
            return []
        woken: list[_Waiter] = []
        waiting: list[_Waiter] = []
        has_ended, version = self._ended(), self._version
        for waiter in self._waiters:
            if has_ended or not (waiter.until_finished or version == waiter.seen):
                woken.append(waiter)
            elif not (waiter.future.done() or waiter.loop.is_closed()):
                waiting.append(waiter)
        self._waiters = waiting
        return woken


def publish(changed: Mapping[Channel, Mapping[int, Snapshot]]) -> list[Channel]:
    """Replaces samples and wakes the readers; the channels of which all has ended. For the engine."""
    over: list[Channel] = []
    woken: list[_Waiter] = []
    for channel, snapshots in changed.items():
        has_ended, waiters = channel.replace(snapshots)
        woken += waiters
        if has_ended:
            over.append(channel)
    _wake(woken)
    return over


def _wake(waiters: Sequence[_Waiter]) -> None:
    """Wakes coroutines, each event loop once: that is a system call, during which other threads go ahead."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        by_loop.setdefault(waiter.loop, []).append(waiter.future)
    for loop, futures in by_loop.items():
        # The loop may close at any moment; whoever waited in it is gone then.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
