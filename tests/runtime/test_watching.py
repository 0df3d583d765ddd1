"""What an engine shows to a profiler, and that it says nothing unasked."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vsurge.runtime import vSurge

from .greedy import GREEDY, STORY
from .scripted import TIMEOUT_S

PHASES = ("plan", "inputs", "dispatch", "read", "commit", "publish")


def test_a_trace_names_every_step_and_phase(surge: vSurge, tmp_path: Path) -> None:
    before = surge.metrics.num_steps
    with jax.profiler.trace(str(tmp_path)):
        surge.generate(STORY, GREEDY).result(TIMEOUT_S)
        surge.pause()  # so that the last step is in it
        surge.resume()
    [trace] = tmp_path.rglob("*.xplane.pb")
    host = next(p for p in jax.profiler.ProfileData.from_file(str(trace)).planes if p.name == "/host:CPU")
    events = [event for line in host.lines for event in line.events if event.name.startswith("vsurge.")]
    names = [event.name for event in events]
    num_steps = surge.metrics.num_steps - before
    assert num_steps >= 24
    for phase in PHASES:
        assert names.count(f"vsurge.{phase}") >= num_steps, phase
    numbered = {
        name: {dict(event.stats).get("step_num") for event in events if event.name == name}
        for name in ("vsurge.step", "vsurge.read", "vsurge.commit", "vsurge.publish")
    }
    for name, numbers in numbered.items():
        assert numbers >= set(range(before, before + num_steps)), name


RUN_ON_DEFAULTS = """
import vsurge
from transformers import AutoTokenizer
path = vsurge.demo_model_path()
with vsurge.vSurge.from_model(vsurge.load_model(path), AutoTokenizer.from_pretrained(path), max_length=64,
                              max_concurrent_decodes=2, max_prefill_length=16) as surge:
    [sample] = surge.generate("USER:What is a TPU?", vsurge.SamplingParams(temperature=0)).result()
    assert sample.text
    surge.update_params(surge.model.params)
    surge.abort(sample.request_id)
    surge.metrics
"""


def test_a_run_on_default_settings_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_ON_DEFAULTS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_programs_are_logged(surge: vSurge, caplog: pytest.LogCaptureFixture) -> None:
    fresh = vSurge.from_model(
        surge.model, max_concurrent_decodes=1, prefill_lengths=(8,), max_length=16, num_pages=2, verbose=False
    )
    with caplog.at_level(logging.INFO, "vsurge.runtime"):
        assert fresh.compile() == 3
        assert fresh.compile() == 3  # nothing more to do, and to say
    [record] = [r for r in caplog.records if "compiled" in r.getMessage()]
    assert record.getMessage().startswith("3 programs compiled in ")
    assert record.getMessage().endswith(
        "decode steps of [1] sequences, mixed steps of [8] tokens, and writing a row"
    )
