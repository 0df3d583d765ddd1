"""vSurge beside transformers on this machine's processor: `python -m vsurge.benchmarks.side_by_side`.

Engines take turns, each in a fresh process, so that a drift of the machine's speed hits both; the ceilings
(memory bandwidth, matrix rate, XLA's bare matrix products) are measured between them in the same run. Prints
a table and writes JSON with every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..model import PUBLISHED
from ..model.progress import progress_bar
from .machine import describe_machine
from .workload import Workload, decode_bytes, prefill_operations

Samples = dict[str, list[dict[str, Any]]]


def run_worker(name: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """One worker in a process of its own.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    result = subprocess.run(
        [sys.executable, "-m", "vsurge.benchmarks.workers", name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **(environment or {})},
    )
    if result.returncode:
        raise RuntimeError(f"the worker {name!r} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure(work: Workload, rounds: int) -> Samples:
    """Runs every worker `rounds` times, in turn, and the start-up with an empty cache and a filled one."""
    arguments = ["--model", work.model, "--repeats", str(work.repeats)]
    plan = ["matmuls", "vsurge", "transformers"] * rounds
    samples: Samples = {name: [] for name in ("matmuls", "vsurge", "transformers", "startup")}
    for name in progress_bar(plan, "measuring", show=True, unit="process"):
        samples[name].append(run_worker(name, arguments))
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for _ in range(2):
            started = time.time()
            times = run_worker("startup", arguments, environment)
            samples["startup"].append({**times, "ready_s": times.pop("ready_at") - started})
    return samples


def median_of(runs: list[dict[str, Any]], *keys: Any) -> float:
    """The median over all runs of all samples under these keys."""
    values: list[float] = []
    for run in runs:
        found: Any = run
        for key in keys:
            found = found[str(key)] if isinstance(found, dict) and str(key) in found else found[key]
        values.extend(found if isinstance(found, list) else [found])
    return statistics.median(values)


def summarize(work: Workload, samples: Samples) -> dict[str, Any]:
    """The figures of the table: rates, ratios and shares of what the machine allows."""
    config = PUBLISHED[work.model]
    bandwidth = median_of(samples["matmuls"], "bandwidth_gb_s") * 1e9
    matrix_rate = median_of(samples["matmuls"], "matrix_gflop_s") * 1e9
    ours, peer = samples["vsurge"], samples["transformers"]
    prefill_ours, prefill_peer = median_of(ours, "prefill_s"), median_of(peer, "prefill_s")
    bare_prefill = median_of(samples["matmuls"], "seconds", work.prefill_tokens)
    operations = prefill_operations(config, work.prefill_tokens)
    rows = [
        {
            "measurement": f"prefill {work.prefill_tokens}",
            "vsurge_tok_s": work.prefill_tokens / prefill_ours,
            "transformers_tok_s": work.prefill_tokens / prefill_peer,
            "ratio": prefill_peer / prefill_ours,
            "share_of_bare_matmuls": bare_prefill / prefill_ours,
            "share_of_matrix_rate": operations / prefill_ours / matrix_rate,
            "share_of_bandwidth": None,
        }
    ]
    for batch in work.decode_batches:
        rate_ours = median_of(ours, "decode_tok_s", batch)
        rate_peer = median_of(peer, "decode_tok_s", batch)
        bare = batch / median_of(samples["matmuls"], "seconds", max(2, batch))
        context = work.prompt_tokens + work.new_tokens // 2
        bytes_per_s = decode_bytes(config, batch, context) * rate_ours / batch
        rows.append(
            {
                "measurement": f"decode batch {batch}",
                "vsurge_tok_s": rate_ours,
                "transformers_tok_s": rate_peer,
                "ratio": rate_ours / rate_peer,
                "share_of_bare_matmuls": rate_ours / bare,
                "share_of_matrix_rate": None,
                "share_of_bandwidth": bytes_per_s / bandwidth,
            }
        )
    weights = decode_bytes(config, 1, 0)
    cache = median_of(ours, "cache_bytes")
    peak = max(run["peak_memory_bytes"] for run in ours)
    cold, warm = samples["startup"]
    return {
        "rows": rows,
        "bandwidth_gb_s": bandwidth / 1e9,
        "matrix_gflop_s": matrix_rate / 1e9,
        "memory": {
            "weights_bytes": weights,
            "cache_bytes": cache,
            "peak_bytes": peak,
            "beyond_weights_and_cache_bytes": peak - weights - cache,
            "transformers_peak_bytes": max(run["peak_memory_bytes"] for run in peer),
        },
        "startup": {"cold": cold, "with_compilation_cache": warm},
    }


def print_table(work: Workload, machine: dict[str, Any], summary: dict[str, Any]) -> None:
    """The table that the README shows."""
    print(f"{work.model}, random bfloat16 weights, on {machine['processor']}, {machine['cores']} cores")
    print(
        f"measured here: reads {summary['bandwidth_gb_s']:.0f} GB/s, "
        f"bfloat16 matrix products {summary['matrix_gflop_s']:.0f} GFLOP/s"
    )
    print(
        f"{'tokens/s':18}{'vSurge':>10}{'transf.':>10}{'ratio':>8}"
        f"{'bare matmuls':>14}{'bandwidth':>11}{'matrix rate':>13}"
    )
    for row in summary["rows"]:
        shares = [row[f"share_of_{name}"] for name in ("bare_matmuls", "bandwidth", "matrix_rate")]
        bare, bandwidth, matrix = ("" if share is None else f"{share:.0%}" for share in shares)
        print(
            f"{row['measurement']:18}{row['vsurge_tok_s']:10.1f}{row['transformers_tok_s']:10.1f}"
            f"{row['ratio']:8.2f}{bare:>14}{bandwidth:>11}{matrix:>13}"
        )
    memory, startup = summary["memory"], summary["startup"]
    gib = {name: value / 2**30 for name, value in memory.items()}
    print(
        f"peak memory {gib['peak_bytes']:.2f} GiB = weights {gib['weights_bytes']:.2f} + cache "
        f"{gib['cache_bytes']:.2f} + {gib['beyond_weights_and_cache_bytes']:.2f} "
        f"(transformers {gib['transformers_peak_bytes']:.2f})"
    )
    for name, times in startup.items():
        print(
            f"start-up {name.replace('_', ' ')}: {times['ready_s']:.1f} s, of which making the weights "
            f"{times['weights_s']:.1f} s, compiling {times['compile_s']:.1f} s"
        )


def results_folder() -> Path:
    """`benchmarks/results` of a checkout, else the current folder."""
    checkout = Path(__file__).resolve().parent
    return checkout / "results" if (checkout.parent / ".git").exists() else Path.cwd()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=Workload.model, choices=list(PUBLISHED))
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine (default: 2)")
    parser.add_argument("--repeats", type=int, default=Workload.repeats, help="of each figure in a turn")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: in benchmarks/results)")
    arguments = parser.parse_args()
    work = Workload(model=arguments.model, repeats=arguments.repeats)
    machine = describe_machine()
    samples = measure(work, arguments.rounds)
    summary = summarize(work, samples)
    print_table(work, machine, summary)
    slug = re.sub(
        r"[^a-z0-9]+", "-", f"{machine['processor'].split('(')[0]}-{machine['cores']}-cores".lower()
    )
    out = arguments.out or results_folder() / f"{slug}-{work.model.split('/')[1].lower()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "workload": vars(work), "summary": summary, "samples": samples}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
