"""How a request wants its tokens chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

# vLLM's parameters that have no effect here yet: any other value than the default is refused.
NOT_YET_SUPPORTED = (
    "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "logprobs",
    "prompt_logprobs", "spaces_between_special_tokens", "output_kind", "guided_decoding", "logit_bias",
    "allowed_token_ids",
)  # fmt: skip
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names, defaults and meanings of vLLM's.

    The order in which they act: `min_tokens` masks the ending tokens, `temperature` divides the logits, then
    `min_p`, `top_k` and `top_p` each cut what is left.

    Attributes:
        max_tokens: most tokens to generate; None for as many as `max_length` allows.
        min_tokens: before this many tokens no end-of-sequence or stop token is chosen and no stop string ends
            the text.
        temperature: divides the logits; 0 chooses the likeliest token (greedy).
        top_p: keeps the fewest likeliest tokens whose probabilities sum to at least this, in (0, 1]. 1: all.
        top_k: keeps the k likeliest tokens; 0 or -1: all. Ties with the k-th are kept.
        min_p: keeps tokens of at least this share of the likeliest one's probability, in [0, 1]. 0: all.
        seed: 0 to 2**64 - 1; the same seed gives the same text, alone or in any batch. None: drawn from the
            engine's seed.
        stop: a string or several; generation ends where one appears, and the text ends before it.
        stop_token_ids: more tokens that end generation.
        ignore_eos: go on after an end-of-sequence token.
        detokenize: give text, not just token ids.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: end the text after the stop string, or the stop token's text.
        truncate_prompt_tokens: keep only this many of the prompt's last tokens; None keeps all of them.

    The remaining fields are vLLM's too and not yet supported: a value other than the default is an error.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
        NotImplementedError: a parameter that has no effect yet.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    repetition_penalty: float | int = 1.0
    temperature: float | int = 1.0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: str = "cumulative"
    truncate_prompt_tokens: int | None = None
    guided_decoding: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in NOT_YET_SUPPORTED and value != field.default:
                raise NotImplementedError(
                    f"{field.name}={value!r}: not yet supported, leave it at {field.default!r}"
                )
        self._check_number("temperature", 0.0, math.inf)
        self._check_number("top_p", 0.0, 1.0, low_open=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_integer("top_k", -1)
        self._check_integer("max_tokens", 1, optional=True)
        self._check_integer("min_tokens", 0)
        self._check_integer("seed", 0, MAX_SEED, optional=True)
        self._check_integer("truncate_prompt_tokens", 1, optional=True)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}")
        self._check_stops()

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self._as_tuple("stop")
        if not all(isinstance(s, str) for s in stop):
            raise TypeError(f"stop={self.stop!r}: must be a string or several")
        if not all(stop):
            raise ValueError(f"stop={self.stop!r}: must be non-empty strings")
        if stop and not self.detokenize:
            raise ValueError("stop: stop strings need detokenize=True")
        object.__setattr__(self, "stop", stop)
        ids = self._as_tuple("stop_token_ids")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TypeError(f"stop_token_ids={self.stop_token_ids!r}: must be token ids, integers")
        if not all(i >= 0 for i in ids):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r}: must be at least 0")
        object.__setattr__(self, "stop_token_ids", ids)

    def _as_tuple(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if value is None:
            return ()
        if not isinstance(value, Iterable):
            raise TypeError(f"{name}={value!r}: must be a sequence")
        return tuple(cast("Iterable[Any]", value))

    def _check_number(self, name: str, low: float, high: float, *, low_open: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r}: must be a number")
        in_range = (low < value if low_open else low <= value) and value <= high and math.isfinite(value)
        if not in_range:
            bracket = "(" if low_open else "["
            end = "infinity)" if high == math.inf else f"{high}]"
            raise ValueError(f"{name}={value}: must lie in {bracket}{low}, {end}")

    def _check_integer(self, name: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: must be an integer{' or None' if optional else ''}")
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{name}={value}: must be {allowed}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return self.stop  # pyright: ignore[reportReturnType]  (normalized in __post_init__)
