"""What runs in a step, and what comes of it. Plain Python, no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .request import Request
from .token_logprobs import TokenLogprobs


class Chunk(NamedTuple):
    """`length` tokens of a request, from position `start`.

    Attributes:
        num_outputs: tokens that come out of it: 0 if the prompt goes on, 1 at its end; `length` of a decode.
    """

    request: Request
    start: int
    length: int
    num_outputs: int

    @property
    def is_decode(self) -> bool:
        """Whether its first token is one that was generated, and may be known to the device alone."""
        return self.start >= self.request.num_to_prefill

    @property
    def tokens_to_score(self) -> Sequence[int]:
        """Tokens of the prompt whose log-probabilities are wanted: those that follow the chunk's own."""
        request = self.request
        if request.params.prompt_logprobs is None or self.start >= len(request.prompt_ids) - 1:
            return ()
        return request.prompt_ids[self.start + 1 : self.start + self.length + 1]


@dataclass(frozen=True)
class StepResults:
    """What came of a step, chunk by chunk.

    Attributes:
        token_ids: the tokens chosen, of which the first `num_outputs` count; -1 where none was allowed,
            -2 where a logit was NaN or infinite.
        logprobs: of these, where the request wants them; None if none does.
        scores: log-probabilities of `Chunk.tokens_to_score`; None if there are none.
    """

    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[TokenLogprobs] | None] | None = None
    scores: Sequence[Sequence[TokenLogprobs]] | None = None


StepKind = Literal["mixed", "decode"]


@dataclass(frozen=True)
class StepPlan:
    """One step: the next tokens of whoever decodes and, if it is mixed, chunks of prompts behind them.

    Attributes:
        chunks: those of the first replica, then those of the second, and so on.
        num_replicas: that run the step, each its own chunks, of which it may have none.
    """

    kind: StepKind
    chunks: tuple[Chunk, ...]
    num_replicas: int = 1

    @property
    def parts(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks of each replica."""
        if self.num_replicas == 1:
            return (self.chunks,)
        parts: list[list[Chunk]] = [[] for _ in range(self.num_replicas)]
        for chunk in self.chunks:
            parts[chunk.request.replica].append(chunk)
        return tuple(map(tuple, parts))
