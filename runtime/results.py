"""Reading what came out of a step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .logprobs import LogprobArrays
from .step import StepOutput
from .step_inputs import StepInputs
from .step_plan import Chunk, StepPlan, StepResults
from .token_logprobs import TokenLogprobs


def start_reading(inputs: StepInputs, output: StepOutput) -> StepOutput:
    """A step's output without what nobody asked for; has the device send that as soon as it is there."""
    scores_any = inputs.num_scored is not None and np.any(inputs.num_scored)
    wanted = StepOutput(
        output.tokens,
        output.logprobs if np.any(inputs.wants_logprobs) else None,
        output.scores if scores_any else None,
    )
    arrays: list[jax.Array] = jax.tree.leaves(wanted)
    for array in arrays:
        array.copy_to_host_async()
    return wanted


def read_results(plan: StepPlan, output: StepOutput) -> StepResults:
    """Waits for a step, and reads its output."""
    output = jax.tree.map(np.asarray, output)
    tokens: Any = output.tokens
    # What is of a replica takes an equal part of each array, and begins with what is of its chunks.
    size = tokens.shape[1] // plan.num_replicas
    places = [start * size + i for start, part in enumerate(plan.parts) for i in range(len(part))]
    logprobs: list[list[TokenLogprobs] | None] | None = None
    if output.logprobs is not None:
        logprobs = [
            _logprobs(output.logprobs, i, chunk) for i, chunk in zip(places, plan.chunks, strict=True)
        ]
    scores: list[list[TokenLogprobs]] | None = None
    if output.scores is not None:
        scores, size = [], output.scores.chosen.shape[0] // plan.num_replicas
        for replica, part in enumerate(plan.parts):
            start = replica * size
            for chunk in part:
                count = len(chunk.tokens_to_score)
                scores.append([output.scores.at(start + i) for i in range(count)])
                start += count
    return StepResults(tokens[:, places].T.tolist(), logprobs, scores)


def _logprobs(arrays: LogprobArrays, index: int, chunk: Chunk) -> list[TokenLogprobs] | None:
    if not chunk.request.wants_logprobs:
        return None
    return [arrays.at(step, index) for step in range(chunk.num_outputs)]
