"""Log-probabilities as callers get them. No JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_LOGPROBS = 20  # likeliest tokens of a position, as many as vLLM's max_logprobs by default


@dataclass(frozen=True)
class Logprob:
    """Of one token at one position, under the model's own distribution.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: its place among all tokens, the likeliest being 1.
        decoded_token: its text; None without a processor.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one position: the token that stands there, and the likeliest ones in order."""

    chosen: float
    rank: int
    ids: tuple[int, ...]
    values: tuple[float, ...]

    def of(
        self, token_id: int, num_likeliest: int, decode: Callable[[int], str] | None
    ) -> dict[int, Logprob]:
        """The token itself first, then the likeliest ones but for it, by token id."""
        ranked = {token_id: (self.chosen, self.rank)}
        for place in range(num_likeliest):
            if self.values[place] > -float("inf"):  # a vocabulary may be smaller
                ranked.setdefault(self.ids[place], (self.values[place], place + 1))
        return {
            token: Logprob(logprob, rank, None if decode is None else decode(token))
            for token, (logprob, rank) in ranked.items()
        }
