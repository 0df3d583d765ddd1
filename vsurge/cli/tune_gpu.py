"""`vsurge tune` for a GPU: what is fastest there, by timing; nothing predicts it elsewhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..benchmarks.machine import measure_ceilings
from ..kernels.block_sizes import Entry, device_here, read_table, user_table_path, write_table
from ..kernels.block_sizes.table import merged
from ..kernels.tuning import CHIPS, Call
from ..kernels.tuning.candidates import workloads
from ..kernels.tuning.timed import TimedTrial, fastest, time_candidate, timed_candidates
from ..kernels.tuning.timing import time_call
from ..model.progress import progress_bar

Found = tuple[Call, list[TimedTrial], list[tuple[TimedTrial, Entry]]]


def run(args: argparse.Namespace, calls: Sequence[Call], contexts: Sequence[int]) -> None:
    """Times all candidates for some calls and writes the table.

    Raises:
        ValueError: the GPU is not here, or an option is for TPUs only.
    """
    here = device_here()
    if here != args.chip:
        what = f"the device here is {here!r}" if here else "there is none here"
        raise ValueError(
            f"--chip {args.chip}: must be one of {', '.join(CHIPS)}, which need not be here, or the GPU "
            f"that is, to be timed; {what}"
        )
    for name, given in (("--assume", args.assume), ("--plot", args.plot)):
        if given:
            raise ValueError(f"{name}: is of predictions for TPUs; a GPU is timed, and vsurge bench draws it")
    ceilings = measure_ceilings()
    rates = {
        "gbytes_per_s": round(max(ceilings["bandwidth_gb_s"], ceilings["copy_gb_s"]), 1),
        "tflops": round(ceilings["matrix_gflop_s"] / 1e3, 1),
    }
    table = Path(args.out).expanduser() if args.out else user_table_path(args.chip)
    candidates = {call: timed_candidates(call, few=args.few) for call in calls}
    todo = [(call, each) for call in calls for each in candidates[call]]
    trials: dict[Call, list[TimedTrial]] = {call: [] for call in calls}
    found = list[Found]()
    for call, candidate in progress_bar(todo, "tuning", show=True, unit="candidate"):
        trials[call].append(time_candidate(candidate, contexts, time_call))
        if len(trials[call]) == len(candidates[call]):  # written at once: who stops here keeps what there is
            found.append((call, trials[call], fastest(call, contexts, trials[call], rates)))
            write_table(table, merged(read_table(table), [entry for _, entry in found[-1][2]]))
    if args.json:
        print(json.dumps(_as_json(args.chip, contexts, found, table), indent=1))
        return
    for each in found:
        print("\n".join(_describe(args.chip, contexts, each, rates)) + "\n")
    print(f"written to {table}")


def _describe(chip: str, contexts: Sequence[int], found: Found, rates: dict[str, float]) -> list[str]:
    """The table of candidates: a column per context, the winner of each with a star; and refusals."""
    call, trials, winners = found
    lines = [
        f"{call.kernel} on {chip}: {call.num_q_heads} query and {call.num_kv_heads} KV heads, head_dim "
        f"{call.head_dim}, {call.query_dtype} queries, {call.kv_dtype} cache, pages of {call.page_size}",
        "microseconds, measured; mean of equal lengths and of lengths drawn log-uniform",
        f"{'up to this context':60}" + "".join(f"{context:>11,}" for context in contexts),
    ]
    best_of = {contexts.index(entry.up_to): (best, entry) for best, entry in winners}
    refusals = list[str]()
    for trial in trials:
        cells = list[str]()
        for at, refused in enumerate(trial.refused):
            star = "*" if at in best_of and trial is best_of[at][0] else " "
            cells.append(f"{trial.time_us(at):10.1f}{star}" if refused is None else f"{'refused':>10} ")
        lines.append(f"{trial.name:60}{''.join(cells)}".rstrip())
        reasons = dict.fromkeys(refused for refused in trial.refused if refused is not None)
        refusals += [f"{trial.name}: refused: {reason}" for reason in reasons]
    bytes_per_us, flops_per_us = rates["gbytes_per_s"] * 1e3, rates["tflops"] * 1e6
    shares = dict[int, tuple[float, float]]()
    for at, (best, _) in best_of.items():
        equal, time_us = workloads(call.kernel, contexts[at])[0], best.measured_us[at][0]
        moved, operations = call.useful_bytes(equal), call.useful_flops(equal)
        shares[at] = moved / time_us / bytes_per_us, operations / time_us / flops_per_us
    columns = range(len(contexts))
    for which, label in enumerate(("MBU", "MFU")):
        cells = (f"{shares[at][which]:10.1%} " if at in shares else 11 * " " for at in columns)
        lines.append(f"{f'{label} of the winner, equal lengths':60}{''.join(cells)}".rstrip())
    lines.append(f"of {rates['gbytes_per_s']:,} GB/s and {rates['tflops']:,} TFLOP/s, measured in this run")
    margins = (
        f"{best_of[at][1].provenance['margin']:10.2%} " if at in best_of else 11 * " " for at in columns
    )
    return [*lines, f"{'margin over the runner-up':60}{''.join(margins)}".rstrip(), *refusals]


def _as_json(chip: str, contexts: Sequence[int], found: Sequence[Found], table: Path) -> dict[str, Any]:
    return {
        "searches": [
            {
                "chip": chip,
                "call": asdict(call),
                "contexts": contexts,
                "candidates": [
                    {
                        "implementation": trial.call.implementation,
                        "blocks": trial.blocks,
                        "refused": trial.refused,
                        "measured_us": trial.measured_us,
                    }
                    for trial in trials
                ],
                "entries": [asdict(entry) for _, entry in winners],
            }
            for call, trials, winners in found
        ],
        "written": [str(table)],
    }
