"""One of two processes that run the demo checkpoint's engine, on two devices each.

`python -m tests.runtime.two_processes COORDINATOR PROCESS_ID DIMS HOW`: process 0 prints as JSON what it
generates. HOW is "go on" for generating until it is ended, "update" for the same after its weights have been
replaced, "fail" for a step that fails after process 1 has begun it, or "idle" for an engine that is built and
does nothing.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
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
    if how == "idle":
        show({})
        threading.Event().wait()
    with surge:
        greedy = surge.generate([CAPITAL, STORY], GREEDY).result(100.0)
        sampled = surge.generate([CAPITAL] * len(SAMPLED), SAMPLED).result(100.0)
        show(
            {
                "greedy": [sample.text for sample in greedy],
                "sampled": [sample.token_ids for sample in sampled],
                "cache": [list(s.data.shape) for s in surge._executor._kv_pages[0].data.addressable_shards],
            }
        )
        if how == "update":
            update(surge, processes)
        if how == "fail":
            return fail_in_a_step(surge)
        while True:
            surge.generate(CAPITAL, SamplingParams(max_tokens=80, ignore_eos=True)).result(100.0)


def show(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def others() -> Any:
    """Weights that write another text, which one process has all of."""
    params = vsurge.load_model(vsurge.demo_model_path(), dtype="float32", progress=False).params
    layers = tuple(replace(layer, down_proj=-layer.down_proj) for layer in params.layers)
    # Some of jax's arrays, some of NumPy's.
    return replace(params, layers=layers, embedding=np.asarray(params.embedding))


def update(surge: vSurge, processes: Processes) -> None:
    """Prints what is refused, what a request says that is under way, and what one says that comes later."""
    old, new = surge.model, others()
    refused = list[str]()
    for wrong in (replace(new, final_norm=new.final_norm[:-1]), old.params):
        try:
            surge.update_params(wrong)
        except ValueError as error:
            refused.append(str(error))
    under_way = surge.generate(STORY, replace(GREEDY, max_tokens=60))
    surge.update_params(new)
    try:
        vSurge.from_model(old, num_pages=16, processes=processes)
    except ValueError as error:
        refused.append(str(error))
    [went_on] = under_way.result(100.0)
    surge.stop()
    surge.start()
    [after] = surge.generate(STORY, GREEDY).result(100.0)
    show({"refused": refused, "under_way": went_on.num_generated_tokens, "after": after.text})


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
    show({"errors": errors})


def main(coordinator: str, process_id: str, dims: str, how: str) -> None:
    simulate_devices(2)
    with vsurge.join_processes(coordinator, process_id=int(process_id), num_processes=2) as processes:
        sizes = [int(size) for size in dims.split(",")]
        model = vsurge.load_model(
            vsurge.demo_model_path(), dtype="float32", sharding_axis_dims=sizes, progress=False
        )
        if processes.process_id == 0:
            lead(model, processes, how)
        else:
            processes.follow(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
