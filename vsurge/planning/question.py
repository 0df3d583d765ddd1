"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..model import Quantization, Qwen3Config


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is asked for.

    Attributes:
        config: the model.
        quantization: of its weights.
        tp: devices that share it; None for as many as the slice has, or as can share it evenly.
        batches: sequences that decode together, ascending.
        contexts: tokens of each, ascending.
        page_size: tokens per page of the cache.
        chunk: tokens of prompts in a step.
        utilization: the cache's share of what weights and rows leave.
        assumed: assumptions that differ from those of `PlanAssumptions.of`.
    """

    config: Qwen3Config
    quantization: Quantization | None
    tp: int | None
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    page_size: int
    chunk: int
    utilization: float
    assumed: dict[str, float]

    @property
    def max_length(self) -> int:
        return max(self.contexts)
