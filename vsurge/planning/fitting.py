"""How a model is shared by a slice's devices, whether it fits, and which slice it would fit."""

from __future__ import annotations

import math

from ..model import ConfigError
from .deployment import Deployment, deploy
from .memory import DeviceMemory
from .programs import ProgramFacts
from .question import Question
from .slices import Slice, slices_of


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
    """A device's memory, with what the compiled steps need: a decode step of more sequences in proportion."""
    rows = max(question.batches)

    def temporaries(program: ProgramFacts) -> int:
        more = rows / program.size if program.kind == "decode" else 1.0
        return math.ceil(program.temporaries * max(more, 1.0))

    return DeviceMemory(
        capacity=deployment.slice.kind.hbm_bytes,
        weights=deployment.weight_bytes(),
        row_state=deployment.row_state_bytes(rows),
        temporaries=max(map(temporaries, programs), default=0),
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
