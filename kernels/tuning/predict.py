# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""How long a kernel call takes on a TPU, predicted from the compiler's schedule of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from .calls import Batch, Call
from .chips import find_chip
from .compiler import trace_for
from .loops import Execution
from .operands import kernel_operands
from .prediction import Assumptions, KernelRun, Prediction
from .replay import Replay, replay
from .schedule import Schedule, ScheduleError, read_schedules

DUMPS = "(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization)"


class Compilers:
    """Processes that compile for a TPU and replay what the compiler made: `with Compilers() as compilers`.

    The compiler writes its schedule down only if it is told to before it is loaded; so it is loaded in
    processes of its own, which start on first use. (They import the main program's module anew, as Python's
    `multiprocessing` does: a script that uses this begins with `if __name__ == "__main__":`.)
    """

    def __init__(self, processes: int | None = None) -> None:
        """Of as many processes as there are cores, or `processes`."""
        self._pool = ProcessPoolExecutor(
            processes or os.cpu_count(), mp_context=get_context("spawn"), initializer=_prepare
        )

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def schedules(self, call: Call, chip: str) -> Future[list[Schedule]]:
        """The schedules of a call's kernels.

        Raises (from the future):
            ValueError: an unknown chip, or a call that the kernel refuses.
            RuntimeError: libtpu is not installed.
            jax.errors.JaxRuntimeError: what the compiler refuses, in its own words.
            ScheduleError: the compiler's dumps are not in the known format.
        """
        return self.schedules_of(call.function(), call.arguments(), chip, donate_argnums=call.donate_argnums)

    def schedules_of(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        chip: str,
        *,
        donate_argnums: tuple[int, ...] = (),
    ) -> Future[list[Schedule]]:
        """The schedules of the Pallas kernels in a function.

        Args:
            function: of a module, or a `functools.partial` of one: a process is sent its name.
            arguments, chip, donate_argnums: as for `compile_for`.

        Raises (from the future): as `schedules`.
        """
        return self._pool.submit(_schedules, function, arguments, chip, donate_argnums)

    def predict(
        self,
        call: Call,
        batches: Sequence[Batch],
        chip: str,
        assumptions: Sequence[Assumptions] | None = None,
    ) -> Future[list[Prediction]]:
        """Compiles a call once, and predicts its time for each batch under each of the assumptions.

        Args:
            call: shapes and block sizes.
            batches: lengths.
            chip: one of `CHIPS`.
            assumptions: None for `Assumptions.of(chip)`.

        Raises:
            ValueError: an unknown chip.

        Raises (from the future):
            ReplayError: the program cannot be replayed.
            Others: as `schedules`.
        """
        find_chip(chip)
        return self._pool.submit(_predict, call, batches, chip, assumptions or [Assumptions.of(chip)])


def predict(
    call: Call,
    batch: Batch,
    chip: str,
    assumptions: Assumptions | None = None,
    *,
    compilers: Compilers | None = None,
) -> Prediction:
    """Predicts the time of one call; see `Compilers.predict`, with which several are predicted faster."""
    if compilers is None:
        with Compilers(1) as own:
            return predict(call, batch, chip, assumptions, compilers=own)
    return compilers.predict(call, [batch], chip, [assumptions] if assumptions else None).result()[0]


def _prepare() -> None:
    """Begins a compiling process: none of this has an effect once the compiler is loaded."""
    folder = tempfile.TemporaryDirectory(prefix="vsurge-schedules-")
    _folder.append(folder)
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=.*{DUMPS}.*"
    )
    # what a machine without a TPU would be searched for
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")


_folder: list[tempfile.TemporaryDirectory[str]] = []  # of this process; removed when it ends


def _schedules(
    function: Callable[..., Any], arguments: Sequence[Any], chip: str, donate_argnums: tuple[int, ...]
) -> list[Schedule]:
    return _compile(trace_for(chip, function, *arguments, donate_argnums=donate_argnums), chip)


def _compile(traced: jax.stages.Traced, chip: str) -> list[Schedule]:
    folder = Path(_folder[0].name)
    for old in folder.iterdir():
        old.unlink()
    traced.lower().compile()
    return read_schedules(folder, chip)


def _predict(
    call: Call, batches: Sequence[Batch], chip: str, assumptions: Sequence[Assumptions]
) -> list[Prediction]:
    traced = trace_for(chip, call.function(), *call.arguments(), donate_argnums=call.donate_argnums)
    schedules = {_plain(schedule.kernel): schedule for schedule in _compile(traced, chip)}
    predictions = list[Prediction]()
    for batch in batches:
        given = kernel_operands(traced.jaxpr, call.metadata(batch))
        for assumed in assumptions:
            runs = list[KernelRun]()
            for kernel in given:
                schedule = schedules.get(_plain(kernel.kernel))
                if schedule is None:
                    raise ScheduleError(f"no schedule of {kernel.kernel}, but of {list(schedules)}")
                happened = replay(schedule, kernel.operands, assumed.memory())
                runs.append(_run_of(kernel.kernel, schedule, happened))
            predictions.append(Prediction(call, batch, chip, assumed, tuple(runs)))
    return predictions


def _run_of(kernel: str, schedule: Schedule, happened: Replay) -> KernelRun:
    filled = sum(
        count * (length - sum(schedule.empty[at : at + length]))
        for at, (count, length) in happened.visits.items()
    )
    execution = Execution(schedule, happened)
    work, loops = (execution.work(), execution.busiest()), execution.loops()
    return KernelRun(kernel, happened, filled, *work, loops, execution.spills(), schedule.vector_memory)


def _plain(name: str) -> str:
    """A kernel's name as far as the compiler keeps it."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
