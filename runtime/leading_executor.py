"""The executor of process 0 of several, which the others follow (`processes`)."""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

import jax

from ..model import Model
from .errors import EngineError
from .executor import Executor, StepCall
from .options import EngineOptions
from .processes import Processes
from .step import StepOutput


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
            self._processes.tell(self._number, "release")
            super().release()

    def recover(self, failure: Exception) -> None:
        """As of one process, if the step has run on the devices.

        Raises:
            EngineError: it has not, and the others may wait in it for ever: they are told to end.
        """
        if not self._is_behind and not isinstance(failure, jax.errors.JaxRuntimeError):
            return super().recover(failure)
        reason = f"a step failed in process 0: {type(failure).__name__}: {failure}"
        self._processes.fail(reason)
        raise EngineError(f"{reason}; the other processes have been told to end") from failure

    def dispatch(self, call: StepCall) -> StepOutput:
        with self._processes.lock:
            self._processes.tell(self._number, "dispatch", call)
            self._is_behind = True
            output = super().dispatch(call)
            self._is_behind = False
            return output


def executor_of(model: Model, options: EngineOptions, processes: Processes | None) -> Executor:
    """The executor for a model, of this process alone or of all of them.

    Raises:
        ValueError: the model lies on several processes, and `processes` is None; or one has no part of it.
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
