"""`vsurge bench`: its commands on the demo checkpoint, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vsurge
from vsurge.benchmarks import measuring
from vsurge.benchmarks.engine.apart import Wanted
from vsurge.benchmarks.engine.peers import PEERS
from vsurge.benchmarks.engine.steps import StepCase
from vsurge.benchmarks.kernels.cases import KernelCase
from vsurge.benchmarks.measuring import RequestMix
from vsurge.benchmarks.record import Ceilings, read_report
from vsurge.cli import bench
from vsurge.cli.parser import build_parser

CEILINGS = Ceilings(bandwidth_gb_s=10.0, matrix_gflop_s=100.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ceilings", lambda: CEILINGS)


@pytest.mark.usefixtures("quick")
def test_the_commands_measure_the_demo_checkpoint(command: Callable, tmp_path: Path) -> None:
    lengths = ("--input-tokens", "4:8", "--output-tokens", "3", "--num-pages", "24", "--page-size", "16")
    done = command("bench", "serve", "--rate", "40,80", "--num-requests", "3", *lengths,
        "--out", str(tmp_path / "serve.json"), "--plot", str(tmp_path / "new" / "load.png"))  # fmt: skip
    assert done.code == 0, done.err
    loads = json.loads((tmp_path / "serve.json").read_text())["loads"]
    assert [(load["requests_per_s"], load["output_tokens"]) for load in loads] == [(40.0, 9), (80.0, 9)]
    assert (tmp_path / "new" / "load.png").exists()
    assert "| 40 " in done.out

    done = command("bench", "latency", "--batch", "2", "--repeats", "2", *lengths,
        "--out", str(tmp_path / "latency.json"))  # fmt: skip
    assert done.code == 0, done.err
    [row] = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert (row["name"], len(row["seconds"]), row["tokens"]) == ("latency", 2, 6)

    done = command("bench", "report", str(tmp_path / "latency.json"), "--out", str(tmp_path))
    assert done.code == 0, done.err
    assert "| latency | vSurge |" in done.out
    assert "predicted from the compiler's schedule, never measured" in done.out


def test_every_peer_and_no_other_can_be_asked_for() -> None:
    parse = build_parser().parse_args
    given = [argument for peer in PEERS for argument in ("--peer", peer)]
    assert parse(["bench", "throughput", *given]).peer == list(PEERS)
    with pytest.raises(SystemExit):
        parse(["bench", "throughput", "--peer", "another"])


@pytest.fixture
def small(quick: None, monkeypatch: pytest.MonkeyPatch) -> RequestMix:
    """Has `all` measure one small kernel, one small step and these requests to the demo checkpoint."""
    kernel = KernelCase(kernel="decode", implementation="xla", num_q_heads=4, num_kv_heads=2, context=64)
    work = RequestMix(num_requests=3, input_tokens=(4, 8), output_tokens=(2, 3), at_once=2)
    model = vsurge.load_model(vsurge.demo_model_path())
    monkeypatch.setattr(measuring.kernels, "cases", lambda *_: [kernel])
    monkeypatch.setattr(measuring.steps, "cases", lambda _: [StepCase("decode", 2, 16)])
    monkeypatch.setattr(measuring, "FEWER", work)
    monkeypatch.setattr(measuring, "QUOTED", work)
    monkeypatch.setattr(bench, "random_model", lambda *_, **__: model)
    monkeypatch.setattr(bench, "gpu_is_here", lambda: False)
    return work


@pytest.mark.usefixtures("small")
def test_all_writes_down_each_part(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(PEERS, "another", (("no_such_package",), PEERS["vLLM"][1]))
    monkeypatch.setattr(bench, "PEERS", ["another"])
    done = command("bench", "all", "--out", str(tmp_path))
    assert done.code == 0, done.err
    report = read_report(tmp_path / "bench.json")
    assert [(row.suite, row.implementation) for row in report.rows] == [
        ("kernels", "vSurge xla"), ("steps", "vSurge"), ("engine", "vSurge"), ("engine", "another"),
    ]  # fmt: skip
    assert [row.case.get("attention") for row in report.rows] == [None, "xla", "xla", None]
    at_once, alone, half, most = report.loads
    assert at_once.requests_per_s is alone.requests_per_s is None
    longest = max(row.case["out"].split("-")[1] for row in report.rows if row.name == "throughput")
    assert (alone.num_requests, str(alone.output_tokens)) == (1, longest)
    assert half.requests_per_s == pytest.approx(0.5 * 3 / at_once.seconds)
    assert most.requests_per_s == pytest.approx(0.9 * 3 / at_once.seconds)
    assert (report.settings["what"], "out" in report.settings) == ("all", False)
    assert done.out.count("| not measured") == 1
    assert list(report.took_s) == ["ceilings", "kernels", "steps", "engine", "load", "another"]
    took = sum(report.took_s.values())
    assert at_once.seconds <= report.took_s["engine"] < took
    assert f"- the run took {took:,.0f} s: ceilings " in done.out


def failing(*_: Any, **__: Any) -> Any:
    raise MemoryError("of 80 GB\nnone is left")


@pytest.mark.usefixtures("small")
def test_a_peer_or_a_step_that_fails_is_a_row_with_the_reason(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, run in (("greedy", failing), ("modest", lambda *_: lambda _: 2.0)):
        monkeypatch.setitem(PEERS, name, ((), run))
    monkeypatch.setattr(bench, "PEERS", ["greedy", "modest"])
    good, bad = StepCase("decode", 2, 16), StepCase("decode", 1, 16)
    monkeypatch.setattr(measuring.steps, "cases", lambda _: [bad, good])
    build = StepCase.build
    monkeypatch.setattr(
        StepCase, "build", lambda case, model: failing() if case == bad else build(case, model)
    )
    done = command("bench", "all", "--only", "steps", "--only", "engine", "--out", str(tmp_path))
    report = read_report(tmp_path / "bench.json")
    reason = "MemoryError: of 80 GB none is left"
    assert [(row.implementation, row.not_measured) for row in report.rows] == [
        ("vSurge", reason), ("vSurge", None), ("vSurge", None), ("greedy", reason), ("modest", None),
    ]  # fmt: skip
    assert done.out.count("| not measured") == 2
    assert [record.getMessage() for record in caplog.records if record.name == "vsurge.benchmarks"] == [
        f"decode, vSurge: not measured: {reason}", f"throughput, greedy: not measured: {reason}",
    ]  # fmt: skip
    assert (done.code, f"decode, vSurge: {reason}" in done.err) == (1, True)  # ours; a peer's is no error


@pytest.mark.usefixtures("small")
def test_peers_go_on_where_the_engine_fails(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(PEERS, "modest", ((), lambda *_: lambda _: 2.0))
    monkeypatch.setattr(bench, "PEERS", ["modest"])
    monkeypatch.setattr(measuring, "engine_for", failing)
    done = command("bench", "all", "--only", "engine", "--only", "load", "--out", str(tmp_path))
    rows = read_report(tmp_path / "bench.json").rows
    assert [(row.name, row.implementation, bool(row.seconds)) for row in rows] == [
        ("engine", "vSurge", False), ("throughput", "modest", True),
    ]  # fmt: skip
    assert (done.code, "engine, vSurge: MemoryError" in done.err) == (1, True)


def test_on_a_gpu_peers_are_measured_before_jax_takes_its_memory(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: RequestMix
) -> None:
    """Each in a process of its own."""
    happened = list[str]()

    def ceilings() -> Ceilings:
        happened.append("ceilings")
        return CEILINGS

    def run_apart(wanted: Wanted) -> float:
        assert (wanted.device, wanted.at_once, len(wanted.requests)) == ("cuda", small.at_once, 3)
        happened.append(wanted.name)
        return 2.0

    monkeypatch.setattr(measuring, "ceilings", ceilings)
    monkeypatch.setattr(measuring, "run_apart", run_apart)
    monkeypatch.setattr(bench, "gpu_is_here", lambda: True)
    monkeypatch.setitem(PEERS, "modest", ((), failing))
    monkeypatch.setattr(bench, "PEERS", ["modest"])
    done = command("bench", "all", "--model", "0.6B", "--only", "engine", "--out", str(tmp_path))
    assert done.code == 0, done.err
    assert happened == ["modest", "ceilings"]
    report = read_report(tmp_path / "bench-0-6b.json")  # there the usual model is another
    assert [row.implementation for row in report.rows] == ["modest", "vSurge"]
    assert list(report.took_s) == ["modest", "ceilings", "engine"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("serve", "--rate", "0"), "--rate 0: must be positive numbers like 0.5,1,2"),
        (("serve", "--rate", "1", "--input-tokens", "9:3"), "--input-tokens 9:3: must be a number of tokens"),
        (("throughput", "--num-requests", "0"), "--num-requests 0: must be at least 1"),
        (("throughput", "--max-length", "8"), "--max-length 8: the longest request has "),
        (
            ("throughput", "--requests", "f", "--num-requests", "3"),
            "3: has no effect beside --requests f",
        ),
        (("serve", "--rate", "1", "--seed", "-1"), "--seed -1: must be at least 0"),
        (
            ("throughput", "--requests", sys.executable),
            ':1: must be like {"input_tokens": 100, "output_tokens"',
        ),
        (("throughput", "--requests", "no/such"), "No such file or directory"),
        (("latency", "--batch", "0"), "--batch 0: must be at least 1"),
        (
            ("latency", "--max-length", "20", "--input-tokens", "16", "--output-tokens", "200"),
            "--max-length 20: the longest request has 216 tokens",
        ),
        (("all", "--model", "30B-A3B"), "a model with experts cannot be measured"),
        (("throughput", "--random-weights", "30B-A3B"), "a model with experts cannot be measured"),
        (("latency", "--random-weights", "235B-A22B"), "a model with experts cannot be measured"),
        (("report", sys.executable), ": is no report of `vsurge bench`"),
        (("report", "no/such.json"), "No such file or directory"),
    ],
)
def test_bad_arguments_are_named(command: Callable, argv: tuple[str, ...], message: str) -> None:
    done = command("bench", *argv)
    assert done.code == 1
    assert message in done.err
