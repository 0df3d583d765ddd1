"""vSurge beside transformers on this machine's processor: `python -m vsurge.benchmarks.side_by_side`.

Both engines stand ready in processes of their own and take turns at every single measurement, as do XLA's
bare matrix products and the machine's ceilings (memory bandwidth, matrix rate). Ratios are taken within a
turn and their median is printed, so that a drift of the machine's speed cancels out. Writes JSON with every
sample.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..model import PUBLISHED
from ..model.progress import progress_bar
from .machine import describe_machine
from .record import machine_slug, results_folder
from .workload import Workload, decode_bytes, prefill_operations

Turn = dict[str, Any]  # one turn's figures by name


class Worker:
    """A process that measures on request.

    Raises:
        RuntimeError: it ended; the message holds the end of what it said.
    """

    def __init__(self, name: str, model: str, environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vsurge.benchmarks.workers", name, "--model", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **(environment or {})},
        )
        self._answer()

    def ask(self, measure: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"measure": measure, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the worker {self._name!r} ended:\n{self._errors.read()[-2000:]}")
        return json.loads(line)


def measure_startup(work: Workload) -> dict[str, Any]:
    """Seconds from a process's start to a ready engine, with an empty compilation cache and a full one."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("cold", "with compilation cache"):
            start = time.perf_counter()
            worker = Worker("startup", work.model, environment)
            ready = time.perf_counter() - start
            result[name] = {"ready_s": ready, **worker.ask("startup")}
            worker.close()
    return result


def measure(work: Workload, turns: int) -> tuple[list[Turn], dict[str, Any]]:
    """Every figure once per turn, engine by engine; and the memory that the engines took."""
    workers = {name: Worker(name, work.model) for name in ("matmuls", "vsurge", "transformers")}
    asks: list[tuple[str, Callable[[int], Any]]] = []

    def ask(figure: str, name: str, measure: str, **arguments: Any) -> None:
        def run(turn: int) -> Any:
            seed = {} if name == "matmuls" else {"seed": 100 * turn}
            return workers[name].ask(measure, **arguments, **seed)

        asks.append((figure, run))

    ask("ceilings", "matmuls", "ceilings")
    ask("prefill bare", "matmuls", "matmuls", rows=work.prefill_tokens)
    for engine in ("vsurge", "transformers"):
        ask(f"prefill {engine}", engine, "prefill")
    for batch in work.decode_batches:
        ask(f"decode {batch} bare", "matmuls", "matmuls", rows=max(2, batch))
        for engine in ("vsurge", "transformers"):
            ask(f"decode {batch} {engine}", engine, "decode", batch=batch)

    for _, run in asks:  # everything once for warming up
        run(0)
    result: list[Turn] = [{} for _ in range(turns)]
    steps = [(turn, figure, run) for turn in range(turns) for figure, run in asks]
    for turn, figure, run in progress_bar(steps, "measuring", show=True, unit="measurement"):
        result[turn][figure] = run(turn)
    memory = {name: workers[name].ask("memory") for name in ("vsurge", "transformers")}
    for worker in workers.values():
        worker.close()
    return result, memory


def summarize(work: Workload, turns: list[Turn]) -> list[dict[str, Any]]:
    """The rows of the table: medians over the turns of rates, and of ratios taken within each turn."""
    config = PUBLISHED[work.model]
    length = work.prefill_tokens

    def median(figure: Callable[[Turn], float]) -> float:
        return statistics.median(figure(turn) for turn in turns)

    operations = prefill_operations(config, length)
    rows: list[dict[str, Any]] = [
        {
            "measurement": f"prefill {length}",
            "vsurge_tok_s": median(lambda t: length / t["prefill vsurge"]),
            "transformers_tok_s": median(lambda t: length / t["prefill transformers"]),
            "bare_matmuls_tok_s": median(lambda t: length / t["prefill bare"]),
            "ratio": median(lambda t: t["prefill transformers"] / t["prefill vsurge"]),
            "share_of_bare_matmuls": median(lambda t: t["prefill bare"] / t["prefill vsurge"]),
            "share_of_matrix_rate": median(
                lambda t: operations / t["prefill vsurge"] / (t["ceilings"]["matrix_gflop_s"] * 1e9)
            ),
        }
    ]
    for batch in work.decode_batches:
        step_bytes = decode_bytes(config, batch, work.prompt_tokens + work.new_tokens // 2)
        ours, peer, bare = (f"decode {batch} {name}" for name in ("vsurge", "transformers", "bare"))

        def row(ours: str, peer: str, bare: str, batch: int, step_bytes: int) -> dict[str, Any]:
            return {
                "measurement": f"decode batch {batch}",
                "vsurge_tok_s": median(lambda t: t[ours]),
                "transformers_tok_s": median(lambda t: t[peer]),
                "bare_matmuls_tok_s": median(lambda t: batch / t[bare]),
                "ratio": median(lambda t: t[ours] / t[peer]),
                "share_of_bare_matmuls": median(lambda t: t[ours] * t[bare] / batch),
                "share_of_bandwidth": median(
                    lambda t: step_bytes * t[ours] / batch / (t["ceilings"]["bandwidth_gb_s"] * 1e9)
                ),
            }

        rows.append(row(ours, peer, bare, batch, step_bytes))
    return rows


def print_report(report: dict[str, Any]) -> None:
    """The report as the README shows it."""
    machine, turns = report["machine"], report["turns"]
    ceilings = {
        name: statistics.median(turn["ceilings"][name] for turn in turns) for name in turns[0]["ceilings"]
    }
    model, cores = report["workload"]["model"], machine["cores"]
    print(f"{model}, random bfloat16 weights; {machine['processor']}, {cores} cores")
    print(
        f"medians of {len(turns)} turns; here memory reads run at {ceilings['bandwidth_gb_s']:.0f} GB/s, "
        f"bfloat16 products at {ceilings['matrix_gflop_s']:.0f} GFLOP/s"
    )
    head = f"{'tokens/s':16}{'vSurge':>9}{'transformers':>14}{'ratio':>8}"
    print(head + f"{'of bare matmuls':>18}{'of bandwidth':>15}{'of matrix rate':>16}")
    for row in report["rows"]:
        shares = (row.get(f"share_of_{name}") for name in ("bare_matmuls", "bandwidth", "matrix_rate"))
        bare, bandwidth, matrix = ("" if share is None else f"{share:.0%}" for share in shares)
        print(
            f"{row['measurement']:16}{row['vsurge_tok_s']:9.1f}{row['transformers_tok_s']:14.1f}"
            f"{row['ratio']:8.2f}{bare:>18}{bandwidth:>15}{matrix:>16}"
        )
    memory = {name: bytes_ / 2**30 for name, bytes_ in report["memory"].items()}
    print(
        f"peak memory {memory['peak']:.2f} GiB = weights {memory['weights']:.2f} + cache "
        f"{memory['cache']:.2f} + {memory['beyond']:.2f}; transformers {memory['transformers_peak']:.2f} GiB"
    )
    for name, times in report["startup"].items():
        print(
            f"start-up, {name}: {times['ready_s']:.1f} s (weights {times['weights_s']:.1f}, "
            f"compiling {times['compile_s']:.1f})"
        )
    loading = report["loading"]
    load_s = statistics.median(turn["load_s"] for turn in loading)
    one_by_one, at_once = (
        statistics.median(turn["load_s"] / turn[name] for turn in loading)
        for name in ("copy_s", "copy_all_at_once_s")
    )
    print(
        f"loading from the page cache: {load_s:.2f} s, {one_by_one:.2f}x copying its tensors one by one, "
        f"{at_once:.2f}x copying all at once"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=Workload.model, choices=list(PUBLISHED))
    parser.add_argument("--turns", type=int, default=5, help="of each engine at each figure (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: in benchmarks/results)")
    arguments = parser.parse_args()
    work = Workload(model=arguments.model)
    machine = describe_machine()
    startup = measure_startup(work)
    loader = Worker("loading", work.model)
    loading = loader.ask("loading", turns=arguments.turns)
    loader.close()
    turns, memory = measure(work, arguments.turns)
    weights = decode_bytes(PUBLISHED[work.model], 1, 0)
    peak, cache = memory["vsurge"]["peak_bytes"], memory["vsurge"]["cache_bytes"]
    report = {
        "machine": machine,
        "workload": vars(work),
        "rows": summarize(work, turns),
        "memory": {
            "peak": peak,
            "weights": weights,
            "cache": cache,
            "beyond": peak - weights - cache,
            "transformers_peak": memory["transformers"]["peak_bytes"],
        },
        "startup": startup,
        "loading": loading,
        "turns": turns,
    }
    print_report(report)
    name = f"side-by-side-{work.model.split('/')[1].lower()}.json"
    out = arguments.out or results_folder() / machine_slug(machine) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
