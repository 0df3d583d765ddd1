"""Two processes say what one says, and neither outlives the other by more than a moment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import vsurge
from vsurge.runtime import vSurge

from .greedy import CAPITAL, GREEDY, STORY, one
from .many_devices import SAMPLED
from .two_processes import others

ROOT = Path(__file__).parents[2]
WITHIN_S = 30.0
Pair = tuple[subprocess.Popen[str], ...]


@contextmanager
def two(*command: str, after: tuple[str, ...]) -> Iterator[Pair]:
    """Two processes, which are told where they meet; they are killed if they are still there at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    with ExitStack() as running:
        pair = tuple(
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", *command, *(word.format(where=where, i=i) for word in after)],
                    cwd=ROOT,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for i in range(2)
        )
        try:
            yield pair
        finally:
            for process in pair:
                process.kill()


def demo(dims: str, how: str) -> Any:
    return two("tests.runtime.two_processes", after=("{where}", "{i}", dims, how))


def first_json(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it prints, behind what libraries print of themselves."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(process.communicate()[1])


def assert_alike(found: dict[str, Any], surge: vSurge) -> None:
    alone = [sample.text for sample in surge.generate([CAPITAL, STORY], GREEDY).result(60.0)]
    assert found["greedy"] == alone
    sampled = surge.generate([CAPITAL] * len(SAMPLED), SAMPLED).result(60.0)
    assert found["sampled"] == [list(sample.token_ids) for sample in sampled]


def with_other_weights(surge: vSurge, prompt: str) -> str:
    old = surge.model.params
    surge.update_params(others())
    try:
        return one(surge, prompt).text
    finally:
        surge.update_params(old)


def test_two_processes_answer_as_one_does_with_other_weights_too_and_end_with_each_other(
    surge: vSurge,
) -> None:
    """A process that is killed takes the other one with it, which says so, in the middle of a step or not."""
    with demo("1,1,1,4,1", "update") as (leader, follower):
        found = first_json(leader)
        assert found["cache"] == [[16, 2, 1, 16, 64]] * 2
        assert_alike(found, surge)
        updated = first_json(leader)
        shape, parts, built = updated["refused"]
        assert shape == "params.final_norm: is float32[191], must be float32[192]"
        assert parts.startswith("params.embedding: other processes hold parts of it; gather it in process 0")
        assert built.startswith("model: after update_params the other processes have the new weights only")
        assert updated["under_way"] == 60
        assert updated["after"] == with_other_weights(surge, STORY) != found["greedy"][1]
        assert leader.poll() is follower.poll() is None
        follower.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert leader.wait(WITHIN_S) == 1
        assert time.monotonic() - killed < WITHIN_S
        assert leader.stderr is not None
        assert "vsurge: error: process 1 of 2 was lost; process 0 ends too" in leader.stderr.read()


@pytest.mark.slow  # each of the two compiles the engine's programs
def test_replicas_may_lie_in_different_processes_and_who_leads_may_be_lost(surge: vSurge) -> None:
    with demo("2,1,1,2,1", "go on") as (leader, follower):
        found = first_json(leader)
        assert found["cache"] == [[8, 2, 1, 16, 64]] * 2
        assert_alike(found, surge)
        leader.send_signal(signal.SIGKILL)
        assert follower.wait(WITHIN_S) == 1
        assert follower.stderr is not None
        assert "vsurge: error: process 0 of 2 was lost; process 1 ends too" in follower.stderr.read()


@pytest.mark.slow  # a silence has to be waited for
@pytest.mark.parametrize(
    ("who", "how", "why"),
    [
        (1, signal.SIGKILL, "was lost"),
        (1, signal.SIGSTOP, "has not been heard of for 20 s"),
        (0, signal.SIGSTOP, "has not been heard of for 20 s"),
    ],
)
def test_a_process_that_dies_or_stalls_ends_an_idle_one(who: int, how: signal.Signals, why: str) -> None:
    with demo("1,1,1,4,1", "idle") as pair:
        first_json(pair[0])
        pair[who].send_signal(how)
        other = pair[1 - who]
        assert other.wait(WITHIN_S) == 1
        assert other.stderr is not None
        message = f"vsurge: error: process {who} of 2 {why}; process {1 - who} ends too"
        assert message in other.stderr.read()


@pytest.mark.slow
def test_a_step_that_fails_in_the_middle_ends_all_processes() -> None:
    """Process 1 has begun it and would wait for process 0's part."""
    with demo("1,1,1,4,1", "fail") as (leader, follower):
        first_json(leader)
        failed, later = first_json(leader)["errors"]
        assert failed == "StepFailed: no room for a step of 16"
        assert later.startswith("EngineFailed: a step failed in process 0: RuntimeError: no room for a step")
        assert follower.wait(WITHIN_S) == 1
        assert follower.stderr is not None
        assert "a step failed in process 0: RuntimeError: no room for a step of 16; process 1 ends too" in (
            follower.stderr.read()
        )
        leader.wait(WITHIN_S)


@pytest.mark.slow
def test_the_command_line_runs_on_two_processes_of_which_the_first_one_writes() -> None:
    options = [
        "--temperature",
        "0",
        "--max-tokens",
        "8",
        "--max-length",
        "64",
        "--dtype",
        "float32",
        "--json",
    ]
    command = ["vsurge", "generate", *options, "--max-concurrent-decodes", "1", CAPITAL]
    alone = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    after = ("--tp", "2", "--coordinator", "{where}", "--process-id", "{i}", "--num-processes", "2")
    with two(*command, after=after) as (leader, follower):
        written, _ = leader.communicate(timeout=300)
        silent, _ = follower.communicate(timeout=WITHIN_S)
    assert (leader.returncode, follower.returncode, silent) == (0, 0, "")
    assert texts(written) == texts(alone.stdout)


def texts(written: str) -> list[str]:
    return [sample["text"] for sample in json.loads(written)["samples"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 1}, "num_processes=1: must be at least 2"),
        ({"process_id": 2}, "process_id=2: must be less than num_processes=2"),
        ({"process_id": -1}, "process_id=-1: must be at least 0"),
        ({"coordinator": "localhost"}, "coordinator='localhost': must be HOST:PORT"),
        ({"coordinator": ":80"}, "coordinator=':80': must be HOST:PORT"),
        ({"coordinator": 80}, "coordinator=80: must be a string, HOST:PORT"),
    ],
)
def test_what_makes_no_processes_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        vsurge.join_processes(
            **{"coordinator": "localhost:1", "process_id": 0, "num_processes": 2} | arguments
        )
