"""Choosing the next token of every sequence, on the device.

All exact, without sorting the vocabulary and with one uniform number per row: the likeliest token is found in
two stages (the best block, then the best in it), the thresholds of top_k and top_p by bisection, and a token
is drawn by inverting the cumulative distribution, first over blocks and then inside one. On a CPU it takes a
hundredth of the time of a sort. Thresholds are looked for among the blocks with the largest maxima first,
which hold all the answer in the common case. What no row asks for runs zero times.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from .leaf import Leaf

BLOCK = 128  # tokens
CANDIDATE_BLOCKS = 64
MAX_BANNED = 16  # tokens masked until min_tokens

Rows = Float[Array, " rows"]
Blocks = Float[Array, "rows blocks block"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """How each row of a step is to be sampled.

    Attributes:
        temperature: [rows] float32; 0 is greedy.
        top_k: [rows] int32; 0 is off.
        top_p, min_p: [rows] float32; 1 and 0 are off.
        seed: [rows, 2] uint32, the request's 64 bits.
        position: [rows] int32, of the token to be drawn; with the seed it fixes the random number.
        banned: [rows, MAX_BANNED] int32, tokens that must not be chosen; -1 is none.
        banned_before: [rows] int32, the position from which on they may be.
    """

    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    min_p: Leaf
    seed: Leaf
    position: Leaf
    banned: Leaf
    banned_before: Leaf


def sample(logits: Float[Array, "rows vocab"], inputs: SamplingInputs) -> Int[Array, " rows"]:
    """The next token of each row, int32; -1 where no token is allowed (all logits are -inf).

    A row's token depends on its own logits and inputs only. `min_p` cuts first, then `top_k`, then `top_p`,
    of what the ones before have left, at the given temperature; ties at a threshold are kept.
    """
    rows, vocab = logits.shape
    allowed = (inputs.banned < 0) | (inputs.position >= inputs.banned_before)[:, None]
    banned = jnp.where(allowed, vocab, inputs.banned)
    logits = logits.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")
    blocks = in_blocks(logits)
    maxima = blocks.max(-1)
    best = jnp.argmax(maxima, -1).astype(jnp.int32)
    likeliest = best * BLOCK + jnp.argmax(_take_block(blocks, best), -1).astype(jnp.int32)
    drawn = cast(
        Array,
        lax.cond(
            jnp.any(inputs.temperature > 0),
            lambda: _draw_token(blocks, maxima, inputs),
            lambda: likeliest,
        ),
    )
    tokens = jnp.where(inputs.temperature > 0, drawn, likeliest)
    return jnp.where(maxima.max(-1) > -jnp.inf, tokens, -1)


def _draw_token(
    blocks: Blocks, maxima: Float[Array, "rows blocks"], inputs: SamplingInputs
) -> Int[Array, " rows"]:
    """A token drawn from what min_p, top_k and top_p leave of each row's distribution."""
    uniform = jax.vmap(_uniform)(inputs.seed, inputs.position)
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)
    peak = maxima.max(-1)

    def weigh(logits: Array) -> Array:
        """exp of logits [rows, ...] relative to the row's peak; 0 where min_p cuts."""
        shape = (-1,) + (1,) * (logits.ndim - 1)
        weights = jnp.exp((logits - peak.reshape(shape)) / temperature.reshape(shape))
        return jnp.where(weights >= inputs.min_p.reshape(shape), weights, 0.0)

    floor = _floor(blocks, maxima, weigh, inputs)

    def cut(weights: Array) -> Array:
        return jnp.where(weights >= floor.reshape((-1,) + (1,) * (weights.ndim - 1)), weights, 0.0)

    block, rest = _invert(cut(weigh(blocks)).sum(-1), uniform)
    inside, _ = _invert(cut(weigh(_take_block(blocks, block))), rest)
    return block * BLOCK + inside


def _uniform(seed: UInt[Array, " 2"], position: Int[Array, ""]) -> Float[Array, ""]:
    """The random number in [0, 1) of one position of a request."""
    key = cast(Array, jax.random.wrap_key_data(seed, impl="threefry2x32"))
    return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)


def _floor(
    blocks: Blocks,
    maxima: Float[Array, "rows blocks"],
    weigh: Callable[[Array], Array],
    inputs: SamplingInputs,
) -> Rows:
    """The smallest weight that top_k and top_p keep, per row; 0 where neither is on."""
    rows, num_blocks, _ = blocks.shape
    limited = (inputs.temperature > 0) & ((inputs.top_k > 0) | (inputs.top_p < 1))

    def all_weights(step: Array) -> Array:
        # Tied to the loop's step, so that XLA does not hoist the exponentials out of a loop of no steps.
        return weigh(blocks + step.astype(jnp.float32) * 0.0)

    total = _run_if(limited.any(), lambda step: all_weights(step).sum((1, 2)), jnp.zeros(rows, jnp.float32))
    # Every weight at or above the smallest chosen block maximum lies in the chosen blocks.
    count = min(CANDIDATE_BLOCKS, num_blocks)
    edges, chosen = lax.top_k(maxima, count)
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * num_blocks
    candidates = weigh(blocks.reshape(-1, BLOCK).at[first + chosen].get(mode="promise_in_bounds"))
    edge = weigh(edges[:, -1:])[:, :, None]
    inside = jnp.where(candidates >= edge, candidates, 0.0).sum((1, 2))
    # float32 sums of a vocabulary are good to about 1e-6; when in doubt, look everywhere
    enough_mass = inside >= inputs.top_p * total * (1 + 1e-5)
    enough = jnp.where(inputs.top_k > 0, inputs.top_k <= count, enough_mass) | (count == num_blocks)
    return jnp.maximum(
        _threshold(lambda _: candidates, total, inputs, limited & enough),
        _threshold(all_weights, total, inputs, limited & ~enough),
    )


def _threshold(
    weights: Callable[[Array], Array], total: Rows, inputs: SamplingInputs, needed: Bool[Array, " rows"]
) -> Rows:
    """The smallest weight kept: of the top_k largest, the fewest that reach top_p; 0 where not needed.

    `weights(step)` gives the weights [rows, blocks, block]; `total` is their sum over the whole vocabulary.
    """

    def count_from(threshold: Rows, step: Array) -> Rows:
        return jnp.where(weights(step) >= threshold[:, None, None], 1.0, 0.0).sum((1, 2))

    def mass_from(threshold: Rows, step: Array) -> Rows:
        values = weights(step)
        return jnp.where(values >= threshold[:, None, None], values, 0.0).sum((1, 2))

    by_k, by_p = needed & (inputs.top_k > 0), needed & (inputs.top_p < 1)
    top_k = inputs.top_k.astype(jnp.float32)
    from_k = _largest(lambda threshold, step: count_from(threshold, step) >= top_k, by_k)
    kept = jnp.where(by_k, _run_if(by_k.any(), lambda step: mass_from(from_k, step), total), total)
    from_p = _largest(lambda threshold, step: mass_from(threshold, step) >= inputs.top_p * kept, by_p)
    return jnp.maximum(from_k, from_p)


def _largest(holds: Callable[[Rows, Array], Array], needed: Array) -> Rows:
    """The largest weight in [0, 1] for which `holds(weight, step)`, by bisection over its bits.

    0 where not needed.
    """

    def halve(step: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        good = holds(lax.bitcast_convert_type(middle, jnp.float32), step)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    one = lax.bitcast_convert_type(jnp.ones(needed.shape, jnp.float32), jnp.int32)
    # A loop of no steps instead of a lax.cond: XLA's CPU backend takes milliseconds for a conditional here.
    # 30 steps, for the bits of 1.0 are below 2**30.
    steps = jnp.where(needed.any(), 30, 0)
    low, _ = cast(tuple[Array, Array], lax.fori_loop(0, steps, halve, (jnp.zeros_like(one), one)))
    return jnp.where(needed, lax.bitcast_convert_type(low, jnp.float32), 0.0)


def _run_if(condition: Array, compute: Callable[[Array], Array], otherwise: Array) -> Array:
    """compute(step) or `otherwise`, as a loop of one step or none."""

    def body(step: Array, _: Array) -> Array:
        return compute(step)

    return cast(Array, lax.fori_loop(0, condition.astype(jnp.int32), body, otherwise))


def _invert(weights: Float[Array, "rows n"], uniform: Rows) -> tuple[Int[Array, " rows"], Rows]:
    """Draws an index by weight: the index, and the uniform number that is left for the next level."""
    sums = jnp.cumsum(weights, -1)
    goal = uniform * sums[:, -1]
    hit = (sums > goal[:, None]) & (weights > 0)
    # rounding may leave no sum above the goal: then the last index with any weight
    last = weights.shape[1] - 1 - jnp.argmax((weights > 0)[:, ::-1], -1)
    index = jnp.where(hit.any(-1), jnp.argmax(hit, -1), last).astype(jnp.int32)
    chosen = jnp.take_along_axis(weights, index[:, None], 1)[:, 0]
    below = jnp.take_along_axis(sums, index[:, None], 1)[:, 0] - chosen
    return index, jnp.clip((goal - below) / chosen, 0.0, 1.0)


def in_blocks(logits: Float[Array, "rows vocab"]) -> Blocks:
    """The vocabulary in blocks of BLOCK tokens, the last one filled up with -inf."""
    padding = -logits.shape[1] % BLOCK
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf) if padding else logits
    return padded.reshape(logits.shape[0], -1, BLOCK)


def _take_block(blocks: Blocks, index: Int[Array, " rows"]) -> Float[Array, "rows block"]:
    def take(row: Array, i: Array) -> Array:
        return cast(Array, lax.dynamic_index_in_dim(row, i, 0, keepdims=False))

    return jax.vmap(take)(blocks, index)
