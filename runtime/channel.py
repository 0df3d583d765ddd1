"""Between the engine's thread and whoever waits for its output, in asyncio or not.

A reader always gets the latest state, and takes it from the requests themselves. So a reader that falls
behind skips intermediate states instead of making them pile up, and the engine does nothing for output that
nobody reads but to say that there is more. One lock per engine lies between the two: the engine's thread
holds it while output changes, a reader while it looks how far that has come.

The garbage collector may end an abandoned coroutine in any thread and at any allocation, so also in a thread
that holds a channel's lock. Nothing here that may run in that way takes a lock: a coroutine that is cancelled
or abandoned leaves its waiter behind, for `_notify` to clear.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

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
class Waiter:
    """A coroutine that waits, and for what."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    seen: int
    until_finished: bool


class Snapshot(Protocol):
    """What there was at a moment, of which a sample can be made later."""

    def sample(self) -> ReturnSample: ...


class Source(Protocol):
    """What a prompt has come to, which may grow while the lock is not held."""

    def progress(self) -> Snapshot: ...


class Channel:
    """Carries the samples of one `generate` call from the engine to its readers; safe between threads.

    Args:
        request_ids: of the prompts, in their order.
        sources: where their output is.
        lock: held by whoever changes that.

    Attributes:
        publisher: the engine's thread, which must not wait for itself.
        request_ids: as above.
    """

    __slots__ = (
        "_changed",
        "_failure",
        "_failures",
        "_latest",
        "_lock",
        "_num_unfinished",
        "_num_waiting",
        "_sources",
        "_version",
        "_waiters",
        "publisher",
        "request_ids",
    )

    def __init__(self, request_ids: Sequence[str], sources: Sequence[Source], lock: threading.RLock) -> None:
        self.request_ids = tuple(request_ids)
        self.publisher: threading.Thread | None = None
        self._lock = lock  # guards everything below
        self._changed = threading.Condition(lock)
        self._sources: list[Source | None] = [*sources]  # None where all has come
        # What stands for each as it is: what came last, or a sample that was made since the last change.
        self._latest: list[Snapshot | ReturnSample | None] = [None] * len(sources)
        self._num_unfinished = len(sources)
        self._version = 0
        self._failure: BaseException | None = None  # the engine's
        self._failures: dict[int, BaseException] = {}  # of prompts
        self._waiters: tuple[Waiter, ...] = ()
        self._num_waiting = 0  # threads

    def change(self, index: int) -> None:
        """A prompt has more output. For the engine, which holds the lock, as in what follows."""
        self._latest[index] = None
        self._version += 1

    def end(self, index: int, last: Snapshot) -> None:
        """All of a prompt's output has come."""
        self._latest[index] = last
        self._sources[index] = None  # it has this channel, and neither would be freed before the other
        self._num_unfinished -= 1

    def fail_prompt(self, index: int, failure: BaseException) -> None:
        """A step of a prompt failed; it stays as it is, if its output has not all come already."""
        source = self._sources[index]
        if source is not None:
            self._failures[index] = failure
            self._version += 1
            self.end(index, source.progress())

    def fail(self, failure: BaseException) -> None:
        """The engine failed, which the readers hear of at once, if they have not got everything already."""
        if self._num_unfinished:
            self._failure = failure
            self._sources.clear()

    def notify(self) -> Sequence[Waiter]:
        """Wakes the threads that wait for what has changed; the coroutines that `wake` is to wake."""
        if self._num_waiting:
            self._changed.notify_all()
        if not self._waiters:
            return ()
        woken: list[Waiter] = []
        waiting: list[Waiter] = []
        has_ended, version = self.has_ended, self._version
        for waiter in self._waiters:
            if has_ended or not (waiter.until_finished or version == waiter.seen):
                woken.append(waiter)
            elif not (waiter.future.done() or waiter.loop.is_closed()):
                waiting.append(waiter)
        self._waiters = tuple(waiting)
        return woken

    def read(self, seen: int) -> tuple[int, list[ReturnSample]] | None:
        """The current version and samples if newer than version `seen`; None if not.

        Raises:
            EngineFailed: from the exception that ended the engine.
            StepFailed: all has ended, but a step of some prompts failed; from the exception of the first.
        """
        with self._lock:
            failure, version = self._failure, self._version
            failures = {} if self._num_unfinished else self._failures
            latest = [] if failure is not None or (version == seen and not failures) else self._states()
        # Every reader gets an exception of its own: raising one changes it.
        if failure is not None:
            raise EngineFailed(f"the engine's thread failed: {failure!r}") from failure
        samples = [each if isinstance(each, ReturnSample) else each.sample() for each in latest]
        if failures:
            first = failures[min(failures)]
            finished = [None if i in failures else sample for i, sample in enumerate(samples)]
            raise StepFailed(f"a step of the request failed: {first!r}", finished) from first
        if version == seen:
            return None
        with self._lock:
            if self._version == version:  # what does not change needs not be made again
                self._latest = [*samples]
        return version, samples

    def is_over(self) -> bool:
        """Whether the requests have ended, well or with an exception. What comes last may be unread yet."""
        with self._lock:
            return self.has_ended

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
        waiter = Waiter(loop, loop.create_future(), seen, until_finished)
        with self._lock:
            if self._ready(seen, until_finished):
                return
            self._waiters += (waiter,)
        await waiter.future

    def _states(self) -> list[Snapshot | ReturnSample]:
        """How far each prompt has come now."""
        states: list[Snapshot | ReturnSample] = []
        for source, state in zip(self._sources, self._latest, strict=True):
            if state is None:
                assert source is not None  # otherwise there is what came last
                state = source.progress()  # noqa: PLW2901
            states.append(state)
        return states

    @property
    def has_ended(self) -> bool:
        """Whether the requests have, well or with an exception; with the lock."""
        return self._failure is not None or not self._num_unfinished

    def _ready(self, seen: int, until_finished: bool) -> bool:
        return self.has_ended or (not until_finished and self._version != seen)


def wake(waiters: Iterable[Waiter]) -> None:
    """Wakes coroutines; not while the lock is held.

    Each event loop is told once: that is a system call, during which other threads go ahead.
    """
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
