"""Prompts that the demo checkpoint knows, and what it answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vsurge.runtime import ReturnSample, SamplingParams, vSurge

from .scripted import TIMEOUT_S

CAPITAL = "USER:What is the capital of France?\nASSISTANT:"
STORY = "USER:Tell me a short story about a cat.\nASSISTANT:"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def one(surge: vSurge, prompt: Any, params: SamplingParams = GREEDY, **changes: Any) -> ReturnSample:
    """The output for one prompt."""
    [sample] = surge.generate(prompt, replace(params, **changes)).result(TIMEOUT_S)
    assert sample.num_generated_tokens == len(sample.token_ids)
    return sample
