"""What tests ask of the chunks of a step."""

from __future__ import annotations

from vsurge.runtime.step_plan import Chunk


def output_index(chunk: Chunk) -> int:
    """Which of the request's generated tokens is the first to come out of this chunk, if any does."""
    return chunk.start + chunk.length - chunk.num_outputs + 1 - len(chunk.request.prompt_ids)
