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
    candidates = [(call, each) for call in calls for each in timed_candidates(call, few=args.few)]
    trials: dict[Call, list[TimedTrial]] = {call: [] for call in calls}
    for call, candidate in progress_bar(candidates, "tuning", show=True, unit="candidate"):
        trials[call].append(time_candidate(candidate, contexts, time_call))
    found: list[Found] = [
        (call, trials[call], fastest(call, contexts, trials[call], rates)) for call in calls
    ]
    table = Path(args.out).expanduser() if args.out else user_table_path(args.chip)
    entries = [entry for *_, winners in found for _, entry in winners]
    write_table(table, merged(read_table(table), entries))
    if args.json:
        print(json.dumps(_as_json(args.chip, contexts, found, table), indent=1))
        return
    for each in found:
        print("\n".join(_describe(args.chip, contexts, each, rates)) + "\n")
    print(f"written to {table}")


def _describe(chip: str, contexts: Sequence[int], found: Found, rates: dict[str, float]) -> list[str]:
    """The table of candidates: a column per context, the winner of each with a star."""
    call, trials, winners = found
    lines = [
        f"{call.kernel} on {chip}: {call.num_q_heads} query and {call.num_kv_heads} KV heads, head_dim "
        f"{call.head_dim}, {call.query_dtype} queries, {call.kv_dtype} cache, pages of {call.page_size}",
        "microseconds, measured; mean of equal lengths and of lengths drawn log-uniform",
        f"{'up to this context':60}" + "".join(f"{context:>11,}" for context in contexts),
    ]
    for trial in trials:
        if trial.refused is not None:
            lines.append(f"{trial.name:60}refused: {trial.refused}")
            continue
        stars = ("*" if trial is best else " " for best, _ in winners)
        cells = (f"{trial.time_us(at):10.1f}{star}" for at, star in enumerate(stars))
        lines.append(f"{trial.name:60}{''.join(cells)}".rstrip())
    bytes_per_us, flops_per_us = rates["gbytes_per_s"] * 1e3, rates["tflops"] * 1e6
    shares = list[tuple[float, float]]()
    for at, (best, _) in enumerate(winners):
        equal, time_us = workloads(call.kernel, contexts[at])[0], best.measured_us[at][0]
        moved, operations = call.useful_bytes(equal), call.useful_flops(equal)
        shares.append((moved / time_us / bytes_per_us, operations / time_us / flops_per_us))
    for label, row in zip(("MBU", "MFU"), zip(*shares, strict=True), strict=True):
        cells = (f"{share:10.1%} " for share in row)
        lines.append(f"{f'{label} of the winner, equal lengths':60}{''.join(cells)}".rstrip())
    lines.append(f"of {rates['gbytes_per_s']:,} GB/s and {rates['tflops']:,} TFLOP/s, measured in this run")
    margins = (f"{entry.provenance['margin']:10.2%} " for _, entry in winners)
    return [*lines, f"{'margin over the runner-up':60}{''.join(margins)}".rstrip()]


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
