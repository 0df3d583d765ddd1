"""How a request wants its tokens chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .checks import (
    LARGEST_FLOAT32,
    SMALLEST_FLOAT32,
    as_flag,
    as_integer,
    as_integers,
    as_number,
    as_optional_integer,
)
from .guided_params import as_guided
from .token_logprobs import MAX_LOGPROBS

MAX_SEED = 2**64 - 1
OUTPUT_KINDS = ("cumulative", "delta", "final_only")
FLAGS = (
    "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names, defaults and meanings of vLLM's.

    The order in which they act on a token's logits: `logprobs` are taken; `logit_bias` is added;
    `repetition_penalty`, `frequency_penalty` and `presence_penalty`; `allowed_token_ids`, `bad_words`,
    `guided_decoding` and `min_tokens` forbid; `temperature` divides; then `min_p`, `top_k` and `top_p` each
    cut what is left. Where nothing is left that is allowed, the text ends.

    Attributes:
        n: completions of each prompt; with more than one, a sample's fields are lists.
        best_of: completions to generate, of which the `n` with the largest cumulative log-probability are
            handed out, likeliest first, once all have ended; None: `n`.
        presence_penalty: subtracted from the logit of each token that was generated before, in [-2, 2].
        frequency_penalty: subtracted from it for each time, in [-2, 2].
        repetition_penalty: divides the logit of each token in prompt or output if positive, multiplies it if
            not; above 0. 1: none.
        temperature: divides the logits; 0 chooses the likeliest token (greedy).
        top_p: keeps the fewest likeliest tokens whose probabilities sum to at least this, in (0, 1]. 1: all.
        min_p: keeps tokens of at least this share of the likeliest one's probability, in [0, 1]. 0: all.
        top_k: keeps the k likeliest tokens; 0 or -1: all. Ties with the k-th are kept.
        seed: 0 to 2**64 - 1; the same seed gives the same text, alone or in any batch. Completion i of `n`
            has seed + i. None: drawn from the engine's seed.
        stop: a string or several; generation ends where one appears, and the text ends before it.
        stop_token_ids: more tokens that end generation.
        bad_words: strings that must not be generated, at the beginning of a word or inside of one: the tokens
            that each becomes, alone and behind a space, are not completed.
        ignore_eos: go on after an end-of-sequence token.
        max_tokens: most tokens to generate; None for as many as `max_length` and the cache allow.
        min_tokens: before this many tokens no end-of-sequence or stop token is chosen and no stop string ends
            the text.
        logprobs: log-probabilities of each generated token and of so many likeliest ones in its place, 0 to
            20; None: none. They are the model's own, before any of these parameters.
        prompt_logprobs: likewise for the prompt's tokens. The prompt is then computed whole, whatever of it
            is in the cache.
        detokenize: give text, not just token ids.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: whether those that stay have spaces between them where the tokenizer
            writes any. Byte-level tokenizers, the ones supported, write none: there is nothing to leave out.
        include_stop_str_in_output: end the text after the stop string, or the stop token's text.
        output_kind: what a reader gets: "cumulative", everything so far; "delta", what is new in text,
            token_ids and logprobs since it read last; "final_only", everything, once, at the end. vLLM's enum
            is taken as well.
        truncate_prompt_tokens: keep only this many of the prompt's last tokens; None keeps all of them.
        guided_decoding: structured output, a `GuidedDecodingParams` or a dict of its fields.
        logit_bias: added to the logits of tokens, by id. Becomes a tuple of pairs.
        allowed_token_ids: the only tokens that may be generated; None: all.

    Numbers may be NumPy's; they become Python's.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or two that exclude each other.
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
    output_kind: Any = "cumulative"
    truncate_prompt_tokens: int | None = None
    guided_decoding: Any = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._set("n", as_integer("n", self.n, 1))
        self._set("best_of", as_optional_integer("best_of", self.best_of, 1))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, as_number(name, getattr(self, name), -2.0, 2.0))
        penalty = as_number("repetition_penalty", self.repetition_penalty, SMALLEST_FLOAT32, LARGEST_FLOAT32)
        self._set("repetition_penalty", penalty)
        self._set("temperature", as_number("temperature", self.temperature, 0.0, math.inf))
        self._set("top_p", as_number("top_p", self.top_p, 0.0, 1.0, low_open=True))
        self._set("min_p", as_number("min_p", self.min_p, 0.0, 1.0))
        self._set("top_k", as_integer("top_k", self.top_k, -1))
        self._set("max_tokens", as_optional_integer("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", as_integer("min_tokens", self.min_tokens, 0))
        self._set("seed", as_optional_integer("seed", self.seed, 0, MAX_SEED))
        truncate = as_optional_integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        self._set("truncate_prompt_tokens", truncate)
        for name in FLAGS:
            self._set(name, as_flag(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}")
        self._set("stop", self._checked_stop())
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        self._set("stop_token_ids", as_integers("stop_token_ids", ids, 0))
        for name in ("logprobs", "prompt_logprobs"):
            self._set(name, as_optional_integer(name, getattr(self, name), 0, MAX_LOGPROBS))
        self._set("bad_words", _strings("bad_words", self.bad_words))
        self._set("output_kind", _output_kind(self.output_kind))
        self._set("logit_bias", _biases(self.logit_bias))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", as_integers("allowed_token_ids", self.allowed_token_ids, 0))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids: is empty, give at least one token, or None for all")
        self._set("guided_decoding", as_guided(self.guided_decoding))
        self._check_completions()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _checked_stop(self) -> tuple[str, ...]:
        stop = _strings("stop", self.stop)
        if stop and not self.detokenize:
            raise ValueError("stop: stop strings need detokenize=True")
        return stop

    def _check_completions(self) -> None:
        if self.num_completions < self.n:
            raise ValueError(f"best_of={self.best_of}: must be at least n={self.n}")
        if self.num_completions > 1 and self.temperature == 0:
            name = "n" if self.n > 1 else "best_of"
            raise ValueError(
                f"{name}={self.num_completions}: must be 1 with temperature=0, all completions would be alike"
            )

    @property
    def num_completions(self) -> int:
        """Completions to generate."""
        return self.n if self.best_of is None else self.best_of

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated before matters."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return self.stop  # pyright: ignore[reportReturnType]  (normalized in __post_init__)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """A string or several as a tuple."""
    given: Any = () if value is None else value
    if not isinstance(given, Iterable):
        raise TypeError(f"{name}={given!r}: must be a string or several")
    strings = (given,) if isinstance(given, str) else tuple(cast("Iterable[Any]", given))
    if not all(isinstance(s, str) for s in strings):
        raise TypeError(f"{name}={given!r}: must be a string or several")
    if not all(strings):
        raise ValueError(f"{name}={given!r}: must be non-empty strings")
    return strings


def _output_kind(value: Any) -> str:
    """One of OUTPUT_KINDS; of vLLM's enum the name counts."""
    name = value if isinstance(value, str) else getattr(value, "name", None)
    kind = name.lower() if isinstance(name, str) else None
    if kind not in OUTPUT_KINDS:
        raise ValueError(f"output_kind={value!r}: must be one of {OUTPUT_KINDS}")
    return kind


def _biases(value: Any) -> tuple[tuple[int, float], ...] | None:
    """Pairs of token id and bias in order of the ids; None where there are none."""
    if value is None:
        return None
    try:
        items = dict(value)
    except (TypeError, ValueError):
        raise TypeError(f"logit_bias={value!r}: must be a dict from token ids to numbers") from None
    biases = {
        as_integer("logit_bias: token id", token_id, 0): as_number(
            f"logit_bias[{token_id}]", bias, -LARGEST_FLOAT32, LARGEST_FLOAT32
        )
        for token_id, bias in items.items()
    }
    return tuple(sorted(biases.items())) or None
