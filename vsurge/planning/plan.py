"""A plan: what a model takes of a slice, and what it would do there."""

from __future__ import annotations

from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import jax

from ..kernels.tuning import Compilers, ReplayError, ScheduleError
from ..model import ConfigError
from .assumptions import PlanAssumptions, assumed
from .attention import Pending, predict_decode, predict_prefill
from .collectives import Collective, Interconnect, scaled
from .deployment import Deployment
from .fitting import deploy_for, memory_of, smallest_slice, what_is_too_much
from .memory import DeviceMemory
from .programs import ProgramFacts, compile_steps
from .question import Question
from .slices import Slice
from .timing import Attention, StepTime, time_of_step


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One decode step of a replica.

    Attributes:
        batch: sequences.
        context: tokens of each.
        fits: whether the cache holds them.
        time: predicted.
        replicas: engines of the slice, each with such a batch.
    """

    batch: int
    context: int
    fits: bool
    time: StepTime
    replicas: int

    @property
    def tokens_per_s(self) -> float:
        """Of the slice."""
        return self.batch * self.user_tokens_per_s * self.replicas

    @property
    def user_tokens_per_s(self) -> float:
        """Of each sequence."""
        return 1e6 / self.time.total


@dataclass(frozen=True, kw_only=True)
class PrefillStep:
    """A step with nothing but the average chunk of one prompt.

    Attributes:
        chunk: its tokens.
        context: tokens of the prompt.
        time: predicted.
        replicas: engines of the slice.
    """

    chunk: int
    context: int
    time: StepTime
    replicas: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens of prompts, of the slice."""
        return self.chunk * 1e6 / self.time.total * self.replicas


@dataclass(frozen=True, kw_only=True)
class SlicePlan:
    """The answer for one slice.

    Attributes:
        slice: which.
        tp: devices that share the model; 0 if it cannot be shared.
        refused: why it will not do; None if it does. What could be found out is there nevertheless.
        instead: where something does not fit, the smallest slice of the chip with room for its weights and
            cache, and how many of its devices share the model; None if there is none. Of a slice that is
            refused, for the smallest batch and context that were asked; else for the largest.
        memory: of a device; its temporaries and program are 0 where nothing was compiled.
        assumptions: of the times.
        programs: what the compiler says of the largest step of each kind.
        decode, prefill: steps.
    """

    slice: Slice
    tp: int
    refused: str | None = None
    instead: tuple[Slice, int] | None = None
    memory: DeviceMemory | None = None
    assumptions: PlanAssumptions
    programs: tuple[ProgramFacts, ...] = ()
    decode: tuple[DecodeStep, ...] = ()
    prefill: tuple[PrefillStep, ...] = ()

    @property
    def replicas(self) -> int:
        return self.slice.num_devices // self.tp if self.tp else 0


def plan_slice(
    question: Question, slice_: Slice, compilers: Compilers, *, show_progress: bool = False
) -> SlicePlan:
    """The plan of a slice; what does not fit or compile is an answer, too.

    Args:
        question: what is asked.
        slice_: of what.
        compilers: that the attention kernels are compiled in.
        show_progress: show a bar on a terminal.

    Raises:
        RuntimeError: libtpu is not installed.
        ConfigError: the weights cannot be quantized so.
    """
    assumptions = assumed(slice_, question.assumed)
    smallest = (min(question.batches), min(question.contexts))
    try:
        deployment = deploy_for(question, slice_)
    except ConfigError:
        raise
    except ValueError as error:
        instead = smallest_slice(question, slice_.chip, *smallest)
        return SlicePlan(slice=slice_, tp=0, refused=str(error), instead=instead, assumptions=assumptions)
    memory = memory_of(deployment, question, ())

    def refused(reason: str, programs: tuple[ProgramFacts, ...] = ()) -> SlicePlan:
        return SlicePlan(
            slice=slice_,
            tp=deployment.tp,
            refused=reason,
            instead=smallest_slice(question, slice_.chip, *smallest),
            memory=memory_of(deployment, question, programs),
            assumptions=assumptions,
            programs=programs,
        )

    if not memory.holds(*smallest):
        return refused(what_is_too_much(memory, *smallest))
    attention = _predictions(question, deployment, compilers, assumptions)
    try:
        programs = compile_steps(question, deployment, memory.num_pages, show_progress=show_progress)
        decoding, prompts = (pending.result() for pending in attention)
    except BrokenProcessPool:
        return refused("does not compile: the compiler crashed, or there is too little memory for it here")
    except (jax.errors.JaxRuntimeError, ReplayError, ScheduleError) as error:
        return refused(f"does not compile: {' '.join(str(error).split())}")
    memory = memory_of(deployment, question, programs)
    if not memory.holds(*smallest):
        return refused(what_is_too_much(memory, *smallest), programs)
    clock = _Clock(deployment, assumptions, max(question.batches), *programs)
    largest = (max(question.batches), max(question.contexts))
    return SlicePlan(
        slice=slice_,
        tp=deployment.tp,
        instead=None if memory.holds(*largest) else smallest_slice(question, slice_.chip, *largest),
        memory=memory,
        assumptions=assumptions,
        programs=programs,
        decode=tuple(
            DecodeStep(
                batch=batch,
                context=context,
                fits=memory.holds(batch, context),
                time=clock.decode(batch, each),
                replicas=deployment.replicas,
            )
            for (batch, context), each in zip(_batches(question), decoding, strict=True)
        ),
        prefill=tuple(
            PrefillStep(
                chunk=min(question.chunk, context),
                context=context,
                time=clock.prefill(min(question.chunk, context), each),
                replicas=deployment.replicas,
            )
            for context, each in zip(question.contexts, prompts, strict=True)
        ),
    )


def _batches(question: Question) -> list[tuple[int, int]]:
    return [(batch, context) for context in question.contexts for batch in question.batches]


def _predictions(
    question: Question, deployment: Deployment, compilers: Compilers, assumptions: PlanAssumptions
) -> tuple[Pending, Pending]:
    """Of decode steps and of prompts."""
    kernels, size, longest = assumptions.of_kernels(), question.page_size, question.max_length
    decode = predict_decode(
        deployment, _batches(question), compilers, kernels, page_size=size, max_context=longest
    )
    prefill = predict_prefill(
        deployment, question.contexts, compilers, kernels, page_size=size,
        max_seqs=max(question.batches), max_context=longest, chunk=question.chunk,
    )  # fmt: skip
    return decode, prefill


class _Clock:
    """Times of steps of any size, by the programs of one."""

    def __init__(
        self,
        deployment: Deployment,
        assumptions: PlanAssumptions,
        num_rows: int,
        decode: ProgramFacts,
        mixed: ProgramFacts,
    ) -> None:
        self._decode, self._mixed = decode, mixed
        self._num_rows = num_rows
        self._products = deployment.products()
        self._local_vocab = deployment.config.vocab_size // deployment.layout.size("vocab")
        self._assumptions = assumptions
        self._cores = deployment.slice.kind.cores_per_device
        self._interconnect = Interconnect.of(
            deployment.slice,
            deployment.tp,
            link_gbytes_per_s=assumptions.link_gbytes_per_s,
            hop_us=assumptions.hop_us,
        )

    def decode(self, batch: int, attention: Attention) -> StepTime:
        sent = scaled(self._decode.sent.always, batch / self._decode.size)
        return self._time(batch, batch, attention, sent)

    def prefill(self, tokens: int, attention: Attention) -> StepTime:
        """Of one prompt's tokens: a step computes logits of a row for each sequence that it has room for."""
        sent = scaled(self._mixed.sent.always, tokens / self._mixed.size)
        return self._time(tokens, min(self._num_rows, tokens), attention, sent)

    def _time(
        self, rows: int, logit_rows: int, attention: Attention, collectives: Counter[Collective]
    ) -> StepTime:
        return time_of_step(
            products=self._products,
            num_rows=rows,
            num_logit_rows=logit_rows,
            local_vocab=self._local_vocab,
            attention=attention,
            collectives=collectives,
            interconnect=self._interconnect,
            assumptions=self._assumptions,
            cores=self._cores,
        )
