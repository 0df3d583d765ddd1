"""`vsurge tune`: block sizes of a model's attention kernels; for a TPU predicted, or timed if it is here."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..kernels import SUPPORTED_DTYPES
from ..kernels.block_sizes import Entry, device_here, read_table, user_table_path, write_table
from ..kernels.block_sizes.table import merged
from ..kernels.tpu.shapes import SUBLANES
from ..kernels.tuning import CHIPS, Assumptions, Call, Compilers, LoopRun, Prediction
from ..kernels.tuning.search import Search, Trial, start_search
from ..kernels.tuning.timing import time_call
from ..model.progress import progress_bar
from . import tune_gpu
from .info import find_config
from .setup import parse_numbers

Found = tuple[Search, list[Trial], list[Entry]]


def run(args: argparse.Namespace) -> None:
    contexts = parse_numbers("--contexts", args.contexts)
    calls = kernel_calls(args)
    if args.chip not in CHIPS:
        tune_gpu.run(args, calls, contexts)
        return
    check_plot(args)
    assumptions = parse_assumptions(args.assume or [], args.chip)
    is_here = device_here() == args.chip
    found = list[Found]()
    with Compilers() as compilers:
        searches = [
            start_search(call, contexts, args.chip, compilers, few=args.few, assumptions=assumptions)
            for call in calls
        ]
        steps = [(search, at) for search in searches for at in range(len(search.pending))]
        trials: dict[int, list[Trial]] = {id(search): [] for search in searches}
        for search, at in progress_bar(steps, "tuning", show=True, unit="candidate"):
            trials[id(search)].append(search.finish(at, time_call if is_here else None))
        found = [(search, trials[id(search)], search.winners(trials[id(search)])) for search in searches]
    table = Path(args.out).expanduser() if args.out else user_table_path(args.chip)
    write_table(table, merged(read_table(table), [entry for *_, entries in found for entry in entries]))
    written = [table]
    if not args.no_plot:
        from .roofline import draw_roofline

        written.append(plot_path(args, table))
        draw_roofline(written[-1], args.chip, f"{args.model} over {args.tp}", found)
    if args.json:
        print(json.dumps(as_json(found, written), indent=1))
        return
    for search, tried, entries in found:
        print("\n".join(describe(search, tried, entries)) + "\n")
    print("written to " + " and ".join(map(str, written)))


def parse_assumptions(texts: Sequence[str], chip: str) -> Assumptions:
    """The chip's assumptions with others from "latency_us=2" and the like.

    Raises:
        ValueError: no such assumption, or no number that it can be.
    """
    assumptions = Assumptions.of(chip)
    for text in texts:
        name, _, value = text.partition("=")
        if name not in asdict(assumptions):
            raise ValueError(
                f"--assume {text}: must be NAME=NUMBER with one of {', '.join(asdict(assumptions))}"
            )
        least = 0.0 if name in ("latency_us", "copy_ns") else math.ulp(0.0)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (least <= number < math.inf):
            raise ValueError(f"--assume {text}: must be a number, {'at least' if not least else 'above'} 0")
        assumptions = replace(assumptions, **{name: number})
    return assumptions


def check_plot(args: argparse.Namespace) -> None:
    """Checks, before anything is compiled, that the roofline can be drawn.

    Raises:
        ValueError: a plot is both wanted and not.
        ImportError: matplotlib is missing.
    """
    if args.no_plot and args.plot:
        raise ValueError(f"--plot {args.plot}: has no effect beside --no-plot; give one of them")
    if not args.no_plot and find_spec("matplotlib") is None:
        raise ImportError(
            "the roofline needs matplotlib: pip install 'vsurge[bench]', or tune with --no-plot"
        )


def plot_path(args: argparse.Namespace, table: Path) -> Path:
    if args.plot:
        return Path(args.plot).expanduser()
    name = Path(args.model).name.lower()
    return table.parent / f"{args.chip}-{name}-tp{args.tp}-{args.kv_dtype}.png"


def kernel_calls(args: argparse.Namespace) -> list[Call]:
    """The kernel calls of one of the devices that share a model.

    Raises:
        ValueError: the heads cannot be shared so, or there is no such cache.
    """
    if args.page_size < 1 or args.page_size % SUBLANES:
        raise ValueError(f"--page-size {args.page_size}: must be a positive multiple of {SUBLANES} tokens")
    dtypes = [dtype.name for dtype in SUPPORTED_DTYPES]
    if args.kv_dtype not in dtypes:
        raise ValueError(f"--kv-dtype {args.kv_dtype}: must be one of {', '.join(dtypes)}")
    config, _ = find_config(args.model, args.revision)
    if args.tp < 1 or config.num_q_heads % args.tp:
        raise ValueError(f"--tp {args.tp}: must divide the {config.num_q_heads} query heads of {args.model}")
    if config.num_kv_heads % args.tp and args.tp % config.num_kv_heads:
        raise ValueError(
            f"--tp {args.tp}: must divide the {config.num_kv_heads} key/value heads of {args.model}, or be a "
            "multiple of them, which are then repeated"
        )
    kernels = ("decode", "ragged") if args.kernel == "all" else (args.kernel,)
    return [
        Call(
            kernel=kernel,
            num_q_heads=config.num_q_heads // args.tp,
            num_kv_heads=max(1, config.num_kv_heads // args.tp),
            head_dim=config.head_dim,
            page_size=args.page_size,
            query_dtype=config.dtype.name,
            kv_dtype=args.kv_dtype,
        )
        for kernel in kernels
    ]


def describe(search: Search, trials: Sequence[Trial], entries: Sequence[Entry]) -> list[str]:
    """The table of candidates: a column per context, the winner of each with a star."""
    call, kind = search.call, entries[0].provenance["by"]
    latency, copy_ns = entries[0].provenance["latency_us"], entries[0].provenance["copy_ns"]
    lines = [
        f"{call.kernel} on {search.chip}: {call.num_q_heads} query and {call.num_kv_heads} KV heads, "
        f"head_dim {call.head_dim}, {call.query_dtype} queries, {call.kv_dtype} cache, "
        f"pages of {call.page_size}",
        f"microseconds, {kind} ({latency:g} us latency, {copy_ns:g} ns per copy); mean of equal lengths and "
        "of lengths drawn log-uniform",
        "up to this context" + " " * 22 + "".join(f"{entry.up_to:>11,}" for entry in entries),
    ]
    for trial in trials:
        name = " ".join(f"{name}={value}" for name, value in asdict(trial.blocks).items())
        if trial.refused is not None:
            lines.append(f"{name:40}refused: {trial.refused}")
            continue
        wins = (asdict(trial.blocks) == entry.blocks for entry in entries)
        cells = (f"{trial.time_us(at):10.1f}{'*' if best else ' '}" for at, best in enumerate(wins))
        lines.append(f"{name:40}{''.join(cells)}".rstrip())
    best = [winner(trials, entry) for entry in entries]
    shares = [trial.shares(at) for at, trial in enumerate(best)]
    for label, row in zip(("MBU", "MFU"), zip(*shares, strict=True), strict=True):
        cells = (f"{share:10.1%} " for share in row)
        lines.append(f"{f'{label} of the winner, equal lengths':40}{''.join(cells)}".rstrip())
    if kind == "measured":
        lines.append("from the compiler's schedule, not measured:")
    bounds = (f"{trial.predicted[at][0].bound:>10} " for at, trial in enumerate(best))
    lines.append(f"{'bound by':40}{''.join(bounds)}".rstrip())
    lines += describe_steps([step_of(trial.predicted[at][0]) for at, trial in enumerate(best)])
    margins = (f"{entry.provenance['margin']:10.2%} " for entry in entries)
    return [*lines, f"{'margin over the runner-up':40}{''.join(margins)}".rstrip()]


def step_of(prediction: Prediction) -> LoopRun:
    """The loop that takes most, of the kernel that takes most: its trips are the kernel's steps."""
    return max(prediction.runs, key=lambda run: run.replay.issued).loops[0]


def describe_steps(steps: Sequence[LoopRun]) -> list[str]:
    """What a step issues on average: a column per context."""
    rows = [("bundles per step", [f"{step.bundles_per_trip:,.0f}" for step in steps])]
    for label, unit in (("matrix", "MXU"), ("vector", "VALU"), ("load", "VLOAD"), ("store", "VSTORE")):
        rows.append((f"{label} slots in use", [f"{step.work.share(unit):.1%}" for step in steps]))
    rows.append(("spills and fills per step", [f"{step.work.spills / step.trips:.1f}" for step in steps]))
    rows.append(("KiB copied per step", [f"{step.copied_bytes / step.trips / 2**10:,.0f}" for step in steps]))
    return [f"{label:40}{''.join(f'{cell:>10} ' for cell in cells)}".rstrip() for label, cells in rows]


def winner(trials: Sequence[Trial], entry: Entry) -> Trial:
    """The trial that an entry is of."""
    return next(trial for trial in trials if asdict(trial.blocks) == entry.blocks and not trial.refused)


def as_json(found: Sequence[Found], written: Sequence[Path]) -> dict[str, Any]:
    """Everything that was tried, and the entries that were written."""
    return {
        "searches": [
            {
                "chip": search.chip,
                "call": asdict(search.call),
                "contexts": search.contexts,
                "candidates": [
                    {
                        "blocks": asdict(trial.blocks),
                        "refused": trial.refused,
                        "predicted_us": [[p.time_us for p in each] for each in trial.predicted],
                        "measured_us": trial.measured_us,
                    }
                    for trial in trials
                ],
                "entries": [asdict(entry) for entry in entries],
            }
            for search, trials, entries in found
        ],
        "written": list(map(str, written)),
    }
