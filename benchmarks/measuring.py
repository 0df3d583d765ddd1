"""Measures what the present machine can: kernels, steps, and the engine beside others."""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from ..model import Model, Qwen3Config
from ..model.progress import progress_bar
from ..runtime import vSurge
from .engine import steps
from .engine.apart import Wanted, run_apart
from .engine.load import (
    LoadRequest,
    arriving,
    fewest_steps,
    needed_bytes,
    random_requests,
    run_load,
    shortened,
)
from .engine.peers import why_not
from .kernels import cases as kernels
from .machine import device_seconds_of, measure_ceilings
from .record import Ceilings, LoadRow, Row
from .workload import Sizes, prefill_operations

SAMPLES = 10  # of a kernel or a step, at most
ENOUGH_S = 1.5  # of samples of one of them on a CPU

logger = logging.getLogger("vsurge.benchmarks")


@dataclass(frozen=True, kw_only=True)
class RequestMix:
    """Requests of random tokens and lengths.

    Attributes:
        num_requests: all there from the start.
        input_tokens, output_tokens: of each, from, to.
        at_once: that are decoded together at most.
    """

    num_requests: int
    input_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    at_once: int

    def requests(self, config: Qwen3Config) -> list[LoadRequest]:
        return random_requests(self.num_requests, config.vocab_size, self.input_tokens, self.output_tokens)

    @property
    def case(self) -> dict[str, Any]:
        return {
            "requests": self.num_requests,
            "in": _span(self.input_tokens),
            "out": _span(self.output_tokens),
            "at once": self.at_once,
        }


# What small engines quote: nano-vllm's bench.py has 256 sequences of 100 to 1,024 tokens in and out.
QUOTED = RequestMix(num_requests=256, input_tokens=(100, 1024), output_tokens=(100, 1024), at_once=256)
# A CPU with two cores would take hours for it; a slow one answers these in a quarter of a minute.
FEWER = RequestMix(num_requests=8, input_tokens=(16, 64), output_tokens=(8, 24), at_once=8)


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def ceilings() -> Ceilings:
    """What the device does at best."""
    found = measure_ceilings()
    read, copied = found["bandwidth_gb_s"], found["copy_gb_s"]
    return Ceilings(max(read, copied), found["matrix_gflop_s"], read, copied)


def samples_of(run: Callable[[], Any], calls: int = 1) -> tuple[float, ...]:
    """Seconds of a call, by several runs of so many calls each, after one that does not count: it compiles.

    On an accelerator a sample is of many runs; see `device_seconds_of`.
    """
    if platform() != "cpu":
        return tuple(seconds / calls for seconds in device_seconds_of(run, repeats=SAMPLES))
    jax.block_until_ready(run())
    found, begin = list[float](), time.perf_counter()
    while len(found) < SAMPLES and (len(found) < 3 or time.perf_counter() - begin < ENOUGH_S):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append((time.perf_counter() - start) / calls)
    return tuple(found)


def kernel_rows(config: Qwen3Config, *, show_progress: bool) -> list[Row]:
    """One layer's kernels beside jax's own, with the heads of a model."""
    rows = list[Row]()
    todo = list(kernels.cases(platform(), (config.num_q_heads, config.num_kv_heads)))
    for case in progress_bar(todo, "kernels", show=show_progress, unit="case"):
        fields: dict[str, Any] = {
            "suite": "kernels", "name": case.kernel, "implementation": case.whose, "case": case.case,
            "num_bytes": case.num_bytes, "operations": case.operations,
            "tokens": case.num_seqs * case.new_tokens,
        }  # fmt: skip
        try:
            seconds = samples_of(case.build(platform()), case.num_calls(platform()))
        except Exception as error:  # noqa: BLE001  (jax's kernels refuse in many ways; the row says how)
            rows.append(not_measured(Row(**fields), error))
        else:
            rows.append(Row(**fields, seconds=seconds))
    return rows


def step_rows(model: Model, *, show_progress: bool) -> list[Row]:
    """Steps of a model by batch and context."""
    rows = list[Row]()
    for case in progress_bar(list(steps.cases(platform())), "steps", show=show_progress, unit="case"):
        fields: dict[str, Any] = {
            "suite": "steps", "name": case.kind, "implementation": "vSurge",
            "case": case.case | {"attention": case.attention(model.config)},
            "num_bytes": case.num_bytes(model.config), "operations": case.operations(model.config),
            "tokens": case.tokens,
        }  # fmt: skip
        try:
            seconds = samples_of(case.build(model))
        except Exception as error:  # noqa: BLE001  (a step too large for the memory leaves the others)
            rows.append(not_measured(Row(**fields), error))
        else:
            rows.append(Row(**fields, seconds=seconds))
    return rows


def not_measured(row: Row, error: Exception) -> Row:
    """The row with the reason in the place of samples; it is logged, too."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    logger.warning("%s, %s: not measured: %s", row.name, row.implementation, reason)
    return replace(row, not_measured=reason)


def engine_for(model: Model, requests: Sequence[LoadRequest], at_once: int, **options: Any) -> vSurge:
    """An engine that takes these requests without refusing any, and finds no prompt again.

    Args:
        model: of it.
        requests: what it will be sent.
        at_once: sequences that it decodes together.
        options: of `vSurge.from_model`.
    """
    longest = max(len(request.prompt) + request.output_tokens for request in requests)
    options = {"max_length": longest, "max_queued_requests": len(requests), "verbose": False, **options}
    return vSurge.from_model(model, max_concurrent_decodes=at_once, prefix_caching=False, **options)


def warm_up(surge: vSurge, requests: Sequence[LoadRequest]) -> None:
    """Sends some of the requests, for few tokens: nothing is done for the first time when it counts."""
    short = shortened(requests)
    run_load(surge, short[: max(1, len(short) // 4)], requests_per_s=None)
    for request in short[:2]:  # steps of few, too
        run_load(surge, [request], requests_per_s=None)


def peer_row(
    name: str, config: Qwen3Config, requests: Sequence[LoadRequest], at_once: int, *, on: str | None = None
) -> Row:
    """The requests by another engine, of the same shape and with random weights; or why not.

    Args:
        name: of `PEERS`.
        config: the model's shape.
        requests: all there from the start.
        at_once: sequences that are decoded together.
        on: "cpu", "gpu", where it is a process of its own, or "tpu"; None for `platform()`.
    """
    on = on or platform()
    row = throughput_row(name, config, requests, at_once, ())
    reason = why_not(name, on)
    if reason is not None:
        return replace(row, not_measured=reason)
    wanted = Wanted(name, config, requests, at_once, "cuda" if on == "gpu" else "cpu")
    apart = on == "gpu" or name == "vLLM"  # which starts processes that import this one's program anew
    try:
        seconds = run_apart(wanted) if apart else wanted.run()
    except Exception as error:  # noqa: BLE001  (others have errors of their own; the row says which)
        return not_measured(row, error)
    return replace(row, seconds=(seconds,))


def throughput_row(
    name: str,
    config: Qwen3Config,
    requests: Sequence[LoadRequest],
    at_once: int,
    seconds: tuple[float, ...],
    sizes: Sizes | None = None,
) -> Row:
    """Seconds of all requests, beside the bytes and operations that they cannot do without.

    Args:
        name: the engine's.
        config: the model's shape.
        requests: all there from the start.
        at_once: sequences that are decoded together.
        seconds: samples.
        sizes: of weights and cache; None for those in bfloat16.
    """
    sizes = sizes or Sizes.in_bfloat16(config)
    inputs = [len(request.prompt) for request in requests]
    outputs = [request.output_tokens for request in requests]
    return Row(
        suite="engine",
        name="throughput",
        implementation=name,
        case={
            "requests": len(requests),
            "in": _span((min(inputs), max(inputs))),
            "out": _span((min(outputs), max(outputs))),
            "at once": at_once,
        },
        seconds=seconds,
        num_bytes=needed_bytes(sizes, requests, fewest_steps(requests, at_once)),
        operations=operations_of(config, requests),
        tokens=sum(outputs),
    )


def load_rows(
    surge: vSurge,
    requests: Sequence[LoadRequest],
    rates: Sequence[float],
    *,
    seed: int = 0,
    show_progress: bool,
) -> list[LoadRow]:
    """The same requests at several rates, one after the other.

    Args:
        surge: a running engine, see `engine_for`.
        requests: whose arrivals are drawn.
        rates: requests a second.
        seed: of the arrivals.
        show_progress: show a bar on a terminal.
    """
    bar = progress_bar(list(rates), "load", show=show_progress, unit="rate")
    return [run_load(surge, arriving(requests, rate, seed=seed), requests_per_s=rate) for rate in bar]


def operations_of(config: Qwen3Config, requests: Sequence[LoadRequest]) -> int:
    """What the requests cannot do without: every token but the last through all matrices, and attention."""
    total = 0
    for request in requests:
        computed = len(request.prompt) + request.output_tokens - 1
        head = 2 * config.vocab_size * config.hidden_size
        total += prefill_operations(config, computed) + (request.output_tokens - 1) * head
    return total


def _span(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]}-{bounds[1]}"
