"""Sampling on the device against its definition in float64 NumPy: drawn frequencies, thresholds, ties."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import stats

from vsurge.runtime.sampling import MAX_BANNED, SamplingInputs, sample

NUM_DRAWS = 4096
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k beyond the vocabulary": {"top_k": 10**6},
    "top_p": {"top_p": 0.8},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "all of them": {"temperature": 1.5, "top_k": 12, "top_p": 0.7, "min_p": 0.05},
    "banned": {"banned": (0, 3, 17), "top_p": 0.9},
}


def make_inputs(rows: int, **settings: Any) -> SamplingInputs:
    banned = np.full((rows, MAX_BANNED), -1, np.int32)
    ids = settings.get("banned", ())
    banned[:, : len(ids)] = ids
    high, low = divmod(settings.get("seed", 12345), 2**32)
    fields: dict[str, Any] = dict(  # noqa: C408
        temperature=np.full(rows, settings.get("temperature", 1.0), np.float32),
        top_k=np.full(rows, settings.get("top_k", 0), np.int32),
        top_p=np.full(rows, settings.get("top_p", 1.0), np.float32),
        min_p=np.full(rows, settings.get("min_p", 0.0), np.float32),
        seed=np.tile(np.array([high, low], np.uint32), (rows, 1)),
        banned=banned,
        banned_before=np.full(rows, settings.get("banned_before", 2**31 - 1), np.int32),
    )
    return SamplingInputs(**fields)


def exact_probabilities(
    logits: np.ndarray, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, banned=()
) -> np.ndarray:
    """What a token's frequency should be, [vocab]."""
    logits = logits.astype(np.float64)
    logits[list(banned)] = -np.inf
    weights = np.exp((logits - logits.max()) / temperature)
    weights[weights < min_p] = 0
    if 0 < top_k < len(weights):
        weights[weights < np.sort(weights)[-top_k]] = 0
    if top_p < 1:
        ordered = np.sort(weights)[::-1]
        enough = np.cumsum(ordered) >= top_p * ordered.sum() * (1 - 1e-6)
        weights[weights < ordered[np.argmax(enough)]] = 0
    return weights / weights.sum()


def make_logits(kind: str, vocab: int) -> np.ndarray:
    rng = np.random.default_rng(vocab)
    if kind == "flat":
        return np.zeros(vocab, np.float32) + rng.normal(size=vocab).astype(np.float32) * 1e-3
    if kind == "ties":
        return rng.integers(0, 4, vocab).astype(np.float32)
    return rng.normal(scale=10 if kind == "peaked" else 2, size=vocab).astype(np.float32)


# Unlike the suite's other programs optimized: these take longer to run than to compile.
draw_at = jax.jit(sample, compiler_options={"xla_backend_optimization_level": 1})


def draw(logits: Any, inputs: SamplingInputs) -> Any:
    """A token per row, of which each stands one position behind that of the row before it."""
    return draw_at(logits, inputs, np.arange(len(logits), dtype=np.int32))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("kind", "vocab"), [("normal", 1000), ("peaked", 1000), ("ties", 1000), ("flat", 1000), ("normal", 50)]
)
def test_tokens_are_drawn_with_their_exact_probabilities(kind: str, vocab: int, setting: str) -> None:
    logits, settings = make_logits(kind, vocab), SETTINGS[setting]
    expected = exact_probabilities(logits, **settings) * NUM_DRAWS
    rows = np.broadcast_to(logits, (NUM_DRAWS, vocab))
    counts = np.bincount(np.asarray(draw(rows, make_inputs(NUM_DRAWS, **settings))), minlength=vocab)
    assert not counts[expected == 0].any()
    common = expected >= 5
    observed, wanted = counts[common], expected[common]
    rest, wanted_rest = counts[~common].sum(), expected[~common].sum()
    if wanted_rest >= 5:
        observed, wanted = np.append(observed, rest), np.append(wanted, wanted_rest)
    else:
        assert rest <= wanted_rest + 6 * np.sqrt(wanted_rest) + 1
        wanted = wanted * observed.sum() / wanted.sum()
    if len(observed) > 1:
        assert stats.chisquare(observed, wanted).pvalue > 1e-4


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties"])
def test_thresholds_hold_where_the_answer_lies_in_more_blocks_than_are_looked_at_first(
    kind: str, top_p: float
) -> None:
    vocab, num_draws = 10_001, 512  # 79 blocks
    logits = make_logits(kind, vocab)
    expected = exact_probabilities(logits, top_p=top_p)
    rows = np.broadcast_to(logits, (num_draws, vocab))
    tokens = np.asarray(draw(rows, make_inputs(num_draws, top_p=top_p)))
    # float32 sums may move the threshold by a few tokens of equal weight
    loose = exact_probabilities(logits, top_p=min(top_p + 2e-5, 1.0))
    assert (loose[tokens] > 0).all()
    # The least likely third of the kept mass is drawn from as well: nothing that belongs there is cut off.
    order = np.argsort(expected)[::-1]
    tail = order[np.cumsum(expected[order]) > 2 / 3]
    mass = expected[tail].sum()
    deviation = np.isin(tokens, tail).mean() - mass
    assert abs(deviation) < 4.5 * np.sqrt(mass * (1 - mass) / num_draws) + 1e-9


@pytest.mark.parametrize("top_k", [1, 2, 3, 70, 200])
def test_top_k_keeps_k_tokens_and_ties_with_the_kth(top_k: int) -> None:
    logits = make_logits("ties", 1000)
    kept = np.flatnonzero(logits >= np.sort(logits)[-top_k])
    rows = np.broadcast_to(logits, (NUM_DRAWS, 1000))
    tokens = np.asarray(draw(rows, make_inputs(NUM_DRAWS, top_k=top_k, temperature=100.0)))
    assert set(tokens) == set(kept)


@pytest.mark.parametrize("vocab", [1, 128, 10_001])
def test_greedy_takes_the_first_of_the_likeliest_tokens(vocab: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 3, (16, vocab)).astype(np.float32)
    tokens = np.asarray(draw(logits, make_inputs(16, temperature=0.0)))
    np.testing.assert_array_equal(tokens, logits.argmax(1))


def test_a_token_may_be_banned_up_to_a_position() -> None:
    logits = np.random.default_rng(3).normal(size=(8, 300)).astype(np.float32)
    best = logits.argmax(-1)[0]
    inputs = make_inputs(8, temperature=0.0, banned=(int(best),), banned_before=5)
    chosen = np.asarray(draw(np.tile(logits[:1], (8, 1)), inputs))
    assert [token == best for token in chosen] == [position >= 5 for position in range(8)]


def test_a_banned_token_is_not_chosen_even_if_greedy() -> None:
    logits = make_logits("normal", 1000)
    best = np.argsort(logits)[::-1]
    inputs = make_inputs(NUM_DRAWS, temperature=0.0, banned=tuple(best[:MAX_BANNED]))
    assert set(np.asarray(draw(np.tile(logits, (NUM_DRAWS, 1)), inputs))) == {best[MAX_BANNED]}


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.1}])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_row_that_holds_no_numbers_gives_no_token_and_spoils_no_other(
    broken: float, settings: dict[str, Any]
) -> None:
    logits = np.tile(make_logits("normal", 1000), (5, 1))
    inputs = make_inputs(5, **settings)
    expected = np.asarray(draw(logits, inputs))
    logits[0, 17], logits[2], logits[3] = broken, broken, -np.inf
    assert np.asarray(draw(logits, inputs)).tolist() == [-2, expected[1], -2, -1, expected[4]]


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3, size=(len(SETTINGS) + 1, 1000)).astype(np.float32)
    each = [make_inputs(1, **settings) for settings in SETTINGS.values()]
    each.append(make_inputs(1, temperature=0.0))
    alone = [int(draw(logits[i : i + 1], inputs)[0]) for i, inputs in enumerate(each)]
    for order in (np.arange(len(each)), np.arange(len(each))[::-1], rng.permutation(len(each))):
        batch = jax.tree.map(lambda *rows: np.concatenate(rows), *[each[i] for i in order])
        together = draw_at(logits[order], batch, np.zeros(len(order), np.int32))
        assert [alone[i] for i in order] == np.asarray(together).tolist()


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_bit_of_the_seed_and_the_position_change_the_draws(bit: int) -> None:
    logits = np.zeros((NUM_DRAWS, 1000), np.float32)
    one = np.asarray(draw(logits, make_inputs(NUM_DRAWS, seed=5)))
    assert len(set(one)) > 900
    assert (one == np.asarray(draw(logits, make_inputs(NUM_DRAWS, seed=5)))).all()
    other = np.asarray(draw(logits, make_inputs(NUM_DRAWS, seed=5 ^ (1 << bit))))
    assert (one != other).mean() > 0.9


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30, float(np.finfo(np.float32).max)])
def test_extreme_temperatures_are_greedy_or_uniform(temperature: float) -> None:
    logits = make_logits("normal", 1000)
    rows = np.broadcast_to(logits, (NUM_DRAWS, 1000))
    tokens = np.asarray(draw(rows, make_inputs(NUM_DRAWS, temperature=temperature)))
    if temperature < 1:
        assert set(tokens) == {logits.argmax()}
    else:
        counts = np.bincount(tokens, minlength=1000)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_logits_of_a_wrong_rank_are_caught_by_the_type_checker() -> None:
    with pytest.raises(TypeCheckError):
        sample(np.zeros(10, np.float32), make_inputs(1), np.zeros(1, np.int32))  # pyright: ignore[reportArgumentType]
