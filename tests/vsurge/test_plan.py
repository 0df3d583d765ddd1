"""`vsurge plan`: what it prints, with a stand-in for what takes the compiler minutes; and once without."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from vsurge.planning import plan, programs
from vsurge.planning.attention import Pending
from vsurge.planning.collectives import Collective, Sent
from vsurge.planning.programs import ProgramFacts
from vsurge.planning.timing import Attention

MIB = 2**20
SENT = Sent(Counter({Collective("all-reduce", 8 * MIB, 8): 128}), Counter())
FACTS = tuple(ProgramFacts(kind, 64, 0, 0, 0, 100 * MIB, 20 * MIB, SENT) for kind in ("decode", "mixed"))


@dataclass(frozen=True)
class Done(Pending):
    """Predictions that are there at once: a microsecond for each token that is seen, or of each prompt."""

    times_us: tuple[float, ...]

    def result(self) -> list[Attention]:
        return [Attention(time_us=time, useful_bytes=0.0, useful_flops=0.0) for time in self.times_us]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(deployment: Any, batches: Any, *_: Any, **__: Any) -> Done:
        return Done(1, (), tuple(float(batch * context) for batch, context in batches))

    def prefill(deployment: Any, contexts: Any, *_: Any, **__: Any) -> Done:
        return Done(1, (), tuple(float(context) for context in contexts))

    monkeypatch.setattr(plan, "compile_steps", lambda *_, **__: FACTS)
    monkeypatch.setattr(plan, "predict_decode", decode)
    monkeypatch.setattr(plan, "predict_prefill", prefill)


@pytest.mark.usefixtures("compiled")
def test_a_plan_says_what_fits_what_it_takes_and_what_it_rests_on(command: Callable) -> None:
    done = command(
        "plan", "--chip", "v6e:2x2", "--model", "Qwen/Qwen3-32B", "--tp", "4", "--batch", "1,32,64"
    )
    assert done.code == 0, done.err
    assert done.out.startswith("Qwen/Qwen3-32B on v6e:2x2 (4 chips, 4 devices): tp 4, weights bfloat16,")
    lines = {line.strip().rpartition("GiB")[0].strip(): line for line in done.out.splitlines()}
    assert "memory of a chip          31.25" in lines
    assert any(line.startswith("weights                  15.26") for line in lines)
    assert any(line.startswith("temporaries               0.10") for line in lines)
    assert any(line.startswith("program                   0.04") for line in lines)
    assert "decode step of 64         128 all-reduce of 8 MiB" in done.out
    [large] = [line for line in done.out.splitlines() if line.startswith("      64 x   4,096")]
    assert large.endswith("does not fit")
    assert "v6e:2x4 with tp 8 has room for 64 of 4,096 tokens" in done.out
    for name in ("gbytes_per_s", "link_gbytes_per_s", "hop_us", "latency_us"):
        assert f"    {name} " in done.out
    assert "Cloud TPU documentation" in done.out


@pytest.mark.usefixtures("compiled")
def test_slices_stand_side_by_side_in_text_json_and_a_picture(command: Callable, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "plan.png"
    argv = ("plan", "--compare", "v5e:4x4,v6e:2x4,tpu7x:2x2x1,v5e:1x1", "--model", "32B", "--tp", "8",
            "--batch", "8,64", "--context", "1024", "--plot", str(picture))  # fmt: skip
    done = command(*argv)
    assert done.code == 0, done.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    [head] = [line for line in done.out.splitlines() if line.startswith("tokens/s (of a user)")]
    assert head.split()[-4:] == ["v5e:4x4", "v6e:2x4", "tpu7x:2x2x1", "v5e:1x1"]
    [shared] = [line for line in done.out.splitlines() if line.startswith("replicas")]
    assert shared.split()[1:9] == ["2", "x", "tp", "8", "1", "x", "tp", "8"]
    assert "does not run: --tp 8: must divide the 1 devices of v5e:1x1" in done.out

    document = json.loads(command(*argv, "--json", "--assume", "hop_us=0", "--kv-dtype", "int8").out)
    v5e, v6e, v7x, small = document["slices"]
    assert (v5e["replicas"], v6e["replicas"], v7x["devices"]) == (2, 1, 8)
    assert small["refused"] is not None
    assert small["instead"] == {"slice": "v5e:2x2", "tp": 4}  # in int8
    assert v6e["assumptions"]["hop_us"] == {
        "value": 0, "meaning": "us from a chip to its neighbour", "source": "--assume",
    }  # fmt: skip
    for one in (v5e, v6e, v7x):
        few, many = one["decode"]
        assert few["step_us"] == pytest.approx(sum(few["parts_us"].values()))
        assert few["tokens_per_s"] == pytest.approx(8 * few["user_tokens_per_s"] * one["replicas"])
        assert many["parts_us"]["attention"] == 64 * 1024
        assert 0 < many["roofline"] < 1
        assert one["programs"][0]["collectives"] == [
            {"kind": "all-reduce", "num_bytes": 8 * MIB, "group": 8, "count": 128}
        ]
    # 8 MiB / 64 for each sequence; two dimensions of 100 GB/s; there and back
    sent_us = 128 * 2 * 7 / 8 * MIB / 200e3
    assert v6e["decode"][0]["parts_us"]["interconnect"] == pytest.approx(sent_us)
    assert v6e["memory"]["sequences"] == {"1024": v6e["memory"]["num_pages"] // 8}
    assert document["kv_dtype"] == "int8"


@pytest.mark.usefixtures("compiled")
def test_what_the_compiler_refuses_is_an_answer(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory\non HBM")

    monkeypatch.setattr(plan, "compile_steps", refuse)
    done = command("plan", "--chip", "v6e:2x2", "--model", "8B")
    assert done.code == 0
    assert "does not run: does not compile: RESOURCE_EXHAUSTED: Ran out of memory on HBM" in done.out


@pytest.mark.usefixtures("compiled")
def test_a_compiler_that_crashes_is_an_answer(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "compile_steps", programs.compile_steps)
    monkeypatch.setattr(programs, "_prepare", os.abort)  # in the process that would compile
    done = command("plan", "--chip", "v6e:2x2", "--model", "8B")
    assert done.code == 0
    assert "does not run: does not compile: the compiler crashed, or there is too little memory" in done.out


def test_what_does_not_fit_is_an_answer_before_anything_is_compiled(command: Callable) -> None:
    done = command("plan", "--chip", "v6e:2x2", "--model", "235B-A22B")
    assert done.code == 0
    assert "does not run: weights (109.54 GiB), what is remembered of rows" in done.out
    assert "v6e:4x4 with tp 16 has room for 1 of 4,096 tokens" in done.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "give --chip v6e:2x4, or --compare"),
        (("--chip", "v6e:2x5"), "slice 'v6e:2x5': must be one of v6e:1x1"),
        (("--chip", "v6e:2x2", "--batch", "a"), "--batch 'a': must be positive numbers with commas between"),
        (("--chip", "v6e:2x2", "--batch", "1" + "0" * 30), "0': must be positive numbers with commas"),
        (("--chip", "v6e:2x2", "--tp", "0"), "--tp 0: must be at least 1"),
        (
            ("--chip", "v6e:2x2", "--context", "50000"),
            "must lie between 2 and the 40,960 tokens of the model",
        ),
        (("--chip", "v6e:2x2", "--page-size", "0"), "--page-size 0: must be at least 1"),
        (("--chip", "v6e:2x2", "--prefill", "0"), "--prefill 0: must be at least 1"),
        (("--chip", "v6e:2x2", "--memory-utilization", "2"), "must be above 0 and at most 1"),
        (("--chip", "v6e:2x2", "--assume", "speed=1"), "must be NAME=NUMBER with one of gbytes_per_s"),
        (("--chip", "v6e:2x2", "--assume", "tflops=0"), "--assume tflops=0: must be a number, above 0"),
    ],
)
def test_bad_options_are_named(command: Callable, argv: tuple[str, ...], message: str) -> None:
    done = command("plan", "--model", "8B", *argv)
    assert done.code == 1
    assert message in done.err


@pytest.mark.slow
def test_a_small_model_is_planned_by_the_compiler_itself(command: Callable) -> None:
    done = command("plan", "--chip", "v6e:2x2", "--model", "0.6B", "--batch", "1,8", "--context", "512",
                   "--prefill", "256", "--json")  # fmt: skip
    [planned] = json.loads(done.out)["slices"]
    assert planned["refused"] is None
    decode, mixed = planned["programs"]
    # two for each layer and one for the embedding, in bfloat16
    sums = {"kind": "all-reduce", "num_bytes": 8 * 1024 * 2, "group": 4, "count": 2 * 28 + 1}
    assert sums in decode["collectives"]
    assert sums | {"num_bytes": 256 * 1024 * 2} in mixed["collectives"]
    one, eight = planned["decode"]
    assert 0 < one["step_us"] < eight["step_us"] < 5 * one["step_us"]
    assert all(part >= 0 for part in eight["parts_us"].values())
