"""Runs the demo checkpoint's engine on meshes of eight devices, and prints what it says, as JSON.

`python -m tests.runtime.many_devices DIMS…`, like 1,1,1,2,1: a program of its own, as jax's devices are those
of a process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import AutoTokenizer

import vsurge
from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.step import StepOutput
from vsurge.runtime.step_plan import StepPlan

from ..collectives import collectives, groups
from ..devices import simulate_devices
from .greedy import CAPITAL, GREEDY, STORY

SAMPLED = (
    SamplingParams(temperature=1.2, top_k=40, top_p=0.9, max_tokens=16, seed=3, min_tokens=3, logprobs=3,
                   prompt_logprobs=2, presence_penalty=0.5, repetition_penalty=1.1, logit_bias={5: 1.0}),
    SamplingParams(temperature=1.5, top_p=0.95, max_tokens=16, seed=5, ignore_eos=True,
                   allowed_token_ids=range(100, 1400, 3)),
    SamplingParams(temperature=1.0, min_p=0.01, max_tokens=16, seed=7, ignore_eos=True),
)  # fmt: skip


def on(dims: tuple[int, ...]) -> dict[str, Any]:
    model = vsurge.load_model(
        vsurge.demo_model_path(), dtype="float32", sharding_axis_dims=dims, progress=False
    )
    tokenizer = AutoTokenizer.from_pretrained(vsurge.demo_model_path())
    surge = vSurge.from_model(
        model,
        tokenizer,
        max_concurrent_decodes=2,
        prefill_lengths=[16],
        max_length=96,
        page_size=16,
        num_pages=16,
        verbose=False,
    )
    busy: list[int] = []  # how many replicas have something to do in each step
    run = surge._executor.run

    def watched(plan: StepPlan) -> StepOutput:
        busy.append(sum(map(bool, plan.parts)))
        return run(plan)

    surge._executor.run = watched
    with surge:
        greedy = surge.generate([CAPITAL, STORY], GREEDY).result(300)
        sampled = surge.generate([CAPITAL] * len(SAMPLED), SAMPLED).result(300)
        executor = surge._executor
        assert executor._row_state is not None
        return {
            "greedy": [sample.text for sample in greedy],
            "sampled": [sample.token_ids for sample in sampled],
            "logprobs": [
                [[one.logprob for one in each.values()] for each in of if each is not None]
                for of in (sampled[0].logprobs, sampled[0].prompt_logprobs)
                if of is not None
            ],
            "cache": [list(shard.data.shape) for shard in executor._kv_pages[0].data.addressable_shards],
            "bias": [list(shard.data.shape) for shard in executor._row_state.bias.addressable_shards],
            "groups": sorted({tuple(sorted(g)) for p in executor._programs.values() for g in groups(p)}),
            "busy": max(busy),
            "sent": [
                [plan[0], *key, count]
                for plan, program in executor._programs.items()
                for key, count in collectives(program).items()
            ],
        }


def main(*meshes: str) -> None:
    simulate_devices()
    found = {mesh: on(tuple(int(size) for size in mesh.split(","))) for mesh in meshes}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
