"""Runs planned steps on the device: one compiled program per bucket, nothing is compiled while serving."""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.profiler import TraceAnnotation

from ..kernels import KVPages
from ..model import Model, Params
from ..model.progress import progress_bar
from .blueprint import Blueprint
from .cache_size import check_room, out_of_memory
from .compilation_cache import compilation_cache
from .options import EngineOptions
from .request import Request
from .results import start_reading
from .rows import bias_of, counts_of
from .shaping import RowState
from .step import StepOutput
from .step_inputs import StepInputs
from .step_plan import StepKind, StepPlan
from .weights import placed_like

logger = logging.getLogger("vsurge.runtime")

CPU_OPTIMIZATION_LEVEL = "xla_backend_optimization_level"


RowContent = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int32]]


@dataclass(frozen=True)
class StepCall:
    """A step as the device sees it; it knows no requests, so another process can run it.

    Attributes:
        kind, bucket: which program.
        inputs: of it, NumPy arrays.
        masks: [num_rows, words], what the next tokens may be; None for any.
        row_contents: what is to be remembered of rows from this step on: each row's number, its bias [vocab]
            and the counts of its tokens [vocab].
    """

    kind: StepKind
    bucket: int
    inputs: StepInputs
    masks: npt.NDArray[np.uint32] | None
    row_contents: Sequence[RowContent]


class Executor:
    """Holds the cache, and runs steps.

    Args:
        model: shape and weights.
        options: the engine's; `max_length` bounds the page table.

    Attributes:
        num_compilations: programs compiled, or read from a persistent cache.
    """

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self._model = model
        self._options = options
        self._blueprint = Blueprint(model.config, options, model.layout)
        self.decode_buckets, self.mixed_buckets = (
            self._blueprint.decode_buckets,
            self._blueprint.mixed_buckets,
        )
        self._empty_layer = self._blueprint.empty_layer
        self._rows = self._blueprint.rows()
        self._device: Any = model.mesh.devices.flat[0]
        self.num_compilations = 0
        self._programs: dict[tuple[StepKind, int], jax.stages.Compiled] = {}
        self._kv_pages: tuple[KVPages, ...] = ()
        self._row_state: RowState | None = None
        self._no_masks: jax.Array | None = None  # on the device, for steps without any
        self._set_row: jax.stages.Compiled | None = None

    def check_room(self) -> None:
        """To be called before the first `allocate`: a process that uses more memory than there is, is killed.

        Raises:
            OutOfMemory: there is no room for the cache, as far as that can be known.
        """
        check_room(self._model, self._options.num_pages, self._options.page_size)

    def allocate(self) -> None:
        """Makes an empty cache on the devices.

        Raises:
            OutOfMemory: there is no room for it.
        """
        num_pages, page_size = self._options.num_pages, self._options.page_size
        try:
            self._kv_pages = tuple(self._empty_layer() for _ in range(self._model.config.num_layers))
            self._row_state = self._blueprint.empty_row_state()
            no_masks = self._blueprint.masks_without_any()
            self._no_masks = jax.make_array_from_callback(
                no_masks.shape, self._blueprint.everywhere, no_masks.__getitem__
            )
            jax.block_until_ready((self._kv_pages, self._row_state))
        except RuntimeError as error:  # jax.errors.JaxRuntimeError
            self.release()
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise out_of_memory(self._model, num_pages, page_size) from error

    def release(self) -> None:
        """Gives the cache's memory back; the compiled programs stay."""
        self._kv_pages, self._row_state, self._no_masks = (), None, None

    def recover(self, failure: Exception) -> None:
        """An empty cache in the place of one that a failed step may have lost.

        Args:
            failure: of the step, on the device or on the host.

        Raises:
            OutOfMemory: there is no room for it.
        """
        del failure
        self.release()
        self.allocate()

    def place(self, params: Any) -> Params:
        """Copies weights to where the current ones lie, for `update`; may be called while steps run.

        Raises:
            TypeError, ValueError: they are not like the current ones.
        """
        return placed_like(params, self._model.params)

    def update(self, params: Params) -> None:
        """Other weights from the next step on, of the same shapes and in the same places."""
        self._model = replace(self._model, params=params)

    def compile(self, *, show_progress: bool) -> int:
        """Compiles the program of every bucket that is not compiled yet, several at a time.

        Only this thread traces and lowers, which is Python; the others are XLA's.

        Returns:
            How many programs there are.
        """
        buckets: dict[StepKind, tuple[int, ...]] = {
            "decode": self.decode_buckets,
            "mixed": self.mixed_buckets,
        }
        wanted: list[tuple[StepKind, int]] = [(k, size) for k, sizes in buckets.items() for size in sizes]
        missing = [key for key in wanted if key not in self._programs]
        if not missing:
            return len(self._programs) + 1  # and the one that writes a row
        begin, compiled_before = time.perf_counter(), self.num_compilations
        with (
            compilation_cache(self._options.compilation_cache_dir),
            ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
        ):
            self._compile_set_row()
            futures = [pool.submit(self._compile_lowered, self._lower(*key)) for key in missing]
            for key, future in zip(
                progress_bar(missing, "compiling", show=show_progress, unit="program"), futures, strict=True
            ):
                self._programs[key] = future.result()
                self.num_compilations += 1
        _return_freed_memory()
        logger.info(
            "%d programs compiled in %.1f s: decode steps of %s sequences, mixed steps of %s tokens, and "
            "writing a row",
            self.num_compilations - compiled_before,
            time.perf_counter() - begin,
            list(self.decode_buckets),
            list(self.mixed_buckets),
        )
        return len(self._programs) + 1

    def _compile_set_row(self) -> jax.stages.Compiled:
        if self._set_row is None:
            self._set_row = self._compile_lowered(self._blueprint.trace_set_row().lower())
            self.num_compilations += 1
        return self._set_row

    def _lower(self, kind: StepKind, size: int) -> jax.stages.Lowered:
        return self._trace(kind, size).lower()

    def _trace(self, kind: StepKind, size: int) -> jax.stages.Traced:
        return self._blueprint.trace(self._model.params, kind, size)

    def _compile_lowered(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        return lowered.compile(compiler_options(self._device.platform))

    def run(self, plan: StepPlan) -> StepOutput:
        """Dispatches a step; what is wanted of its output, which is on the device."""
        if self._row_state is None:
            raise RuntimeError("the executor has no cache: allocate() first")
        bucket = self._blueprint.bucket_of(plan)
        with TraceAnnotation("vsurge.inputs"):
            inputs = self._blueprint.inputs(plan, bucket, self._rows)
            call = StepCall(plan.kind, bucket, inputs, self._masks(plan), self._row_contents())
        with TraceAnnotation("vsurge.dispatch"):
            return start_reading(inputs, self.dispatch(call))

    def dispatch(self, call: StepCall) -> StepOutput:
        """Begins a step of which only what the device needs is known."""
        for row, bias, counts in call.row_contents:
            self._row_state = self._compile_set_row()(self._row_state, np.int32(row), bias, counts)
        masks = self._no_masks if call.masks is None else call.masks
        output: StepOutput
        output, self._kv_pages, self._row_state = self._program(call.kind, call.bucket)(
            self._model.params, self._kv_pages, self._row_state, masks, call.inputs
        )
        return output

    def _program(self, kind: StepKind, bucket: int) -> jax.stages.Compiled:
        if (kind, bucket) not in self._programs:
            self._programs[kind, bucket] = self._compile_lowered(self._lower(kind, bucket))
            self.num_compilations += 1
        return self._programs[kind, bucket]

    def _row_contents(self) -> list[RowContent]:
        """What the device is to remember of requests that have come to their rows."""
        vocab_size = self._model.config.vocab_size
        taken = [request for rows in self._rows for request in rows.taken()]
        return [
            (self._row_of(request), bias_of(request, vocab_size), counts_of(request, vocab_size))
            for request in taken
            if request.is_biased or request.params.has_penalties
        ]

    def _row_of(self, request: Request) -> int:
        """Its row in the batch of all replicas."""
        return request.replica * self._options.rows_per_replica + request.row

    def _masks(self, plan: StepPlan) -> npt.NDArray[np.uint32] | None:
        """What each row's next token may be; None for any. The tokens before it are known where there is a
        mask."""
        masked = [request for request, _, _, outputs in plan.chunks if outputs and request.masks]
        if not masked:
            return None
        masks = self._blueprint.masks_without_any()
        for request in masked:
            for mask in request.masks:
                mask.restrict(masks[self._row_of(request)])
        return masks


def _return_freed_memory() -> None:
    """To the system: glibc would keep what the compiler freed, a quarter of a GiB after eight programs."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
        if trim is not None:
            trim(0)


def compiler_options(platform: str) -> dict[str, Any] | None:
    """XLA's options for a step's program; None for its own.

    On a CPU LLVM's first level of optimization instead of its highest: a quarter less time to compile and,
    measured on Qwen3-0.6B, steps no slower, for the matrix products are library calls. An option given here
    would overrule XLA_FLAGS, so a level that is named there stays.
    """
    if platform != "cpu" or CPU_OPTIMIZATION_LEVEL in os.environ.get("XLA_FLAGS", ""):
        return None
    return {CPU_OPTIMIZATION_LEVEL: 1}
