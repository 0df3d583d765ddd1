"""Penalties, biases and masks on the device against their definitions in float64 NumPy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from vsurge.runtime.shaping import (
    RowState,
    ShapingInputs,
    empty_row_state,
    mask_words,
    shape_logits,
    with_row,
    with_tokens,
)

set_row, add_tokens = jax.jit(with_row), jax.jit(with_tokens)  # which take NumPy arrays
VOCAB, NUM_ROWS = 300, 4  # the last word of a mask is not full
PROMPT, OUTPUT = [3, 7, 7, 250], [7, 9, 9, 9, 299]
OFF: dict[str, Any] = {
    "presence": 0.0, "frequency": 0.0, "repetition": 1.0, "biased": False, "masked": False,
}  # fmt: skip


def inputs_of(*each: dict[str, Any]) -> ShapingInputs:
    rows = [OFF | one for one in each]
    types = {"biased": np.bool_, "masked": np.bool_}
    fields: dict[str, Any] = {
        name: np.array([row[name] for row in rows], types.get(name, np.float32)) for name in OFF
    }
    return ShapingInputs(**fields)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=3, size=(NUM_ROWS, VOCAB)).astype(np.float32)


@pytest.fixture(scope="module")
def bias() -> np.ndarray:
    values = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    values[[0, 7, 298]] = -np.inf
    return values


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return np.random.default_rng(2).random(VOCAB) < 0.7


def words_of(mask: np.ndarray) -> np.ndarray:
    bits = np.zeros(mask_words(VOCAB) * 32, np.uint8)
    bits[: len(mask)] = mask
    return np.packbits(bits, bitorder="little").view(np.uint32)


def state_of(row: int, bias: np.ndarray) -> RowState:
    """One row set, and rubbish in all others."""
    garbage: dict[str, Any] = {
        "last_tokens": np.zeros(NUM_ROWS, np.int32),
        "bias": np.full((NUM_ROWS, VOCAB), np.nan, np.float32),
        "counts": np.full((NUM_ROWS, VOCAB), 2**30, np.int32),
    }
    counts = np.zeros(VOCAB, np.int32)
    counts[PROMPT] = 1
    state = set_row(RowState(**garbage), np.int32(row), bias, counts)
    for token in OUTPUT:
        which = np.array([True, False])
        state = add_tokens(state, np.array([row, row]), np.array([token, 5]), which)
    return state


def expected(logits: np.ndarray, bias: np.ndarray, mask: np.ndarray, **given: Any) -> np.ndarray:
    asked = OFF | given
    values = logits.astype(np.float64) + (bias if asked["biased"] else 0)
    for token in {*PROMPT, *OUTPUT}:
        values[token] *= 1 / asked["repetition"] if values[token] > 0 else asked["repetition"]
    for token in set(OUTPUT):
        values[token] -= asked["frequency"] * OUTPUT.count(token) + asked["presence"]
    return np.where(mask, values, -np.inf) if asked["masked"] else values


@pytest.mark.parametrize(
    "given",
    [
        {"repetition": 1.7}, {"repetition": 0.6}, {"presence": 1.5}, {"presence": -2.0}, {"frequency": 0.3},
        {"frequency": -1.0}, {"biased": True}, {"masked": True},
        {"repetition": 1.2, "presence": 0.5, "frequency": 0.25, "biased": True, "masked": True},
    ],
    ids=str,
)  # fmt: skip
def test_logits_are_shaped_as_defined_whatever_the_other_rows_hold(
    logits: np.ndarray, bias: np.ndarray, mask: np.ndarray, given: dict[str, Any]
) -> None:
    row = 2
    masks = np.zeros((NUM_ROWS, mask_words(VOCAB)), np.uint32)  # the others allow nothing
    masks[row] = words_of(mask)
    # the sequences: another row that asks for nothing, the one in question, and padding
    rows = np.array([1, row, NUM_ROWS], np.int32)
    shaped = np.asarray(
        jax.jit(shape_logits)(logits[:3], inputs_of({}, given, {}), rows, state_of(row, bias), masks)
    )
    np.testing.assert_array_equal(shaped[[0, 2]], logits[[0, 2]])
    np.testing.assert_allclose(shaped[1], expected(logits[1], bias, mask, **given), rtol=1e-5, atol=1e-5)


def test_a_token_is_remembered_where_it_counts_and_nowhere_else() -> None:
    state = empty_row_state(NUM_ROWS, VOCAB)
    rows, tokens = np.array([3, 0, 1, NUM_ROWS]), np.array([8, 9, -1, 4])
    state = add_tokens(state, rows, tokens, np.array([True, False, True, True]))
    assert np.asarray(state.last_tokens).tolist() == [0, 0, 0, 8]
    assert np.argwhere(state.counts).tolist() == [[3, 8]]
    assert state.counts[3, 8] == 2
