"""Log-probabilities of tokens, on the device, and what the host makes of them.

They are of the model's own distribution, before anything that sampling parameters do to it (as in vLLM).
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .leaf import Leaf
from .sampling import in_blocks
from .token_logprobs import MAX_LOGPROBS, TokenLogprobs
from .vocabulary import WHOLE, VocabularyPart

SCORED_TOGETHER = 64  # tokens of prompts whose logits are held at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogprobArrays:
    """Of some positions' tokens; zeros where nobody asked.

    Attributes:
        chosen: [*positions] float32, log-probability of the token that stands there.
        rank: [*positions] int32, its place among all tokens, the likeliest being 1.
        ids, values: [*positions, MAX_LOGPROBS], int32 and float32, the likeliest tokens and their
            log-probabilities, in order; behind the last of a small vocabulary -inf.
    """

    chosen: Leaf
    rank: Leaf
    ids: Leaf
    values: Leaf

    def at(self, *index: int) -> TokenLogprobs:
        """Of one position. For arrays of the host."""
        host: Any = self
        return TokenLogprobs(
            float(host.chosen[index]),
            int(host.rank[index]),
            tuple(host.ids[index].tolist()),
            tuple(host.values[index].tolist()),
        )


def no_logprobs(*positions: int) -> LogprobArrays:
    return LogprobArrays(
        jnp.zeros(positions, jnp.float32),
        jnp.zeros(positions, jnp.int32),
        jnp.zeros((*positions, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((*positions, MAX_LOGPROBS), jnp.float32),
    )


def logprobs_of(
    logits: Float[Array, "n part_size"],
    tokens: Int[Array, " n"],
    wanted: Bool[Array, " n"],
    part: VocabularyPart = WHOLE,
) -> LogprobArrays:
    """Of the tokens that were chosen from these logits; zeros if no row wants them."""

    return cast(
        LogprobArrays,
        lax.cond(
            wanted.any(), lambda: all_logprobs(logits, tokens, part), lambda: no_logprobs(logits.shape[0])
        ),
    )


def all_logprobs(
    logits: Float[Array, "n part_size"], tokens: Int[Array, " n"], part: VocabularyPart = WHOLE
) -> LogprobArrays:
    """Of tokens, and the likeliest ones beside them, under the distributions that these logits are of.

    Args:
        logits: of this device's part of the vocabulary.
        tokens: any of the vocabulary.
        part: which part that is.
    """
    blocks = in_blocks(logits)
    maxima = blocks.max(-1)
    peak = part.max(maxima.max(-1))
    total = peak + jnp.log(part.sum(jnp.exp(blocks - peak[:, None, None]).sum((1, 2))))
    values, ids = _likeliest(blocks, maxima)
    ids += part.first(logits.shape[1])
    if part.axes:  # of all parts' likeliest; in order of parts, so that again the lower id comes first
        values, ids = (jnp.concatenate(list(part.of_each(each)), 1) for each in (values, ids))
        values, places = lax.top_k(values, min(MAX_LOGPROBS, values.shape[1]))
        ids = jnp.take_along_axis(ids, places, 1)
    if values.shape[1] < MAX_LOGPROBS:
        missing = ((0, 0), (0, MAX_LOGPROBS - values.shape[1]))
        values = jnp.pad(values, missing, constant_values=-jnp.inf)
        ids = jnp.pad(ids, missing, constant_values=-1)
    at_token = part.at(logits, jnp.maximum(tokens, 0))
    return LogprobArrays(
        at_token - total,
        1 + part.sum((logits > at_token[:, None]).sum(-1).astype(jnp.int32)),
        ids.astype(jnp.int32),
        values - total[:, None],
    )


def _likeliest(
    blocks: Float[Array, "n blocks block"], maxima: Float[Array, "n blocks"]
) -> tuple[Float[Array, "n most"], Int[Array, "n most"]]:
    """Logits and places of the likeliest tokens: they lie in the blocks with the largest maxima."""
    n, num_blocks, width = blocks.shape
    count = min(MAX_LOGPROBS, num_blocks)
    # lowest block first, so that of equal logits the lower id comes first
    chosen = jnp.sort(lax.top_k(maxima, count)[1], -1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], 1).reshape(n, -1)
    values, places = lax.top_k(candidates, min(MAX_LOGPROBS, candidates.shape[1]))
    return values, jnp.take_along_axis(chosen, places // width, 1) * width + places % width
