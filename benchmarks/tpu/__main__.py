"""The TPU kernels beside jax's own: `python -m vsurge.benchmarks.tpu --chip v6e`.

No TPU is needed: times are predicted from the TPU compiler's schedules (`vsurge.kernels.tuning`). Prints a
table with targets and writes JSON with all that it was computed from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from ...kernels.tuning import CHIPS, Assumptions, Compilers
from ..machine import describe_machine
from .decode import LATENCIES, decode_rows
from .prefill import prefill_rows
from .published import NOT_MATCHED, published_rows
from .rows import Row, table

PARTS: dict[str, Callable[[str, Compilers], Iterator[Row]]] = {
    "decode": decode_rows,
    "prefill": prefill_rows,
    "published": published_rows,
}
NOTE = (
    "Predicted with {gbytes_per_s:g} GB/s, {tflops:g} TFLOP/s and {clock_ghz:g} GHz per core, "
    "{latency_us:g} us from the end of a copy's service to its arrival, and {copy_ns:g} ns per copy besides "
    "its bytes (what that is on a TPU has not been published)."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="default: v5e, v6e and 7x")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="parts (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the JSON files (default: benchmarks/results)")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # a TPU is not looked for
    folder = arguments.out or Path(__file__).resolve().parents[1] / "results"
    folder.mkdir(parents=True, exist_ok=True)
    with Compilers() as compilers:
        for chip in arguments.chip or ("v5e", "v6e", "7x"):
            rows = [row for part in arguments.only or PARTS for row in PARTS[part](chip, compilers)]
            print("\n".join(["", *table(rows), "", NOTE.format(**vars(Assumptions.of(chip)))]))
            path = folder / f"tpu-{chip}.json"
            path.write_text(json.dumps(report(chip, rows), indent=1) + "\n")
            print(f"written to {path}")
    print("\nPublished timings that cannot be compared with:")
    print("\n".join(f"- {reason}" for reason in NOT_MATCHED))


def report(chip: str, rows: list[Row]) -> dict[str, Any]:
    """All that is known of the rows, for JSON."""
    return {
        "chip": chip,
        "machine": describe_machine(),
        "assumptions": [asdict(Assumptions.of(chip, latency_us=latency)) for latency in LATENCIES],
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "published_timings_not_matched": NOT_MATCHED,
    }


if __name__ == "__main__":
    main()
