"""What callers do with an engine as a whole: start and stop it, watch it, give it other weights."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from ..model import Model
from .checks import as_number
from .engine import Engine
from .executor import Executor
from .metrics import EngineMetrics

AnyEngine = TypeVar("AnyEngine", bound="LifeCycle")  # beartype cannot check typing.Self in a decorated class


class LifeCycle:
    """The part of `vSurge` that is about no single call of `generate`.

    Args:
        model: what it runs.
        engine, executor: how.
        verbose: show progress bars on a terminal.

    Attributes:
        model: with the weights of the latest `update_params`.
    """

    def __init__(self, model: Model, engine: Engine, executor: Executor, *, verbose: bool) -> None:
        self.model = model
        self._engine = engine
        self._executor = executor
        self._verbose = verbose
        self._updating = threading.Lock()  # weights, one after another

    def compile(self) -> int:
        """Compiles the programs of all buckets, with a progress bar; what is compiled stays so.

        A persistent cache is used if there is one: see `compilation_cache_dir` of `from_model`.

        Returns:
            The number of programs: at most 17, or as many as `prefill_lengths` has and 9 more. Which ones is
            logged (level INFO).

        Raises:
            OSError: `compilation_cache_dir` cannot be made.
        """
        return self._executor.compile(show_progress=self._verbose)

    def start(self) -> None:
        """Starts the engine; compiles first what `compile` has not, so that serving never does.

        Nothing happens if it runs; one that is paused stays so.

        Raises:
            OutOfMemory: the cache does not fit the device; the message has a `num_pages` that would.
            EngineError: it is being stopped in another thread.
        """
        self._engine.check_room()  # known before anything is compiled
        self.compile()
        self._engine.start()

    def stop(self, *, drain: bool = True, timeout_s: float | int | None = None) -> bool:
        """Stops the engine and gives the cache's memory back; `start` may be called again.

        Args:
            drain: finish all requests first, for which one that is paused goes on; otherwise they end with
                finish_reason "abort".
            timeout_s: seconds that finishing may take. What has not finished then is aborted, and `stop`
                returns as soon as the step under way is over. None for any time.

        Returns:
            Whether all requests came to their own end. False: since the start some were aborted by a `stop`,
            or lost to a failure of the engine.

        Raises:
            ValueError, TypeError: timeout_s is no positive number, or was given with drain=False.
        """
        if timeout_s is not None:
            timeout_s = as_number("timeout_s", timeout_s, 0.0, math.inf, low_open=True)
            if not drain:
                raise ValueError(f"timeout_s={timeout_s}: is for drain=True; drain=False aborts at once")
        return self._engine.stop(drain=drain, timeout_s=timeout_s)

    def pause(self) -> None:
        """Runs no further step until `resume`; returns once the one under way is over.

        Requests keep their state and their pages, and new ones are taken, up to `max_queued_requests`. They
        may be aborted, and their `timeout_s` goes on. Nothing happens if it is paused already.

        Raises:
            EngineStopped, EngineFailed: the engine does not run.
        """
        self._engine.pause()

    def resume(self) -> None:
        """Goes on after `pause`; nothing happens if it is not paused.

        Raises:
            EngineStopped, EngineFailed: the engine does not run.
        """
        self._engine.resume()

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called, and nothing since that lets steps run."""
        return self._engine.is_paused

    @property
    def metrics(self) -> EngineMetrics:
        """How the engine is doing: the latest snapshot, which costs nothing to read."""
        return self._engine.metrics

    def abort(self, request_id: str) -> bool:
        """Ends a request with finish_reason "abort", from any thread; its pages are free one step later.

        Args:
            request_id: of a `ReturnSample` or of `Generation.request_ids`.

        Returns:
            True if it was under way; it may still come to its own end in the step that runs. False if it has
            ended, or no request of this engine has that id.

        Raises:
            TypeError: request_id is no string.
        """
        if not isinstance(request_id, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"request_id={request_id!r}: must be a string, as ReturnSample.request_id is")
        return self._engine.abort_id(request_id)

    def update_params(self, params: Any) -> None:
        """Gives the engine other weights; returns when every step that begins uses them.

        They are copied, so the caller may donate or delete them; the old ones go when nobody else holds them,
        and until then both are in memory. The step under way ends with the old weights. Cached prefixes are
        forgotten, and the keys and values of requests under way are computed anew from all of their tokens
        (it counts as a preemption of theirs): the tokens that they have stay, the next ones are the new
        weights'; `prompt_logprobs` are of the weights that gave the first token. Works in every state of the
        engine. `model` is replaced, and other engines keep theirs.
        The first call compiles the copying, in the caller's thread.

        Of several processes, process 0 has all of the weights and sends each of the others its parts, one
        array after another, while steps go on. An engine that is built afterwards takes this `model`.

        Args:
            params: a `Params` like `model.params`, of jax's or NumPy's arrays. Of several processes: of
                arrays that process 0 can read, none of which lies in parts on others' devices.

        Raises:
            ValueError, TypeError: another structure, shape or dtype; the message names the first array that
                differs, with both. The engine goes on with the old weights.
            EngineError: it failed on the way to other processes, which end, as this one's engine does.
        """
        with self._updating:
            placed = self._executor.place(params)
            self._engine.update(placed)
            self.model = replace(self.model, params=placed)

    def __enter__(self: AnyEngine) -> AnyEngine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(drain=error is None)
