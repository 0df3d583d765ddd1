"""What the runtime costs, and how it behaves under load: `python -m vsurge.benchmarks.serving`.

On random weights of a published shape:

- the time between the tokens of those who decode, while a long prompt is prefilled beside them, over the same
  without it, before and after;
- the time to the first token of a prompt whose pages are in the cache, over the first time;
- the share of time in which the device has nothing to do while a batch decodes;
- what sampling takes of a decode step, with no parameter in use and with all of them.

And on the demo checkpoint, where the model hardly counts:

- the Python of the engine's thread per step of 64 requests;
- a soak of short requests (aborts, stop strings, log-probabilities and schemas among them), and the memory of
  the process during it.

Prints a table, and writes JSON with every sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ...model import PUBLISHED, demo, load_model, random_model
from ..machine import describe_machine
from .demo_checkpoint import SOAK_AFTER, host_time, soak
from .published_shape import (
    beside_a_prefill,
    decode_step,
    idle_while_decoding,
    repeated_prompt,
    sampling_step,
)

BUDGETS = (64, 16, 8)  # `max_batched_tokens` beside the long prompt
PAGE_SIZES = (128, 32)  # of the cache that the repeated prompt is found in
SOAK_REQUESTS = 10_000


Row = tuple[str, str, str, str]


def rows_of(result: dict[str, Any]) -> list[Row]:
    """What is printed: a figure's name, its value, its goal, and what it is divided by."""
    rows: list[Row] = []
    median = statistics.median
    for beside in result.get("beside_a_prefill", ()):
        before, with_prompt, after = (median(beside[f"{when}_s"]) for when in ("before", "beside", "after"))
        rows.append((
            f"time between tokens beside a prompt of {beside['prompt_tokens']}, "
            f"max_batched_tokens={beside['max_batched_tokens']}",
            f"{2 * with_prompt / (before + after):.2f}x", "<= 2x",
            f"{1e3 * with_prompt:.0f} ms over the mean of {1e3 * before:.0f} ms before and "
            f"{1e3 * after:.0f} ms after it; its first token after {beside['first_token_s']:.0f} s",
        ))  # fmt: skip
    for repeated in result.get("repeated_prompt", ()):
        first, again = median(repeated["first_s"]), median(repeated["again_s"])
        rows.append((
            f"first token of a repeated prompt of {repeated['prompt_tokens']}, "
            f"pages of {repeated['page_size']}",
            f"{first / again:.1f}x sooner", ">= 10x",
            f"{first:.2f} s over {1e3 * again:.0f} ms, {repeated['cached_tokens']} tokens found",
        ))  # fmt: skip
    if idle := result.get("idle_while_decoding"):
        rows.append((
            f"device idle while {idle['batch']} decode", f"{100 * max(idle['idle_share']):.2f} %", "<= 5 %",
            f"largest of {len(idle['idle_share'])} windows of 10 s, "
            f"{median(idle['tokens_per_second']):.0f} tokens/s",
        ))  # fmt: skip
    if sampling := result.get("sampling_step"):
        step = median(result["decode_step"]["step_s"])
        goal = "<= 10 %" if result["machine"]["accelerator"] is None else "<= 5 %"
        for name in ("greedy", "drawn", "qwen3_default", "shaped", "logprobs", "everything"):
            seconds = median(sampling[f"{name}_s"])
            rows.append((
                f"sampling at batch {sampling['batch']}: {name}", f"{100 * seconds / step:.1f} %", goal,
                f"{1e3 * seconds:.1f} ms of a step of {1e3 * step:.0f} ms",
            ))  # fmt: skip
    if host := result.get("host_time"):
        for name, what in (("unread", "read at the end"), ("read", "every token read")):
            rows.append((
                f"engine's thread per step of {host['sequences']} requests, {what}",
                f"{1e3 * host[name]['python_s']:.2f} ms", "<= 1 ms",
                ", ".join(f"{phase} {1e3 * each:.2f}" for phase, each in host[name]["phases_s"].items())
                + f"; {1e3 * host[name]['processor_s']:.2f} on the processor, "
                + f"{1e3 * host[name]['step_processor_s']:.2f} with jax's dispatch and reading",
            ))  # fmt: skip
    if soaked := result.get("soak"):
        resident = dict(soaked["resident_bytes"])
        grown = (resident[max(resident)] - resident[SOAK_AFTER]) / 2**20
        rows.append((
            f"memory from request {SOAK_AFTER} to {soaked['requests']}", f"{grown:+.1f} MiB", "flat",
            f"of {resident[SOAK_AFTER] / 2**20:.0f} MiB; {soaked['aborted']} aborted, "
            f"{soaked['failed']} failed, {soaked['requests'] / soaked['seconds']:.0f} requests/s",
        ))  # fmt: skip
    return rows


def print_table(rows: list[Row]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vsurge.benchmarks.serving", description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", choices=sorted(PUBLISHED))
    parser.add_argument("--turns", type=int, default=2, help="how often each figure is taken (default: 2)")
    parser.add_argument("--requests", type=int, default=SOAK_REQUESTS, help="of the soak")
    parser.add_argument("--only", action="append", help="one of the measurements, by name; may be repeated")
    parser.add_argument("--out", type=Path, help="JSON, with every sample; written after each")
    options = parser.parse_args(arguments)
    small = load_model(Path(demo.__file__).parent)
    tokenizer = AutoTokenizer.from_pretrained(Path(demo.__file__).parent)
    model = random_model(options.model, seed=0)
    measured: dict[str, Callable[[], Any]] = {
        "host_time": lambda: host_time(small, tokenizer, 200),
        "soak": lambda: soak(small, tokenizer, options.requests),
        "sampling_step": lambda: sampling_step(model, 20),
        "decode_step": lambda: decode_step(model, 40),
        "idle_while_decoding": lambda: idle_while_decoding(model, options.turns),
        "repeated_prompt": lambda: [repeated_prompt(model, size, options.turns) for size in PAGE_SIZES],
        "beside_a_prefill": lambda: [beside_a_prefill(model, budget) for budget in BUDGETS],
    }
    unknown = set(options.only or ()) - measured.keys()
    if unknown:
        parser.error(f"--only {sorted(unknown)}: must be among {list(measured)}")
    result: dict[str, Any] = {"machine": describe_machine(), "published_shape": options.model}
    for name, measure in measured.items():
        if options.only is None or name in options.only:
            result[name] = measure()
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows_of(result))


if __name__ == "__main__":
    main()
