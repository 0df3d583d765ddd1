# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The engine's own steps, compiled for a slice; and what a step of all layers is like, by those of few.

A step of 64 layers takes long to compile and says nothing that one of three does not: layers are alike, so
that what the third one adds is what each of the others would.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import jax

from ..kernels.tuning.compiler import UNREADABLE
from ..model.progress import progress_bar
from ..runtime.blueprint import Blueprint
from ..runtime.options import EngineOptions, options_for
from ..runtime.step_plan import StepKind
from .collectives import Collective, Sent, collectives_of
from .deployment import Deployment, deploy
from .question import Question
from .slices import Slice

# Layers of the programs that are compiled. (A second layer adds temporaries that no further one does: in a
# mixed step of 1,024 tokens of Qwen3-32B over eight v6e 27 MB, where a third and fourth add 1.6 each.)
FEW = (2, 3)
# Sequences that they are compiled for at most: sorting rows of logits takes the compiler half a second a row.
MOST_ROWS = 64


@dataclass(frozen=True)
class ProgramFacts:
    """What the compiler says of a step on one device; sizes in bytes.

    Attributes:
        kind: of the step.
        size: sequences of a decode step, tokens of a mixed one.
        arguments: weights, cache, what is remembered of rows, and inputs.
        outputs: of which most are `aliased`: the arguments' own memory.
        temporaries: what else it needs while it runs.
        code: of the program.
        sent: its collectives.
    """

    kind: StepKind
    size: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    sent: Sent


def engine_options(
    deployment: Deployment, *, num_rows: int, max_length: int, page_size: int, num_pages: int, chunk: int
) -> EngineOptions:
    """An engine's own options for a batch.

    Args:
        deployment: model and devices.
        num_rows: sequences that decode together.
        max_length: of the longest one, tokens.
        page_size: tokens per page.
        num_pages: of the cache.
        chunk: tokens of a step with prompts.
    """
    return options_for(
        deployment.model,
        max_concurrent_decodes=num_rows,
        max_concurrent_prefill=None,
        max_prefill_length=min(chunk, max_length),
        max_batched_tokens=max(chunk, num_rows),
        prefill_lengths=None,
        decode_steps=1,
        prefix_caching=True,
        max_length=max_length,
        page_size=page_size,
        memory_utilization=1.0,
        num_pages=num_pages,
        max_queued_requests=1,
        extra_eos_token_ids=(),
        seed=0,
        vsurge_name="plan",
        verbose=False,
        compilation_cache_dir=None,
    )


def compile_steps(
    question: Question, deployment: Deployment, num_pages: int, *, show_progress: bool
) -> tuple[ProgramFacts, ProgramFacts]:
    """The largest decode step and the largest mixed one, of all layers, by those of few.

    The decode step is of `MOST_ROWS` sequences where larger batches are asked for. The compiler runs in
    processes of its own: one that crashes takes nothing else with it.

    Args:
        question: batch, contexts and chunk.
        deployment: model and devices.
        num_pages: of the cache.
        show_progress: show a bar on a terminal.

    Raises:
        jax.errors.JaxRuntimeError: what the compiler refuses, in its own words.
        BrokenProcessPool: the compiler ended without an answer.
    """
    rows = min(max(question.batches), MOST_ROWS)
    sizes: dict[StepKind, int] = {"decode": rows, "mixed": max(question.chunk, rows)}
    work: list[tuple[StepKind, int]] = [(kind, layers) for kind in sizes for layers in FEW]
    found = dict[tuple[StepKind, int], ProgramFacts]()
    bar = f"compiling for {deployment.slice.name}"
    compile_one = partial(_compile, question, deployment.slice, deployment.tp, num_pages, rows)
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(work)), get_context("spawn"), _prepare)
    try:
        futures = [pool.submit(compile_one, layers, kind, sizes[kind]) for kind, layers in work]
        for key, future in zip(
            progress_bar(work, bar, show=show_progress, unit="program"), futures, strict=True
        ):
            found[key] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    decode, mixed = (
        with_layers(found[kind, FEW[0]], found[kind, FEW[1]], deployment.config.num_layers) for kind in sizes
    )
    return decode, mixed


def _prepare() -> None:
    """Begins a compiling process."""
    jax.config.update("jax_platforms", "cpu")
    # Without a device a program in the compilation cache cannot be loaded: jax says so, and compiles.
    warnings.filterwarnings("ignore", UNREADABLE, UserWarning)


def _compile(
    question: Question,
    slice_: Slice,
    tp: int,
    num_pages: int,
    num_rows: int,
    num_layers: int,
    kind: StepKind,
    size: int,
) -> ProgramFacts:
    """A step of the first layers, for a batch of `num_rows` at most."""
    few = deploy(question.config, question.quantization, slice_, tp).of_layers(num_layers)
    options = engine_options(
        few, num_rows=num_rows, max_length=question.max_length, page_size=question.page_size,
        num_pages=num_pages, chunk=question.chunk,
    )  # fmt: skip
    return facts_of(lower_step(few, options, kind, size).compile(), kind, size)


def lower_step(
    deployment: Deployment, options: EngineOptions, kind: StepKind, size: int
) -> jax.stages.Lowered:
    """A step of the engine, to be compiled for the slice.

    Args:
        deployment: model and devices.
        options: the engine's.
        kind: of the step.
        size: sequences of a decode step, tokens of a mixed one.
    """
    layout = deployment.layout
    with jax.set_mesh(layout.mesh):  # by which kernels know that they are traced for a TPU
        return (
            Blueprint(deployment.config, options, layout).trace(deployment.model.params, kind, size).lower()
        )


def facts_of(program: jax.stages.Compiled, kind: StepKind, size: int) -> ProgramFacts:
    """What the compiler says of a step."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("the compiler does not say what memory the program takes")
    return ProgramFacts(
        kind,
        size,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        collectives_of(program),
    )


def with_layers(two: ProgramFacts, three: ProgramFacts, num_layers: int) -> ProgramFacts:
    """The facts of a step of so many layers, by those of steps of two layers and of three.

    Raises:
        ValueError: the step of two layers sends what the step of three does not.
    """
    more = num_layers - FEW[0]

    def at(first: int, second: int) -> int:
        return first + more * max(second - first, 0)

    def counted(first: Counter[Collective], second: Counter[Collective]) -> Counter[Collective]:
        if first - second:
            raise ValueError(f"a step of two layers sends what one of three does not: {first - second}")
        return first + Counter({each: count * more for each, count in (second - first).items()})

    return ProgramFacts(
        two.kind,
        two.size,
        at(two.arguments, three.arguments),
        at(two.outputs, three.outputs),
        at(two.aliased, three.aliased),
        at(two.temporaries, three.temporaries),
        at(two.code, three.code),
        Sent(counted(two.sent.always, three.sent.always), counted(two.sent.sometimes, three.sent.sometimes)),
    )
