"""What a request changes of its logits before a token is chosen: biases, masks and penalties, on the device.

Biases and counts of tokens are as long as the vocabulary, so they stay on the device, a row for each row of
the batch. The host writes a row when a request that has any comes to it; each step adds the tokens that it
chooses to the counts. Masks change from token to token and are the host's: it sends them where a request has
one. All of it is one pass over the logits, which costs the same whoever uses it: on a CPU less than a
millisecond for 16 rows of 151,936 tokens. (A loop of one step or none, as in sampling.py, has its operands
copied and takes 25; a conditional saves nothing.)
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from .leaf import Leaf
from .vocabulary import WHOLE, VocabularyPart

WORD = 32  # tokens in a word of a mask
IN_PROMPT, GENERATED = 1, 2  # what one occurrence of a token adds to its count: a flag, and a number above it


def mask_words(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // WORD)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """What the device remembers of each row of the batch.

    Bias and counts of a row mean something only if its request uses them. Where devices have a part of the
    vocabulary each, they have that part of these.

    Attributes:
        last_tokens: [num_rows] int32, the token that was chosen last, the next one's input.
        bias: [num_rows, vocab] float32, added to the logits; -inf forbids.
        counts: [num_rows, vocab] int32: 2 for each time that a token was generated, and 1 if it is in the
            prompt.
    """

    last_tokens: Leaf
    bias: Leaf
    counts: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShapingInputs:
    """What each row of a step has of all this.

    Attributes:
        presence, frequency: [n] float32, penalties; 0 is off.
        repetition: [n] float32, the penalty; 1 is off.
        biased: [n] bool, whether its `RowState.bias` counts.
        masked: [n] bool, whether its mask counts.
    """

    presence: Leaf
    frequency: Leaf
    repetition: Leaf
    biased: Leaf
    masked: Leaf


def by_axes(make: Callable[..., Any]) -> RowState:
    """What `make` gives for the logical axes of each array, in its place."""
    return RowState(last_tokens=make("rows"), bias=make("rows", "vocab"), counts=make("rows", "vocab"))


def empty_row_state(num_rows: int, vocab_size: int) -> RowState:
    return RowState(
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, vocab_size), jnp.float32),
        jnp.zeros((num_rows, vocab_size), jnp.int32),
    )


def with_row(
    state: RowState, row: Int[Array, ""], bias: Float[Array, " vocab"], counts: Int[Array, " vocab"]
) -> RowState:
    """The state with a row set anew; donate it."""
    return replace(state, bias=state.bias.at[row].set(bias), counts=state.counts.at[row].set(counts))


def with_tokens(
    state: RowState,
    rows: Int[Array, " n"],
    tokens: Int[Array, " n"],
    which: Bool[Array, " n"],
    part: VocabularyPart = WHOLE,
) -> RowState:
    """The state after some of the sequences got another token; -1 is none."""
    row = jnp.where(which & (tokens >= 0), rows, state.counts.shape[0])
    places = part.places(tokens, state.counts.shape[1])
    return replace(
        state,
        last_tokens=state.last_tokens.at[row].set(tokens, mode="drop"),
        counts=state.counts.at[row, places].add(GENERATED, mode="drop"),
    )


def shape_logits(
    logits: Float[Array, "n part_size"],
    inputs: ShapingInputs,
    rows: Int[Array, " n"],
    state: RowState,
    masks: UInt[Array, "num_rows words"],
    part: VocabularyPart = WHOLE,
) -> Float[Array, "n part_size"]:
    """The logits that tokens are chosen from.

    Biases are added and what is masked becomes -inf; then a token that occurs in prompt or output has its
    logit divided by `repetition` if it is positive and multiplied by it if not (arXiv 1909.05858, section
    4.1), and one that was generated c times, c > 0, loses c * frequency + presence. As in vLLM.

    Args:
        logits: the model's, of this device's part of the vocabulary.
        inputs: of each sequence.
        rows: the sequences' rows of the batch; one beyond the last is padding.
        state: of the rows.
        masks: a bit per token of the whole vocabulary, the lowest first; 0 forbids it.
        part: which part of the vocabulary.
    """
    biased = jnp.where(inputs.biased[:, None], logits + state.bias.at[rows].get(mode="clip"), logits)
    counts = state.counts.at[rows].get(mode="clip")
    seen, generated = counts > 0, counts // GENERATED
    factor = jnp.where(seen, inputs.repetition[:, None], 1.0)
    shaped = jnp.where(biased > 0, biased / factor, biased * factor)
    shaped -= inputs.frequency[:, None] * generated.astype(jnp.float32)
    shaped -= jnp.where(generated > 0, inputs.presence[:, None], 0.0)
    words = jnp.where(inputs.masked[:, None], masks.at[rows].get(mode="clip"), jnp.uint32(0xFFFFFFFF))
    return jnp.where(_allowed(words, logits.shape[1], part), shaped, -jnp.inf)


def _allowed(words: UInt[Array, "n words"], size: int, part: VocabularyPart) -> Bool[Array, "n part_size"]:
    """The bits of a part of `size` tokens, which may begin and end within a word."""
    first = part.first(size)
    if part.axes:
        # as many words as hold a part wherever it begins; one more behind the last, so that all are there
        padded = jnp.pad(words, ((0, 0), (0, 1)))
        words = lax.dynamic_slice_in_dim(
            padded, first // WORD, min((size - 1) // WORD + 2, padded.shape[1]), 1
        )
    bits = (words[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None]) & 1
    bits = bits.reshape(bits.shape[0], -1)
    if part.axes:
        return lax.dynamic_slice_in_dim(bits, first % WORD, size, 1) > 0
    return bits[:, :size] > 0
