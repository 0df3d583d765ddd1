"""Log-probabilities: their definition in float64, and those of transformers for the same text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM

from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.logprobs import SCORED_TOGETHER, all_logprobs, logprobs_of
from vsurge.runtime.token_logprobs import MAX_LOGPROBS

from .greedy import CAPITAL, GREEDY, STORY, one
from .scripted import TIMEOUT_S


@pytest.fixture(scope="module")
def exact(demo_path: Path) -> Any:
    """Log-probabilities of every next token of a text, [num_tokens, vocab], by transformers in float32."""
    torch_model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32).eval()

    def logprobs(token_ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return log_softmax(torch_model(torch.tensor([token_ids])).logits[0].double().numpy(), axis=-1)

    return logprobs


@pytest.mark.parametrize("vocab", [5, 128, 129, 10_000])
def test_values_ranks_and_likeliest_tokens_are_those_of_float64(vocab: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=(8, vocab)).astype(np.float32)
    tokens = rng.integers(0, vocab, 8).astype(np.int32)
    tokens[0] = logits[0].argmax()
    found: Any = jax.tree.map(np.asarray, jax.jit(all_logprobs)(logits, tokens))
    wanted, row = log_softmax(logits.astype(np.float64), axis=-1), np.arange(8)
    np.testing.assert_allclose(found.chosen, wanted[row, tokens], atol=2e-5)
    np.testing.assert_array_equal(found.rank, 1 + (logits > logits[row, tokens][:, None]).sum(-1))
    assert found.rank[0] == 1
    order, count = np.argsort(-logits, axis=-1), min(vocab, MAX_LOGPROBS)
    np.testing.assert_array_equal(found.ids[:, :count], order[:, :count])
    np.testing.assert_allclose(
        found.values[:, :count], np.take_along_axis(wanted, order[:, :count], -1), atol=2e-5
    )
    assert (found.values[:, count:] == -np.inf).all()


def test_nothing_is_computed_where_nobody_asks() -> None:
    logits, tokens = np.ones((2, 300), np.float32), np.array([1, 2], np.int32)
    asked = jax.jit(logprobs_of)(logits, tokens, np.array([False, True]))
    assert (np.asarray(asked.chosen) < 0).all()
    silent = jax.jit(logprobs_of)(logits, tokens, np.array([False, False]))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(silent))


def test_a_step_without_prompts_to_score_does_not_compute_their_logits(surge: vSurge) -> None:
    executor: Any = surge._executor
    vocab_size = executor._model.config.vocab_size // executor._model.layout.size("vocab")  # of a device
    for size in executor.mixed_buckets:
        program = executor._programs["mixed", size].as_text()
        logits = f"f32[{SCORED_TOGETHER},{vocab_size}]"
        assert logits in program  # in a branch
        always, _, _ = program[program.index("ENTRY ") :].partition("\n}")
        assert logits not in always


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.3, seed=3, max_tokens=24)])
def test_logprobs_are_those_of_transformers_before_any_parameter(
    surge: vSurge, exact: Any, params: SamplingParams
) -> None:
    sample = one(surge, STORY, params, ignore_eos=True, logprobs=4, frequency_penalty=0.5)
    prompt = surge.processor.encode(STORY)
    wanted = exact([*prompt, *sample.token_ids])[len(prompt) - 1 : -1]
    assert sample.logprobs is not None
    assert len(sample.logprobs) == sample.num_generated_tokens
    total = 0.0
    for token, found, row in zip(sample.token_ids, sample.logprobs, wanted, strict=True):
        likeliest = np.argsort(-row)[:4].tolist()
        assert next(iter(found)) == token
        assert found.keys() == {token, *likeliest}
        for other, entry in found.items():
            assert abs(entry.logprob - row[other]) < 1e-4
            assert entry.rank == 1 + (row > row[other]).sum()
            assert entry.decoded_token == surge.processor.decode([other])
        total += row[token]
    assert sample.cumulative_logprob is not None
    assert abs(sample.cumulative_logprob - total) < 1e-3


def test_prompt_logprobs_are_those_of_transformers_however_the_prompt_is_cut(
    surge: vSurge, exact: Any
) -> None:
    prompt = surge.processor.encode((STORY + CAPITAL) * 3)  # longer than a step's 40 tokens
    assert len(prompt) > 50
    wanted = exact(prompt)
    for _ in range(2):  # the second time it is in the cache
        sample = one(surge, prompt, prompt_logprobs=2, max_tokens=2)
        assert sample.prompt_logprobs is not None
        assert len(sample.prompt_logprobs) == len(prompt)
        assert sample.prompt_logprobs[0] is None
        for token, found, row in zip(prompt[1:], sample.prompt_logprobs[1:], wanted, strict=False):
            assert found is not None
            assert found.keys() == {token, *np.argsort(-row)[:2].tolist()}
            for other, entry in found.items():
                assert abs(entry.logprob - row[other]) < 1e-4
                assert entry.rank == 1 + (row > row[other]).sum()
    assert one(surge, prompt, max_tokens=2).token_ids == sample.token_ids
    assert sample.logprobs is None


def test_zero_gives_the_token_itself_and_none_gives_nothing(surge: vSurge) -> None:
    sample = one(surge, CAPITAL, logprobs=0, prompt_logprobs=0)
    assert sample.logprobs is not None
    assert sample.prompt_logprobs is not None
    assert [list(found) for found in sample.logprobs] == [[token] for token in sample.token_ids]
    prompt = surge.processor.encode(CAPITAL)
    assert [list(found or ()) for found in sample.prompt_logprobs] == [[], *([token] for token in prompt[1:])]
    silent = one(surge, CAPITAL)
    assert (silent.logprobs, silent.prompt_logprobs, silent.cumulative_logprob) == (None, None, None)


def test_logprobs_do_not_depend_on_who_else_asks(surge: vSurge) -> None:
    asks = replace(GREEDY, logprobs=3)
    alone = one(surge, CAPITAL, asks).logprobs
    prompts = [STORY, CAPITAL, STORY]
    params = [GREEDY, asks, replace(GREEDY, prompt_logprobs=5)]
    samples = surge.generate(prompts, params).result(TIMEOUT_S)
    assert samples[0].logprobs is samples[2].logprobs is None
    found = samples[1].logprobs
    assert found is not None
    assert alone is not None
    assert [list(entry) for entry in found] == [list(entry) for entry in alone]
    for entry, other in zip(found, alone, strict=True):
        for token in entry:
            assert (
                abs(entry[token].logprob - other[token].logprob) < 1e-4
            )  # batches of other sizes round differently
