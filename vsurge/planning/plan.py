"""A plan: what a model takes of a slice, and what it would do there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import jax

from ..kernels.tuning import Compilers, ReplayError, ScheduleError
from ..model import ConfigError, Quantization, Qwen3Config
from ..model.progress import progress_bar
from ..runtime.scheduler import StepKind
from .assumptions import PlanAssumptions, assumed
from .attention import Pending, predict_decode, predict_prefill
from .collectives import Collective, Interconnect, scaled
from .deployment import Deployment, deploy
from .memory import DeviceMemory
from .programs import ProgramFacts, compile_step, engine_options, facts_of, with_layers
from .slices import Slice, slices_of
from .timing import Attention, StepTime, time_of_step

FEW = (1, 2)  # layers of the programs that are compiled


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is asked for.

    Attributes:
        config: the model.
        quantization: of its weights.
        tp: devices that share it; None for as many as the slice has, or as can share it evenly.
        batches: sequences that decode together, ascending.
        contexts: tokens of each, ascending.
        page_size: tokens per page of the cache.
        chunk: tokens of prompts in a step.
        utilization: the cache's share of what weights and rows leave.
        assumed: assumptions that differ from those of `PlanAssumptions.of`.
    """

    config: Qwen3Config
    quantization: Quantization | None
    tp: int | None
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    page_size: int
    chunk: int
    utilization: float
    assumed: dict[str, float]

    @property
    def max_length(self) -> int:
        return max(self.contexts)


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
        programs = _programs(question, deployment, memory.num_pages, show_progress=show_progress)
        decoding, prompts = (pending.result() for pending in attention)
    except (jax.errors.JaxRuntimeError, ReplayError, ScheduleError) as error:
        return refused(f"does not compile: {' '.join(str(error).split())}")
    memory = memory_of(deployment, question, programs)
    if not memory.holds(*smallest):
        return refused(what_is_too_much(memory, *smallest), programs)
    clock = _Clock(deployment, assumptions, *programs)
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


def deploy_for(question: Question, slice_: Slice, *, any_tp: bool = False) -> Deployment:
    """The model on a slice, shared as was asked; or, with `any_tp` too, as widely as it can be.

    Raises:
        ValueError: it cannot be shared so.
    """
    if question.tp is not None and not any_tp:
        return deploy(question.config, question.quantization, slice_, question.tp)
    number = slice_.num_devices
    refusal = ValueError(f"no devices in {slice_.name}")
    for tp in sorted((n for n in range(1, number + 1) if number % n == 0), reverse=True):
        try:
            return deploy(question.config, question.quantization, slice_, tp)
        except ConfigError:
            raise
        except ValueError as error:
            refusal = error
    raise refusal


def memory_of(deployment: Deployment, question: Question, programs: tuple[ProgramFacts, ...]) -> DeviceMemory:
    """A device's memory, with what the compiled steps need."""
    return DeviceMemory(
        capacity=deployment.slice.kind.hbm_bytes,
        weights=deployment.weight_bytes(),
        row_state=deployment.row_state_bytes(max(question.batches)),
        temporaries=max((program.temporaries for program in programs), default=0),
        program=sum(program.code for program in programs),
        page=deployment.page_bytes(question.page_size),
        page_size=question.page_size,
        utilization=question.utilization,
    )


def smallest_slice(question: Question, chip: str, batch: int, context: int) -> tuple[Slice, int] | None:
    """The smallest slice with room for weights and cache, not counting what steps need; and its tp."""
    for slice_ in slices_of(chip):
        try:
            deployment = deploy_for(question, slice_, any_tp=True)
        except ConfigError:
            raise
        except ValueError:
            continue
        if memory_of(deployment, question, ()).holds(batch, context):
            return slice_, deployment.tp
    return None


def what_is_too_much(memory: DeviceMemory, batch: int, context: int) -> str:
    """Why a batch does not fit, with the numbers."""
    sizes = {"weights": memory.weights, "what is remembered of rows": memory.row_state}
    if memory.program:
        sizes |= {"temporaries": memory.temporaries, "programs": memory.program}
    taken = ", ".join(f"{name} ({size / 2**30:.2f} GiB)" for name, size in sizes.items())
    capacity = f"the {memory.capacity / 2**30:.2f} GiB of a device"
    if memory.left <= 0:
        return f"{taken} are more than {capacity}"
    needed = f"{batch:,} of {context:,} tokens need {batch * context:,}"
    return f"{taken} leave {memory.tokens:,} tokens of cache in {capacity}; {needed}"


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


def _programs(
    question: Question, deployment: Deployment, num_pages: int, *, show_progress: bool
) -> tuple[ProgramFacts, ProgramFacts]:
    """The largest decode step and the largest mixed one, of all layers, by those of few."""
    rows = max(question.batches)
    sizes: dict[StepKind, int] = {"decode": rows, "mixed": max(question.chunk, rows)}
    work = [(kind, layers) for kind in sizes for layers in FEW]
    found = dict[tuple[StepKind, int], ProgramFacts]()
    bar = f"compiling for {deployment.slice.name}"
    for kind, layers in progress_bar(work, bar, show=show_progress, unit="program"):
        few = deployment.of_layers(layers)
        options = engine_options(
            few, num_rows=rows, max_length=question.max_length, page_size=question.page_size,
            num_pages=num_pages, chunk=question.chunk,
        )  # fmt: skip
        program = compile_step(few, options, kind, sizes[kind])
        found[kind, layers] = facts_of(program, kind, sizes[kind])
    decode, mixed = (
        with_layers(found[kind, FEW[0]], found[kind, FEW[1]], deployment.config.num_layers) for kind in sizes
    )
    return decode, mixed


class _Clock:
    """Times of steps of any size, by the programs of one."""

    def __init__(
        self, deployment: Deployment, assumptions: PlanAssumptions, decode: ProgramFacts, mixed: ProgramFacts
    ) -> None:
        self._decode, self._mixed = decode, mixed
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
        return self._time(tokens, min(self._decode.size, tokens), attention, sent)

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
