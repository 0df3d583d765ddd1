"""One of two processes that run the demo checkpoint's engine, on two devices each.

`python -m tests.runtime.two_processes COORDINATOR PROCESS_ID DIMS HOW`: process 0 prints as JSON what it
generates. HOW is "end", "go on" for generating until it is ended,
or "fail" for a step that fails after process 1 has begun it.
"""

from __future__ import annotations

import json
import sys
from typing import NoReturn

from transformers import AutoTokenizer

import vsurge
from vsurge.runtime import Processes, SamplingParams, vSurge
from vsurge.runtime.executor import Executor, StepCall

from ..devices import simulate_devices
from .greedy import CAPITAL, GREEDY, STORY
from .many_devices import SAMPLED


def lead(model: vsurge.Model, processes: Processes, how: str) -> None:
    surge = vSurge.from_model(
        model,
        AutoTokenizer.from_pretrained(vsurge.demo_model_path()),
        max_concurrent_decodes=2,
        prefill_lengths=[16],
        max_length=96,
        page_size=16,
        num_pages=16,
        verbose=False,
        processes=processes,
    )
    with surge:
        greedy = surge.generate([CAPITAL, STORY], GREEDY).result(100.0)
        sampled = surge.generate([CAPITAL] * len(SAMPLED), SAMPLED).result(100.0)
        found = {
            "greedy": [sample.text for sample in greedy],
            "sampled": [sample.token_ids for sample in sampled],
            "cache": [list(s.data.shape) for s in surge._executor._kv_pages[0].data.addressable_shards],
        }
        print(json.dumps(found), flush=True)
        if how == "fail":
            fail_in_a_step(surge)
        while how == "go on":
            surge.generate(CAPITAL, SamplingParams(max_tokens=80, ignore_eos=True)).result(100.0)


def fail_in_a_step(surge: vSurge) -> None:
    """Prints what the request of the step gets, and what one behind it gets."""

    def broken(self: Executor, call: StepCall) -> NoReturn:
        raise RuntimeError(f"no room for a step of {call.bucket}")

    Executor.dispatch = broken
    errors = list[str]()
    for _ in range(2):
        try:
            surge.generate(CAPITAL, GREEDY).result(100.0)
        except vsurge.runtime.EngineError as error:
            errors.append(f"{type(error).__name__}: {error.__cause__}")
    print(json.dumps({"errors": errors}), flush=True)


def main(coordinator: str, process_id: str, dims: str, how: str) -> None:
    simulate_devices(2)
    with vsurge.join_processes(coordinator, process_id=int(process_id), num_processes=2) as processes:
        model = vsurge.load_model(
            vsurge.demo_model_path(),
            dtype="float32",
            sharding_axis_dims=[int(size) for size in dims.split(",")],
            progress=False,
        )
        if processes.process_id == 0:
            lead(model, processes, how)
        else:
            processes.follow(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
