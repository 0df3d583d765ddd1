"""Reading what came out of a step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .logprobs import LogprobArrays
from .scheduler import Chunk, StepPlan, StepResults
from .step import StepOutput
from .token_logprobs import TokenLogprobs


def start_reading(plan: StepPlan, output: StepOutput) -> None:
    """Has the device send what will be read, as soon as it is there."""
    arrays: list[jax.Array] = jax.tree.leaves(_wanted(plan, output))
    for array in arrays:
        array.copy_to_host_async()


def read_results(plan: StepPlan, output: StepOutput) -> StepResults:
    """Waits for a step, and reads what is wanted of it."""
    output = jax.tree.map(np.asarray, _wanted(plan, output))
    tokens: Any = output.tokens
    logprobs: list[list[TokenLogprobs] | None] | None = None
    if output.logprobs is not None:
        logprobs = [_logprobs(output.logprobs, i, chunk) for i, chunk in enumerate(plan.chunks)]
    scores: list[list[TokenLogprobs]] | None = None
    if output.scores is not None:
        scores, start = [], 0
        for chunk in plan.chunks:
            count = len(chunk.tokens_to_score)
            scores.append([output.scores.at(start + i) for i in range(count)])
            start += count
    return StepResults(tokens[:, : len(plan.chunks)].T.tolist(), logprobs, scores)


def _wanted(plan: StepPlan, output: StepOutput) -> StepOutput:
    """The step's output without what nobody asked for."""
    wants_logprobs = any(chunk.num_outputs and chunk.request.wants_logprobs for chunk in plan.chunks)
    wants_scores = any(chunk.tokens_to_score for chunk in plan.chunks)
    return StepOutput(
        output.tokens,
        output.logprobs if wants_logprobs else None,
        output.scores if wants_scores else None,
    )


def _logprobs(arrays: LogprobArrays, index: int, chunk: Chunk) -> list[TokenLogprobs] | None:
    if not chunk.request.wants_logprobs:
        return None
    return [arrays.at(step, index) for step in range(chunk.num_outputs)]
