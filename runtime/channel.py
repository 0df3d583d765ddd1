"""Between the engine's thread and whoever waits for its output, in asyncio or not.

The engine publishes cumulative samples; a reader always gets the latest state. So a reader that falls behind
skips intermediate states instead of making them pile up, and the engine never waits for a reader.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class ReturnSample:
    """What has been generated for one prompt so far.

    Attributes:
        text: all text so far; empty with detokenize=False or without a processor.
        token_ids: all generated tokens so far, the one that ended it included.
        num_generated_tokens: how many those are.
        tokens_per_second: those over the time since the request was submitted.
        time_to_first_token_s: from submission to the first token, seconds; None before it.
        finish_reason: "stop" (an end-of-sequence token, stop token or stop string), "length" (max_tokens or
            max_length), "abort"; None while it goes on.
        num_prompt_tokens: length of the prompt after any truncation.
    """

    text: str
    token_ids: tuple[int, ...]
    num_generated_tokens: int
    tokens_per_second: float
    time_to_first_token_s: float | None
    finish_reason: FinishReason | None
    num_prompt_tokens: int


class Channel:
    """Carries the samples of one `generate` call from the engine to its reader; safe between threads."""

    def __init__(self, initial: list[ReturnSample]) -> None:
        self._lock = threading.Condition()
        self._samples = initial
        self._version = 0
        self._error: BaseException | None = None
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    def publish(self, changed: dict[int, ReturnSample]) -> None:
        """Replaces some prompts' samples and wakes the reader. For the engine."""
        with self._lock:
            samples = list(self._samples)
            for index, sample in changed.items():
                samples[index] = sample
            self._samples = samples
            self._version += 1
            self._wake()

    def fail(self, error: BaseException) -> None:
        """Gives the reader an exception, if it has not got everything already. For the engine."""
        with self._lock:
            if not self._finished():
                self._error = error
                self._wake()

    def read(self, seen: int) -> tuple[int, list[ReturnSample]] | None:
        """The current version and samples if newer than version `seen`; None if not.

        Raises:
            The exception that ended the requests.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            return None if self._version == seen else (self._version, self._samples)

    def is_finished(self) -> bool:
        """Whether every prompt has ended; nothing newer will come."""
        with self._lock:
            return self._finished()

    def is_over(self) -> bool:
        """Whether the requests have ended, well or with an exception."""
        with self._lock:
            return self._ended()

    def wait(self, seen: int, *, until_finished: bool, timeout_s: float | None = None) -> bool:
        """Blocks until there is something newer than `seen` (or all has ended); False after the timeout."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while not (self._ended() or (not until_finished and self._version != seen)):
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                self._lock.wait(remaining)
            return True

    async def wait_async(self, seen: int) -> None:
        """Waits until there is something newer than `seen` or all has ended, in any event loop."""
        loop = asyncio.get_running_loop()
        waiter = (loop, loop.create_future())
        with self._lock:
            if self._ended() or self._version != seen:
                return
            self._waiting.add(waiter)
        try:
            await waiter[1]
        finally:
            with self._lock:
                self._waiting.discard(waiter)

    def _finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self._samples)

    def _ended(self) -> bool:
        return self._error is not None or self._finished()

    def _wake(self) -> None:
        self._lock.notify_all()
        for loop, future in self._waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)
        self._waiting.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
