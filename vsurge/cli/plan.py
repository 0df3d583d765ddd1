"""`vsurge plan`: what a model takes of a slice of TPUs and would do there; no TPU is needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..kernels import SUPPORTED_DTYPES
from ..kernels.tuning import Compilers
from ..model.config import parse_dtype
from ..planning import Question, Slice, SlicePlan, parse_slice, plan_slice
from ..planning.assumptions import ALWAYS, explain, parse_plan_assumptions
from ..planning.collectives import Collective
from .info import find_config, find_quantization
from .plan_json import as_json
from .setup import parse_numbers

LABEL = 26  # columns of a table's labels


def run(args: argparse.Namespace) -> None:
    slices = chosen_slices(args)
    question = parse_question(args)
    if args.plot and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'vsurge[bench]'")
    with Compilers() as compilers:
        plans = [plan_slice(question, one, compilers, show_progress=True) for one in slices]
    if args.plot:
        from .plan_plot import draw_plans

        draw_plans(Path(args.plot).expanduser(), args.model, plans)
    if args.json:
        print(json.dumps(as_json(args.model, question, plans), indent=1))
        return
    for plan in plans:
        print("\n".join(describe(args.model, question, plan)) + "\n")
    if len(plans) > 1:
        print("\n".join(compare(question, plans)) + "\n")
    print("\n".join(describe_assumptions(question, plans)))
    if args.plot:
        print(f"\ndrawn in {args.plot}")


def chosen_slices(args: argparse.Namespace) -> list[Slice]:
    """The slices of --chip and --compare, each once.

    Raises:
        ValueError: none, or what is no slice.
    """
    texts = ([args.chip] if args.chip else []) + (args.compare.split(",") if args.compare else [])
    if not texts:
        raise ValueError("give --chip v6e:2x4, or --compare v5e:4x4,v6e:2x4 for several")
    return list(dict.fromkeys(parse_slice(text) for text in texts))


def parse_question(args: argparse.Namespace) -> Question:
    """What the options ask.

    Raises:
        ValueError: an option that is out of range.
        FileNotFoundError: no such model.
    """
    if args.page_size < 1:
        raise ValueError(f"--page-size {args.page_size}: must be at least 1")
    if not 0 < args.memory_utilization <= 1:
        raise ValueError(f"--memory-utilization {args.memory_utilization}: must be above 0 and at most 1")
    if args.tp is not None and args.tp < 1:
        raise ValueError(f"--tp {args.tp}: must be at least 1")
    config, folder = find_config(args.model, args.revision)
    if args.kv_dtype is not None:
        kv_dtype = parse_dtype(args.kv_dtype, "--kv-dtype", SUPPORTED_DTYPES)
        config = dataclasses.replace(config, kv_dtype=kv_dtype)
    contexts = parse_numbers("--context", args.context)
    if contexts[-1] > config.max_length or contexts[0] < 2:
        raise ValueError(
            f"--context {args.context}: must lie between 2 and the {config.max_length:,} tokens of the model"
        )
    if args.prefill < 1:
        raise ValueError(f"--prefill {args.prefill}: must be at least 1 token")
    return Question(
        config=config,
        quantization=find_quantization(args.quantization, folder),
        tp=args.tp,
        batches=parse_numbers("--batch", args.batch),
        contexts=contexts,
        page_size=args.page_size,
        chunk=min(args.prefill, contexts[-1]),
        utilization=args.memory_utilization,
        assumed=parse_plan_assumptions(args.assume or []),
    )


def describe(model: str, question: Question, plan: SlicePlan) -> list[str]:
    """What is printed of a slice."""
    lines = [title(model, question, plan)]
    if plan.refused is not None:
        lines.append(f"  does not run: {plan.refused}")
    if plan.memory is not None:
        lines += describe_memory(question, plan)
    if plan.instead is not None:
        lines.append(row("smallest slice", describe_instead(question, plan)))
    elif plan.refused is not None or not all(step.fits for step in plan.decode):
        lines.append(row("smallest slice", f"no slice of {plan.slice.chip} has room for it in one replica"))
    for program in plan.programs:
        name = f"{program.kind} step of {program.size:,}"
        lines.append(row(name, describe_sent(program.sent.always) or "sends nothing"))
    return lines + describe_decode(plan) + describe_prefill(plan)


def title(model: str, question: Question, plan: SlicePlan) -> str:
    weights = str(question.config.dtype) if question.quantization is None else question.quantization.method
    shared = f"tp {plan.tp}" if plan.tp else f"tp {question.tp or 'any'}"
    if plan.replicas > 1:
        shared += f", {plan.replicas} replicas"
    return (
        f"{model} on {plan.slice.name} ({plan.slice.num_chips} chips, {plan.slice.num_devices} devices): "
        f"{shared}, weights {weights}, cache {question.config.cache_dtype}, pages of {question.page_size}"
    )


def row(label: str, text: str) -> str:
    return f"  {label:<{LABEL}}{text}"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def describe_memory(question: Question, plan: SlicePlan) -> list[str]:
    memory = plan.memory
    assert memory is not None
    compiled = bool(plan.programs)
    parts = [
        ("weights", memory.weights), ("rows of the batch", memory.row_state),
        *([("temporaries", memory.temporaries), ("program", memory.program)] if compiled else []),
        ("cache", memory.cache),
    ]  # fmt: skip
    per = "core" if plan.slice.kind.devices_per_chip > 1 else "chip"
    lines = [row(f"memory of a {per}", f"{gib(memory.capacity)}, of which")]
    lines += [row(f"  {name}", f"{gib(size):>10}  {size / memory.capacity:6.1%}") for name, size in parts]
    fitting = ", ".join(f"{memory.sequences(c):,} of {c:,}" for c in question.contexts)
    lines.append(row("tokens of cache", f"{memory.tokens:,} a replica; sequences: {fitting} tokens"))
    return lines


def describe_instead(question: Question, plan: SlicePlan) -> str:
    assert plan.instead is not None
    slice_, tp = plan.instead
    pick = min if plan.refused is not None else max
    batch, context = pick(question.batches), pick(question.contexts)
    return (
        f"{slice_.name} with tp {tp} has room for {batch:,} of {context:,} tokens (weights and cache alone)"
    )


def describe_sent(sent: Any) -> str:
    """The collectives of a step, those of the most bytes first."""
    ordered: list[tuple[Collective, int]] = sorted(
        sent.items(), key=lambda item: -item[0].num_bytes * item[1]
    )
    return ", ".join(f"{count} {one.kind} of {size_of(one.num_bytes)}" for one, count in ordered)


def size_of(num_bytes: int) -> str:
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.3g} MiB"
    return f"{num_bytes / 2**10:.3g} KiB"


def describe_decode(plan: SlicePlan) -> list[str]:
    if not plan.decode:
        return []
    names = list(plan.decode[0].time.parts)
    lines = [
        "  decode: sequences of a replica x context; ms of a step, its parts; tokens/s of slice and user",
        f"  {'':16}{'step':>8}" + "".join(f"{name:>14}" for name in names)
        + f"{'tokens/s':>11}{'a user':>8}{'roofline':>10}  bound by",
    ]  # fmt: skip
    for step in plan.decode:
        parts = "".join(f"{time / 1e3:14.3f}" for time in step.time.parts.values())
        end = step.time.bound if step.fits else "does not fit"
        lines.append(
            f"  {step.batch:>6,} x{step.context:>8,}{step.time.total / 1e3:8.2f}{parts}"
            f"{step.tokens_per_s:11,.0f}{step.user_tokens_per_s:8.1f}{step.time.roofline:10.1%}  {end}"
        )
    return lines


def describe_prefill(plan: SlicePlan) -> list[str]:
    if not plan.prefill:
        return []
    lines = [
        "  prompts: tokens in a step x length of the prompt; ms of the average step; tokens/s of the slice"
    ]
    for step in plan.prefill:
        parts = "".join(f"{time / 1e3:14.3f}" for time in step.time.parts.values())
        lines.append(
            f"  {step.chunk:>6,} x{step.context:>8,}{step.time.total / 1e3:8.2f}{parts}"
            f"{step.tokens_per_s:11,.0f}{'':8}{step.time.roofline:10.1%}  {step.time.bound}"
        )
    return lines


def compare(question: Question, plans: Sequence[SlicePlan]) -> list[str]:
    """The slices side by side: decode steps, a column per slice."""
    lines = [f"{'tokens/s (of a user)':<24}" + "".join(f"{plan.slice.name:>22}" for plan in plans)]
    for context in question.contexts:
        for batch in question.batches:
            cells = "".join(f"{compare_cell(plan, batch, context):>22}" for plan in plans)
            lines.append(f"{f'{batch:,} x {context:,} a replica':<24}{cells}")
    tokens = (f"{plan.memory.tokens:,}" if plan.decode and plan.memory else "-" for plan in plans)
    lines.append(f"{'tokens of cache':<24}" + "".join(f"{each:>22}" for each in tokens))
    replicas = (f"{plan.replicas} x tp {plan.tp}" if plan.tp else "-" for plan in plans)
    return [*lines, f"{'replicas':<24}" + "".join(f"{each:>22}" for each in replicas)]


def compare_cell(plan: SlicePlan, batch: int, context: int) -> str:
    if plan.refused is not None:
        return "does not run"
    [step] = [step for step in plan.decode if (step.batch, step.context) == (batch, context)]
    return f"{step.tokens_per_s:,.0f} ({step.user_tokens_per_s:.1f})" if step.fits else "does not fit"


def describe_assumptions(question: Question, plans: Sequence[SlicePlan]) -> list[str]:
    """The assumptions of each chip, and those that have no number."""
    lines = ["assumed (--assume NAME=NUMBER for others)"]
    for plan in {plan.slice.chip: plan for plan in plans}.values():
        lines.append(f"  {plan.slice.chip}")
        for name, value, meaning, source in explain(plan.assumptions, question.assumed):
            lines.append(f"    {name:<18}{value:>9,g}  {meaning}: {source}")
    return lines + [f"  {text}" for text in ALWAYS]
