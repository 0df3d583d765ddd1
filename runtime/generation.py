"""What `vSurge.generate` returns: one object to await, iterate over or block on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

from .channel import Channel, ReturnSample
from .checks import as_number


class Generation:
    """The output of one `generate` call, one cumulative `ReturnSample` per prompt.

    - `await generation`: the final list; with stream=True the generation itself, to iterate over.
    - `async for samples in generation` (or a plain `for`): the list at every step that changed one of its
      samples. A reader that falls behind gets the latest state and skips what lay between. Of prompts with
      output_kind="delta" only what is new since the reader's last turn.
    - `generation.result(timeout_s=None)`: blocks and gives the final list.

    It is bound to no event loop, and generates whether or not somebody waits. It is an awaitable but no
    coroutine: it may be awaited again and again, and what takes awaitables takes it as it is
    (`asyncio.gather`, `wait_for`, `shield`, `ensure_future`). What wants tasks takes
    `asyncio.ensure_future(generation)`, as `asyncio.wait` does, and what wants coroutines (`asyncio.run`,
    `create_task`) takes one that awaits it.

    Leaving it early aborts what is unfinished and frees its pages: `aclose()`, `async with`, cancelling what
    waits for it (as `wait_for` does after its timeout), or just dropping it.

    Args:
        channel: where the samples arrive.
        abort: ends the requests. It must not hold on to this object, or that could never be dropped; and it
            must take no lock, because the garbage collector may call it in any thread, at any moment.
        stream: what awaiting gives.
        deltas: the prompts of which iterating gives what is new.
    """

    def __init__(
        self, channel: Channel, abort: Callable[[], None], *, stream: bool, deltas: Collection[int] = ()
    ) -> None:
        self._channel = channel
        self._deltas = deltas
        self._given: list[ReturnSample] = []
        self._stream = stream
        self._seen = 0
        self._abort = abort
        self._finalizer = weakref.finalize(self, abort)
        self._finalizer.atexit = False

    @property
    def request_ids(self) -> tuple[str, ...]:
        """One per prompt, in their order, for `vSurge.abort`."""
        return self._channel.request_ids

    def result(self, timeout_s: float | int | None = None) -> list[ReturnSample]:
        """Blocks until every prompt has ended.

        Args:
            timeout_s: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: not ended in time; generation goes on, and `result` may be called again.
            EngineFailed: the engine failed.
            StepFailed: a step of a prompt failed; its `samples` are those of the others.
            ValueError, TypeError: timeout_s is no number of at least 0.
        """
        if timeout_s is not None:
            timeout_s = as_number("timeout_s", timeout_s, 0.0, math.inf)
        if not self._channel.wait(0, until_finished=True, timeout_s=timeout_s):
            raise TimeoutError(f"timeout_s={timeout_s}: the generation has not ended yet")
        return self._latest()

    def abort(self) -> None:
        """Ends what is unfinished with finish_reason "abort"."""
        self._abort()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Generation | list[ReturnSample]:
        if self._stream:
            return self
        await self._wait_for(0, until_finished=True)
        return self._latest()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[ReturnSample]:
        while (samples := self._news()) is None:
            await self._wait_for(self._seen, until_finished=False)
        if not samples:
            raise StopAsyncIteration
        return samples

    def __iter__(self) -> Iterator[list[ReturnSample]]:
        while True:
            samples = self._news()
            if samples is None:
                self._channel.wait(self._seen, until_finished=False)
            elif samples:
                yield samples
            else:
                return

    async def aclose(self) -> None:
        """Aborts what is unfinished."""
        self._abort()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _news(self) -> list[ReturnSample] | None:
        """Samples not seen yet; None if there are none now, an empty list if there will be none any more."""
        is_over = self._channel.is_over()  # asked first: if so, nothing can come after what is read next
        news = self._channel.read(self._seen)
        if news is not None:
            self._seen, samples = news
            before, self._given = self._given or [None] * len(samples), samples
            return [
                _new_part(old, new) if i in self._deltas else new
                for i, (old, new) in enumerate(zip(before, samples, strict=True))
            ]
        return [] if is_over else None

    async def _wait_for(self, seen: int, *, until_finished: bool) -> None:
        try:
            await self._channel.wait_async(seen, until_finished=until_finished)
        except BaseException:  # cancelled: nobody wants the rest
            self._abort()
            raise

    def _latest(self) -> list[ReturnSample]:
        news = self._channel.read(-1)
        assert news is not None  # no version is -1
        return news[1]


def _new_part(before: ReturnSample | None, now: ReturnSample) -> ReturnSample:
    """A sample with what is new in text, tokens and their log-probabilities."""
    if before is None:
        return now
    return replace(
        now,
        text=_rest(before.text, now.text),
        token_ids=_rest(before.token_ids, now.token_ids),
        logprobs=_rest(before.logprobs, now.logprobs),
    )


def _rest(before: Any, now: Any) -> Any:
    """What has been appended; with several completions, to each."""
    if isinstance(now, list):
        each = cast("list[Any]", now)
        return [_rest(old, new) for old, new in zip(before, each, strict=True)]
    return now if now is None or before is None else now[len(before) :]
