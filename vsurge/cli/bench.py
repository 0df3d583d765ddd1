"""`vsurge bench`: what this machine makes of kernels, steps and the engine, beside what it could."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from ..benchmarks import measuring
from ..benchmarks.attention import attention_of
from ..benchmarks.engine.apart import gpu_is_here
from ..benchmarks.engine.load import random_requests, run_load
from ..benchmarks.engine.peers import PEERS
from ..benchmarks.machine import describe_machine
from ..benchmarks.measuring import RequestMix
from ..benchmarks.record import Report, Row, file_slug, machine_slug, read_report, results_folder
from ..benchmarks.report import draw, draw_load, markdown, predicted
from ..benchmarks.workload import Sizes, check_has_no_experts
from ..model import published_config, random_model
from ..model.progress import progress_bar
from ..runtime import SamplingParams, vSurge
from .bench_setup import (
    dense_model,
    describe_model,
    engine_and_requests,
    lengths,
    max_length_of,
    parse_rates,
    quiet,
)
from .setup import build_engine, given

PARTS = ("kernels", "steps", "engine", "load")
SHARES_OF_THROUGHPUT = (0.5, 0.9)  # at which `all` has requests arrive


def run(args: argparse.Namespace) -> None:
    {
        "all": _all, "throughput": _throughput, "serve": _serve, "latency": _latency, "report": _report,
    }[args.what](args)  # fmt: skip


def _all(args: argparse.Namespace) -> None:
    on_gpu = gpu_is_here()
    on_cpu = not on_gpu and measuring.platform() == "cpu"
    usual = "0.6B" if on_cpu else "8B"
    name = given(args.model, usual)
    config = published_config(name)
    check_has_no_experts(config)
    parts = [part for part in PARTS if args.only is None or part in args.only]
    work = measuring.FEWER if on_cpu else measuring.QUOTED
    begin, took_s, peers = time.perf_counter(), dict[str, float](), list[Row]()
    if on_gpu and "engine" in parts:  # as long as this process holds none of the GPU's memory
        for peer in progress_bar(list(PEERS), "peers", show=True, unit="engine"):
            row = measuring.peer_row(peer, config, work.requests(config), work.at_once, on="gpu")
            peers.append(replace(row, case=work.case))
            took_s[peer] = time.perf_counter() - begin - sum(took_s.values())
    report = _new_report(args, f"{name}, random bfloat16 weights" if parts != ["kernels"] else None)
    report = replace(report, rows=tuple(peers))
    took_s["ceilings"] = time.perf_counter() - begin - sum(took_s.values())
    folder = Path(args.out) if args.out else results_folder() / machine_slug(report.machine)
    out = folder / ("bench.json" if name == usual else f"bench-{file_slug(name)}.json")
    for part, grown in _measured(report, name, parts, work):
        took_s[part] = time.perf_counter() - begin - sum(took_s.values())
        report = replace(grown, took_s={key: round(seconds, 1) for key, seconds in took_s.items()})
        report.write(out)  # so that nothing is lost if a later part fails
    _finish(report, out)
    ours = [row for row in report.rows if row.implementation.startswith("vSurge")]
    failed = [row for row in ours if row.not_measured is not None]
    if failed:
        raise RuntimeError(f"{failed[0].name}, {failed[0].implementation}: {failed[0].not_measured}")


def _measured(
    report: Report, name: str, parts: Sequence[str], work: RequestMix
) -> Iterator[tuple[str, Report]]:
    """The report after each thing that was measured, and what that was.

    Args:
        report: to begin with; peers that it has already are not measured again.
        name: of the model's shape.
        parts: of `PARTS`; both "engine" and "load" have the requests all at once.
        work: the requests.
    """
    peers_done = {row.implementation for row in report.rows}
    config = published_config(name)
    if "kernels" in parts:
        rows = measuring.kernel_rows(config, show_progress=True)
        report = replace(report, rows=(*report.rows, *rows))
        yield "kernels", report
    of_model = [part for part in parts if part != "kernels"]
    try:
        for part, grown in _measured_of_a_model(report, name, of_model, work):
            report, of_model = grown, [other for other in of_model if other != part]
            yield part, report
    except Exception as error:  # noqa: BLE001  (out of memory, say; the row says what, and peers go on)
        part = [*of_model, "engine"][0]
        row = Row(suite="steps" if part == "steps" else "engine", name=part, implementation="vSurge")
        report = replace(report, rows=(*report.rows, measuring.not_measured(row, error)))
        yield part, report
    if "engine" in parts:
        left = [peer for peer in PEERS if peer not in peers_done]
        for peer in progress_bar(left, "peers", show=True, unit="engine"):
            row = measuring.peer_row(peer, config, work.requests(config), work.at_once)
            report = replace(report, rows=(*report.rows, replace(row, case=work.case)))
            yield peer, report


def _measured_of_a_model(
    report: Report, name: str, parts: Sequence[str], work: RequestMix
) -> Iterator[tuple[str, Report]]:
    """As `_measured`, of "steps", "engine" and "load" alone, without peers."""
    if not parts:
        return
    model = random_model(name, seed=0)
    if "steps" in parts:
        report = replace(report, rows=(*report.rows, *measuring.step_rows(model, show_progress=True)))
        yield "steps", report
    if not {"engine", "load"} & set(parts):
        return
    requests = work.requests(model.config)
    with measuring.engine_for(model, requests, work.at_once) as surge:
        measuring.warm_up(surge, requests)
        load = run_load(surge, requests, requests_per_s=None)
        row = measuring.throughput_row(
            "vSurge", model.config, requests, work.at_once, (load.seconds,), Sizes.of(model)
        )
        row = replace(row, case=work.case | {"attention": _attention_of(surge)})
        # Its device idles for the host's sake if any does.
        alone = run_load(surge, [max(requests, key=lambda one: one.output_tokens)], requests_per_s=None)
        report = replace(report, rows=(*report.rows, row), loads=(load, alone))
        yield "engine", report
        if "load" in parts:
            rates = [share * load.num_requests / load.seconds for share in SHARES_OF_THROUGHPUT]
            loads = measuring.load_rows(surge, requests, rates, show_progress=True)
            report = replace(report, loads=(load, alone, *loads))
            yield "load", report


def _attention_of(surge: vSurge) -> str:
    """What its steps of single tokens and those with prompts run."""
    config, room = surge.model.config, {"page_size": surge.page_size, "context": surge.max_length}
    single, mixed = attention_of(config, "decode", **room), attention_of(config, "ragged", **room)
    return single if single == mixed else f"decode {single}, prompts {mixed}"


def _throughput(args: argparse.Namespace) -> None:
    surge, requests = engine_and_requests(args)
    config, at_once = surge.model.config, args.max_concurrent_decodes
    report = _new_report(args, describe_model(args, surge))
    with surge:
        measuring.warm_up(surge, requests)
        load = run_load(surge, requests, requests_per_s=None)
    sizes = Sizes.of(surge.model)
    rows = [measuring.throughput_row("vSurge", config, requests, at_once, (load.seconds,), sizes)]
    for name in progress_bar(list(args.peer or ()), "peers", show=True, unit="engine"):
        rows.append(measuring.peer_row(name, config, requests, at_once))
    _finish(replace(report, rows=tuple(rows), loads=(load,)), args.out)


def _serve(args: argparse.Namespace) -> None:
    rates = parse_rates(args.rate)
    surge, requests = engine_and_requests(args)
    report = _new_report(args, describe_model(args, surge))
    with surge:
        measuring.warm_up(surge, requests)
        loads = measuring.load_rows(surge, requests, rates, seed=args.seed, show_progress=True)
    _finish(replace(report, loads=tuple(loads)), args.out, plot=args.plot)


def _latency(args: argparse.Namespace) -> None:
    for name in ("batch", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    inputs, outputs = lengths(args)
    longest = max_length_of(args, inputs[1] + outputs[1])
    options = quiet({"max_length": longest, "max_queued_requests": args.batch})
    surge = build_engine(args, dense_model(args), None, max_concurrent_decodes=args.batch, **options)
    report = _new_report(args, describe_model(args, surge))
    requests = random_requests(args.batch, surge.model.config.vocab_size, inputs, outputs, seed=args.seed)
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=request.output_tokens)
        for request in requests
    ]
    seconds = list[float]()
    with surge:
        for repeat in progress_bar(list(range(args.repeats + 1)), "latency", show=True, unit="batch"):
            begin = time.perf_counter()
            surge.generate([request.prompt for request in requests], params).result()
            if repeat:  # the first one warms up
                seconds.append(time.perf_counter() - begin)
    sizes = Sizes.of(surge.model)
    row = measuring.throughput_row("vSurge", surge.model.config, requests, args.batch, tuple(seconds), sizes)
    _finish(replace(report, rows=(replace(row, name="latency"),)), args.out)


def _report(args: argparse.Namespace) -> None:
    for path in map(Path, args.results):
        report = read_report(path)
        print(markdown(report), end="")
        if not args.no_plot:
            for picture in draw(report, Path(args.out) if args.out else path.parent):
                print(f"\n![{picture.stem}]({picture})")
    print("\n".join(predicted(results_folder())))


def _new_report(args: argparse.Namespace, model: str | None) -> Report:
    """With the ceilings, which are measured now."""
    settings = {
        name: value
        for name, value in vars(args).items()
        if isinstance(value, int | float | str | list) and name not in ("out", "plot")  # paths of a machine
    }
    machine = describe_machine(jax.devices()[0])
    return Report(machine=machine, model=model, ceilings=measuring.ceilings(), settings=settings)


def _finish(report: Report, out: str | Path | None, *, plot: str | None = None) -> None:
    """Prints the tables, and writes what is to be written."""
    print(markdown(report), end="")
    if out is not None:
        report.write(Path(out))
        print(f"written to {out}", file=sys.stderr)
    if plot is not None:
        draw_load(Path(plot), report)
        print(f"drawn in {plot}", file=sys.stderr)
