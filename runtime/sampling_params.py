"""How a request wants its tokens chosen, and when it ends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any, cast

from .checks import as_flag, as_integer, as_integers, as_number, as_optional_integer

# vLLM's parameters that have no effect here yet: a value that would have one is refused.
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
        max_tokens: most tokens to generate; None for as many as `max_length` and the cache allow.
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

    The remaining fields are vLLM's too and not yet supported: they may have the default or another value that
    asks for nothing (`best_of=1`, `bad_words=[]`, `logit_bias={}`), which becomes the default.

    Numbers may be NumPy's; they become Python's.

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
            if field.name in NOT_YET_SUPPORTED:
                self._set(field.name, _neutral(field.name, getattr(self, field.name), field.default))
        self._set("temperature", as_number("temperature", self.temperature, 0.0, math.inf))
        self._set("top_p", as_number("top_p", self.top_p, 0.0, 1.0, low_open=True))
        self._set("min_p", as_number("min_p", self.min_p, 0.0, 1.0))
        self._set("top_k", as_integer("top_k", self.top_k, -1))
        self._set("max_tokens", as_optional_integer("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", as_integer("min_tokens", self.min_tokens, 0))
        self._set("seed", as_optional_integer("seed", self.seed, 0, MAX_SEED))
        truncate = as_optional_integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        self._set("truncate_prompt_tokens", truncate)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            self._set(name, as_flag(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}")
        self._set("stop", self._checked_stop())
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        self._set("stop_token_ids", as_integers("stop_token_ids", ids, 0))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _checked_stop(self) -> tuple[str, ...]:
        given: Any = () if self.stop is None else self.stop
        if not isinstance(given, Iterable):
            raise TypeError(f"stop={given!r}: must be a string or several")
        stop = (given,) if isinstance(given, str) else tuple(cast("Iterable[Any]", given))
        if not all(isinstance(s, str) for s in stop):
            raise TypeError(f"stop={given!r}: must be a string or several")
        if not all(stop):
            raise ValueError(f"stop={given!r}: must be non-empty strings")
        if stop and not self.detokenize:
            raise ValueError("stop: stop strings need detokenize=True")
        return stop

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return self.stop  # pyright: ignore[reportReturnType]  (normalized in __post_init__)


def _neutral(name: str, value: Any, default: Any) -> Any:
    """The default of a parameter that is not yet supported, if the value asks for nothing else."""
    if isinstance(value, bool) and not isinstance(default, bool):
        raise TypeError(f"{name}={value!r}: must not be a bool")
    if name == "best_of":
        is_neutral = value is None or (isinstance(value, numbers.Real) and value == 1)  # 1 is n
    elif name in ("bad_words", "logit_bias"):
        is_neutral = value is None or (isinstance(value, Sized) and len(value) == 0)
    elif isinstance(default, int | float):
        is_neutral = isinstance(value, numbers.Real) and value == default
    else:
        is_neutral = value is default or (isinstance(value, str) and value == default)
    if not is_neutral:
        raise NotImplementedError(f"{name}={value!r}: not yet supported, leave it at {default!r}")
    return default
