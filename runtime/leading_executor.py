"""The executor of process 0 of several, which the others follow (`processes`)."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from contextlib import suppress
from typing import Any, NoReturn

import jax

from ..model import Model, Params
from .errors import EngineError
from .executor import Executor, StepCall
from .options import EngineOptions
from .processes import Processes
from .step import StepOutput
from .weights import assembled, checked_leaves, on_host, parts_of


class LeadingExecutor(Executor):
    """Process 0's: has the others do what it does.

    Args:
        model, options: as for `Executor`.
        processes: this one and the others.
    """

    def __init__(self, model: Model, options: EngineOptions, processes: Processes) -> None:
        super().__init__(model, options)
        self._processes = processes
        self._number = processes.begin(model, options)
        self._is_behind = False  # the others have begun a step that could not be begun here

    def compile(self, *, show_progress: bool) -> int:
        with self._processes.lock:
            self._processes.tell(self._number, "compile")
        return super().compile(show_progress=show_progress)  # at the same time

    def allocate(self) -> None:
        with self._processes.lock:
            self._processes.tell(self._number, "allocate")
            super().allocate()

    def release(self) -> None:
        with self._processes.lock:
            with suppress(EngineError):  # who has gone holds no memory
                self._processes.tell(self._number, "release")
            super().release()

    def recover(self, failure: Exception) -> None:
        """As of one process, if the step has run on the devices.

        Raises:
            EngineError: it has not, and the others may wait in it for ever: they are told to end.
        """
        if self._is_behind or isinstance(failure, jax.errors.JaxRuntimeError):
            self._end_all("a step failed in process 0", failure)
        super().recover(failure)

    def dispatch(self, call: StepCall) -> StepOutput:
        with self._processes.lock:
            self._processes.tell(self._number, "dispatch", call)
            self._is_behind = True
            output = super().dispatch(call)
            self._is_behind = False
            return output

    def place(self, params: Any) -> Params:
        """As of one process; each gets its parts from this one, array by array, while steps go on.

        Raises:
            TypeError, ValueError: as of one process, or an array of which other processes hold a part;
                nothing has been sent then.
            EngineError: it failed on the way, and the other processes are told to end.
        """
        current = self._model.params
        structure: Any = jax.tree.structure(current)
        leaves = checked_leaves(params, current)
        placed: list[jax.Array] = []
        try:
            for leaf, old in zip(leaves, jax.tree.leaves(current), strict=True):
                parts = parts_of(on_host(leaf), old.sharding)
                placed.append(assembled(parts[self._processes.process_id], old))
                self._processes.ask(self._number, "place", parts)
                jax.block_until_ready(placed[-1])
        except Exception as failure:  # noqa: BLE001  (whatever it is, the others have a part of the weights)
            self._end_all("new weights failed in process 0", failure)
        except BaseException:  # an interrupt by the user, who is to get it as such
            self._processes.fail("new weights were interrupted in process 0")
            raise
        return jax.tree.unflatten(structure, placed)

    def update(self, params: Params) -> None:
        with self._processes.lock:
            with suppress(EngineError):  # the next step says that they have gone
                self._processes.tell(self._number, "update")
            self._processes.has_updated(params)
            super().update(params)

    def _end_all(self, what: str, failure: Exception) -> NoReturn:
        reason = f"{what}: {type(failure).__name__}: {failure}"
        self._processes.fail(reason)
        raise EngineError(f"{reason}; the other processes have been told to end") from failure


def executor_of(model: Model, options: EngineOptions, processes: Processes | None) -> Executor:
    """The executor for a model, of this process alone or of all of them.

    Raises:
        ValueError: the model lies on several processes, and `processes` is None; or one has no part of it, or
            other weights.
        TypeError: `processes` is something else.
        EngineError: this is not process 0.
    """
    if processes is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"processes=None: this is one of {jax.process_count()} processes; give what join_processes "
                "returned"
            )
        return Executor(model, options)
    if not isinstance(processes, Processes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"processes={processes!r}: must be what join_processes returned, or None")
    if processes.process_id:
        raise EngineError(
            f"this is process {processes.process_id}, and process 0 builds the engine; call follow(model) of "
            "what join_processes returned"
        )
    return LeadingExecutor(model, options, processes)
