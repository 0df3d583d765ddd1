"""Choosing the next token of every sequence, on the device.

All exact, without sorting the vocabulary and with one uniform number per row: the likeliest token is found in
two stages (the best block, then the best in it), the thresholds of top_k and top_p by bisection, and a token
is drawn by inverting the cumulative distribution, first over blocks and then inside one. On a CPU it takes a
hundredth of the time of a sort. Thresholds are looked for among the blocks with the largest maxima first,
which hold all the answer in the common case. What no row asks for runs zero times.

Where devices have a part of the vocabulary each, all this is of the part, and what is compared are sums and
maxima over all parts.
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
from .vocabulary import WHOLE, VocabularyPart

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
        banned: [rows, MAX_BANNED] int32, tokens that must not be chosen; -1 is none.
        banned_before: [rows] int32, the position from which on they may be.
    """

    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    min_p: Leaf
    seed: Leaf
    banned: Leaf
    banned_before: Leaf


def sample(
    logits: Float[Array, "rows part"],
    inputs: SamplingInputs,
    positions: Int[Array, " rows"],
    part: VocabularyPart = WHOLE,
) -> Int[Array, " rows"]:
    """The next token of each row, int32; -1 where no token is allowed (all logits are -inf), -2 where a logit
    is NaN or infinite.

    A row's token depends on its own logits and inputs only. `min_p` cuts first, then `top_k`, then `top_p`,
    of what the ones before have left, at the given temperature; ties at a threshold are kept.

    Args:
        logits: of this device's part of the vocabulary.
        inputs: how each row is sampled.
        positions: of the tokens to be drawn; with the seed it fixes the random number.
        part: which part that is.
    """
    rows, size = logits.shape
    allowed = (inputs.banned < 0) | (positions >= inputs.banned_before)[:, None]
    banned = part.places(jnp.where(allowed, -1, inputs.banned), size)
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)  # for a maximum passes NaN over
    logits = logits.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")
    blocks = in_blocks(logits)
    maxima = blocks.max(-1)
    best = jnp.argmax(maxima, -1).astype(jnp.int32)
    likeliest = best * BLOCK + jnp.argmax(_take_block(blocks, best), -1).astype(jnp.int32)
    highest = maxima.max(-1)
    peak = part.max(highest)
    if part.axes:  # of equal ones the first, as in one part
        first = part.first(size)
        likeliest = part.min(jnp.where(highest == peak, first + likeliest, jnp.iinfo(jnp.int32).max))
    drawn = cast(
        Array,
        lax.cond(
            jnp.any(inputs.temperature > 0),
            lambda: _draw_token(blocks, maxima, peak, inputs, positions, part, size),
            lambda: likeliest,
        ),
    )
    tokens = jnp.where(inputs.temperature > 0, drawn, likeliest)
    return jnp.where(jnp.isfinite(peak), tokens, jnp.where(peak > 0, -2, -1))


def _draw_token(
    blocks: Blocks,
    maxima: Float[Array, "rows blocks"],
    peak: Rows,
    inputs: SamplingInputs,
    positions: Int[Array, " rows"],
    part: VocabularyPart,
    size: int,
) -> Int[Array, " rows"]:
    """A token drawn from what min_p, top_k and top_p leave of each row's distribution."""
    uniform = jax.vmap(_uniform)(inputs.seed, positions)
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)

    def weigh(distances: Array) -> Array:
        """Weights [rows, ...] of logits so far below the row's peak."""
        shape = (-1,) + (1,) * (distances.ndim - 1)
        weights = jnp.exp(-distances / temperature.reshape(shape))
        return jnp.where(distances < jnp.inf, weights, 0.0)  # inf over a huge temperature may be NaN

    def measure(logits: Array) -> Array:
        """How far logits [rows, ...] lie below the row's peak; inf where min_p cuts."""
        shape = (-1,) + (1,) * (logits.ndim - 1)
        distances = jnp.where(logits > -jnp.inf, peak.reshape(shape) - logits, jnp.inf)
        return jnp.where(weigh(distances) >= inputs.min_p.reshape(shape), distances, jnp.inf)

    reach = _reach(blocks, maxima, measure, weigh, inputs, part)

    def weights_of(logits: Array) -> Array:
        distances = measure(logits)
        within = distances <= reach.reshape((-1,) + (1,) * (logits.ndim - 1))
        return jnp.where(within, weigh(distances), 0.0)

    by_block = weights_of(blocks).sum(-1)
    chosen = jnp.zeros(peak.shape, jnp.int32)
    if part.axes:
        chosen, uniform = _invert(part.of_each(by_block.sum(-1)).T, uniform)
    block, rest = _invert(by_block, uniform)
    inside, _ = _invert(weights_of(_take_block(blocks, block)), rest)
    token = part.first(size) + block * BLOCK + inside
    return part.sum(jnp.where(chosen == part.number(), token, 0)) if part.axes else token


def _uniform(seed: UInt[Array, " 2"], position: Int[Array, ""]) -> Float[Array, ""]:
    """The random number in [0, 1) of one position of a request."""
    key = cast(Array, jax.random.wrap_key_data(seed, impl="threefry2x32"))
    return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)


def _reach(
    blocks: Blocks,
    maxima: Float[Array, "rows blocks"],
    measure: Callable[[Array], Array],
    weigh: Callable[[Array], Array],
    inputs: SamplingInputs,
    part: VocabularyPart,
) -> Rows:
    """The distance from the peak up to which top_k and top_p keep tokens, per row; inf where neither is on.

    A distance and no weight: an exponential that is computed twice may differ in its last bit, and the token
    at the threshold would be lost.
    """
    rows, num_blocks, _ = blocks.shape
    limited = (inputs.temperature > 0) & ((inputs.top_k > 0) | (inputs.top_p < 1))

    def all_distances(step: Array) -> Array:
        # Tied to the loop's step, so that XLA does not hoist the exponentials out of a loop of no steps.
        return measure(blocks + step.astype(jnp.float32) * 0.0)

    def mass(weights: Array) -> Rows:
        return part.sum(weights.sum((1, 2)))

    total = _run_if(
        limited.any(), lambda step: mass(weigh(all_distances(step))), jnp.zeros(rows, jnp.float32)
    )
    # Every logit at or above the smallest chosen block maximum lies in the chosen blocks.
    count = min(CANDIDATE_BLOCKS, num_blocks)
    edges, chosen = lax.top_k(maxima, count)
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * num_blocks
    candidates = measure(blocks.reshape(-1, BLOCK).at[first + chosen].get(mode="promise_in_bounds"))
    edge = part.min(measure(edges[:, -1:]))[:, :, None]
    inside = mass(jnp.where(candidates <= edge, weigh(candidates), 0.0))
    # float32 sums of a vocabulary are good to about 1e-6; when in doubt, look everywhere
    enough_mass = inside >= inputs.top_p * total * (1 + 1e-5)
    enough = jnp.where(inputs.top_k > 0, inputs.top_k <= count, enough_mass) | (count == num_blocks)
    return jnp.minimum(
        _threshold(lambda _: candidates, weigh, total, inputs, limited & enough, part),
        _threshold(all_distances, weigh, total, inputs, limited & ~enough, part),
    )


def _threshold(
    distances: Callable[[Array], Array],
    weigh: Callable[[Array], Array],
    total: Rows,
    inputs: SamplingInputs,
    needed: Bool[Array, " rows"],
    part: VocabularyPart,
) -> Rows:
    """The largest distance kept: of the top_k nearest, the fewest that reach top_p; inf where not needed.

    `distances(step)` gives this part's [rows, blocks, block], `weigh` their weights; `total` is the weight of
    all tokens of all parts.
    """

    def count_to(reach: Rows, step: Array) -> Rows:
        return part.sum(jnp.where(distances(step) <= reach[:, None, None], 1.0, 0.0).sum((1, 2)))

    def mass_to(reach: Rows, step: Array) -> Rows:
        values = distances(step)
        return part.sum(jnp.where(values <= reach[:, None, None], weigh(values), 0.0).sum((1, 2)))

    by_k, by_p = needed & (inputs.top_k > 0), needed & (inputs.top_p < 1)
    top_k = inputs.top_k.astype(jnp.float32)
    to_k = _smallest(lambda reach, step: count_to(reach, step) >= top_k, by_k)
    kept = jnp.where(by_k, _run_if(by_k.any(), lambda step: mass_to(to_k, step), total), total)
    to_p = _smallest(lambda reach, step: mass_to(reach, step) >= inputs.top_p * kept, by_p)
    return jnp.minimum(to_k, to_p)


def _smallest(holds: Callable[[Rows, Array], Array], needed: Array) -> Rows:
    """The smallest distance for which `holds(distance, step)`, by bisection over its bits.

    inf where it holds for no number, or is not needed.
    """

    def halve(step: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        good = holds(lax.bitcast_convert_type(middle, jnp.float32), step)
        return jnp.where(good, low, middle + 1), jnp.where(good, middle, high)

    infinite = lax.bitcast_convert_type(jnp.full(needed.shape, jnp.inf, jnp.float32), jnp.int32)
    # A loop of no steps instead of a lax.cond: XLA's CPU backend takes milliseconds for a conditional here.
    # 31 steps, for the bits of inf are below 2**31.
    steps = jnp.where(needed.any(), 31, 0)
    bounds = (jnp.zeros_like(infinite), infinite)
    _, high = cast(tuple[Array, Array], lax.fori_loop(0, steps, halve, bounds))
    return jnp.where(needed, lax.bitcast_convert_type(high, jnp.float32), jnp.inf)


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
