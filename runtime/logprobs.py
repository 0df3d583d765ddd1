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
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .leaf import Leaf
from .sampling import in_blocks
from .token_logprobs import MAX_LOGPROBS, TokenLogprobs

SCORED_TOGETHER = 64  # tokens of prompts whose logits are held at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogprobArrays:
    """Of some positions' tokens; zeros where nobody asked.

    Attributes:
        chosen: [*positions] float32, log-probability of the token that stands there.
        rank: [*positions] int32, its place among all tokens, the likeliest being 1.
        ids, values: [*positions, MAX_LOGPROBS], int32 and float32, the likeliest tokens and their
            log-probabilities, in order.
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

    def on_host(self) -> LogprobArrays:
        return cast(LogprobArrays, jax.tree.map(np.asarray, self))


def no_logprobs(*positions: int) -> LogprobArrays:
    return LogprobArrays(
        jnp.zeros(positions, jnp.float32),
        jnp.zeros(positions, jnp.int32),
        jnp.zeros((*positions, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((*positions, MAX_LOGPROBS), jnp.float32),
    )


def logprobs_of(
    logits: Float[Array, "n vocab"], tokens: Int[Array, " n"], wanted: Bool[Array, " n"]
) -> LogprobArrays:
    """Of the tokens that were chosen from these logits; zeros if no row wants them."""

    return cast(
        LogprobArrays,
        lax.cond(wanted.any(), lambda: all_logprobs(logits, tokens), lambda: no_logprobs(logits.shape[0])),
    )


def all_logprobs(logits: Float[Array, "n vocab"], tokens: Int[Array, " n"]) -> LogprobArrays:
    """Of tokens, and the likeliest ones beside them, under the distributions that these logits are of."""
    n, vocab = logits.shape
    blocks = in_blocks(logits)
    maxima = blocks.max(-1)
    peak = maxima.max(-1)
    total = peak + jnp.log(jnp.exp(blocks - peak[:, None, None]).sum((1, 2)))
    # The k likeliest tokens lie in the k blocks with the largest maxima.
    num_blocks, width = blocks.shape[1:]
    count = min(MAX_LOGPROBS, num_blocks)
    # lowest block first, so that of equal logits the lower id comes first
    chosen_blocks = jnp.sort(lax.top_k(maxima, count)[1], -1)
    candidates = jnp.take_along_axis(blocks, chosen_blocks[:, :, None], 1).reshape(n, -1)
    most = min(MAX_LOGPROBS, candidates.shape[1])
    values, places = lax.top_k(candidates, most)
    ids = jnp.take_along_axis(chosen_blocks, places // width, 1) * width + places % width
    if most < MAX_LOGPROBS:
        missing = ((0, 0), (0, MAX_LOGPROBS - most))
        values = jnp.pad(values, missing, constant_values=-jnp.inf)
        ids = jnp.pad(ids, missing, constant_values=vocab)
    at_token = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], 1)
    return LogprobArrays(
        at_token[:, 0] - total,
        1 + (logits > at_token).sum(-1).astype(jnp.int32),
        ids.astype(jnp.int32),
        values - total[:, None],
    )
