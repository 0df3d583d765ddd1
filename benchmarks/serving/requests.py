"""What the measurements send."""

from __future__ import annotations

from ...runtime import SamplingParams


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
