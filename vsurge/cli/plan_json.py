"""A plan as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..planning import Question, SlicePlan
from ..planning.assumptions import ALWAYS, explain


def as_json(model: str, question: Question, plans: Sequence[SlicePlan]) -> dict[str, Any]:
    """Everything that is known, times in microseconds, sizes in bytes."""
    return {
        "model": model,
        "quantization": None if question.quantization is None else question.quantization.method,
        "kv_dtype": str(question.config.cache_dtype),
        "slices": [_plan_json(question, plan) for plan in plans],
        "assumed": list(ALWAYS),
    }


def _plan_json(question: Question, plan: SlicePlan) -> dict[str, Any]:
    memory = plan.memory
    return {
        "slice": plan.slice.name,
        "chips": plan.slice.num_chips,
        "devices": plan.slice.num_devices,
        "tp": plan.tp,
        "replicas": plan.replicas,
        "refused": plan.refused,
        "instead": plan.instead and {"slice": plan.instead[0].name, "tp": plan.instead[1]},
        "memory": memory
        and asdict(memory)
        | {
            "cache": memory.cache,
            "num_pages": memory.num_pages,
            "tokens": memory.tokens,
            "sequences": {context: memory.sequences(context) for context in question.contexts},
        },
        "programs": [
            {name: value for name, value in vars(program).items() if name != "sent"}
            | {"collectives": _sent_json(program.sent.always)}
            | {"collectives_in_branches": _sent_json(program.sent.sometimes)}
            for program in plan.programs
        ],
        "decode": [
            _time_json(step)
            | {"batch": step.batch, "fits": step.fits, "user_tokens_per_s": step.user_tokens_per_s}
            for step in plan.decode
        ],
        "prefill": [_time_json(step) | {"chunk": step.chunk} for step in plan.prefill],
        "assumptions": {
            name: {"value": value, "meaning": meaning, "source": source}
            for name, value, meaning, source in explain(plan.assumptions, question.assumed)
        },
    }  # fmt: skip


def _sent_json(sent: Any) -> list[dict[str, Any]]:
    return [asdict(one) | {"count": count} for one, count in sorted(sent.items())]


def _time_json(step: Any) -> dict[str, Any]:
    return {
        "context": step.context,
        "step_us": step.time.total,
        "parts_us": step.time.parts,
        "tokens_per_s": step.tokens_per_s,
        "roofline": step.time.roofline,
        "bound": step.time.bound,
    }
