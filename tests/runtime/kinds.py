"""Sampling parameters of every kind, as changes of others."""

from __future__ import annotations

from typing import Any

KINDS: list[dict[str, Any]] = [
    {}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.3, "temperature": 0.8, "seed": 9},
    {"frequency_penalty": 0.7}, {"presence_penalty": 1.1, "temperature": 2.0, "seed": 1, "top_k": 20},
    {"logit_bias": {300: 3.0, 65: -9.0}}, {"allowed_token_ids": list(range(200, 900))},
    {"bad_words": ["the", "is a"]},
    {"guided_decoding": {"regex": "[a-z ]{30,40}"}, "seed": 5, "temperature": 1.0},
    {"logprobs": 2, "temperature": 1.0, "seed": 2, "top_p": 0.9}, {"prompt_logprobs": 1},
    {"min_tokens": 12, "ignore_eos": False},
]  # fmt: skip
