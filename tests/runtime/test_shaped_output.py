"""What penalties, biases and forbidden tokens do to greedy text, against transformers' logits and NumPy."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vsurge.model import Model
from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.step import StepOutput
from vsurge.runtime.step_plan import StepPlan

from .greedy import CAPITAL, GREEDY, STORY, one
from .kinds import KINDS
from .scripted import TIMEOUT_S

Logits = Callable[[list[int]], np.ndarray]
LENGTH = 20


@pytest.fixture(scope="module")
def logits_of(demo_path: Path) -> Logits:
    """The logits [vocab] of what follows a text, by transformers in float32."""
    torch_model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32).eval()

    def logits(token_ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return torch_model(torch.tensor([token_ids])).logits[0, -1].double().numpy()

    return logits


def expected(logits_of: Logits, prompt: list[int], surge: vSurge, **asked: Any) -> tuple[int, ...]:
    """The definition, token by token."""
    output: list[int] = []
    banned = [
        surge.processor.encode(text) for word in asked.get("bad_words", ()) for text in (word, " " + word)
    ]
    for _ in range(LENGTH):
        logits = logits_of([*prompt, *output])
        for token, bias in asked.get("logit_bias", {}).items():
            logits[token] += bias
        for token in {*prompt, *output}:
            penalty = asked.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        for token in set(output):
            logits[token] -= asked.get("frequency_penalty", 0.0) * output.count(token)
            logits[token] -= asked.get("presence_penalty", 0.0)
        if "allowed_token_ids" in asked:
            kept = logits[asked["allowed_token_ids"]]
            logits[:] = -np.inf
            logits[asked["allowed_token_ids"]] = kept
        for *beginning, last in banned:
            if not beginning or output[-len(beginning) :] == beginning:
                logits[last] = -np.inf
        output.append(int(logits.argmax()))
    return tuple(output)


def both(surge: vSurge, logits_of: Logits, text: str, **asked: Any) -> tuple[int, ...]:
    """The engine's tokens, which are those of the definition and not those without the parameter."""
    prompt = surge.processor.encode(text)
    wanted = expected(logits_of, prompt, surge, **asked)
    found = one(surge, prompt, max_tokens=LENGTH, **asked).token_ids
    assert found == wanted
    assert found != one(surge, prompt, max_tokens=LENGTH).token_ids
    return found


@pytest.mark.parametrize("text", [STORY, CAPITAL])
@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.4}, {"repetition_penalty": 0.7}, {"frequency_penalty": 1.9},
        {"presence_penalty": 2.0}, {"presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"repetition_penalty": 1.2, "presence_penalty": 1.0, "frequency_penalty": 0.4},
    ],
    ids=str,
)  # fmt: skip
def test_penalties_count_prompt_and_output_as_defined(
    surge: vSurge, logits_of: Logits, text: str, asked: dict[str, Any]
) -> None:
    prompt = surge.processor.encode(text)
    wanted = expected(logits_of, prompt, surge, **asked)
    assert one(surge, prompt, max_tokens=LENGTH, **asked).token_ids == wanted


def test_every_penalty_changes_the_text(surge: vSurge) -> None:
    free = one(surge, "a a a", max_tokens=40).token_ids
    changes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.8}, {"frequency_penalty": 2.0}, {"presence_penalty": 0.5}
    ]  # fmt: skip
    assert len({free, *(one(surge, "a a a", max_tokens=40, **change).token_ids for change in changes)}) == 4


def test_logit_bias_is_added(surge: vSurge, logits_of: Logits) -> None:
    free = one(surge, STORY).token_ids
    biased = both(surge, logits_of, STORY, logit_bias={free[0]: -100.0, 500: 8.5, free[5]: 3.0})
    assert free[0] not in biased
    assert set(one(surge, STORY, logit_bias={321: 1e4}).token_ids) == {321}


def test_only_allowed_tokens_come(surge: vSurge, logits_of: Logits) -> None:
    allowed = [300, 301, 302, 5, 77]
    assert set(both(surge, logits_of, STORY, allowed_token_ids=allowed)) <= set(allowed)
    hot = one(
        surge, STORY, SamplingParams(temperature=50.0, seed=1, max_tokens=60), allowed_token_ids=allowed
    )
    assert set(hot.token_ids) == set(allowed)


def test_bad_words_are_not_completed_and_their_beginnings_may_stand(surge: vSurge, logits_of: Logits) -> None:
    free = one(surge, CAPITAL, max_tokens=LENGTH)
    [word] = [w for w in free.text.split() if len(surge.processor.encode(" " + w)) == 1][:1]
    assert word not in both(surge, logits_of, CAPITAL, bad_words=[word]).__repr__()
    phrase = surge.processor.decode(free.token_ids[2:5])
    assert len(surge.processor.encode(phrase)) > 1
    without = both(surge, logits_of, CAPITAL, bad_words=[phrase.strip()])
    assert phrase.strip() not in surge.processor.decode(without)
    assert without[:3] == free.token_ids[:3]  # until the phrase would have been complete


def test_where_nothing_is_allowed_the_text_ends(surge: vSurge) -> None:
    eos = surge.eos_token_ids[0]
    sample = one(surge, STORY, ignore_eos=False, allowed_token_ids=[eos], min_tokens=3)
    assert (sample.token_ids, sample.text, sample.finish_reason) == ((), "", "stop")
    assert sample.time_to_first_token_s is None
    assert one(surge, STORY, allowed_token_ids=[eos], ignore_eos=False).token_ids == (eos,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"logit_bias": {10**6: 1.0}}, "logit_bias: token id 1000000 is outside the vocabulary"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids: token id 1000000 is outside the vocabulary"),
        ({"allowed_token_ids": [64], "bad_words": ["a"]}, "all of them are bad_words"),
    ],
)
def test_what_no_token_can_satisfy_is_refused(surge: vSurge, asked: dict[str, Any], message: str) -> None:
    if "bad_words" in asked:
        asked = asked | {"allowed_token_ids": surge.processor.encode("a")}
    with pytest.raises(ValueError, match=message):
        surge.generate(STORY, replace(GREEDY, **asked))


def test_spaces_between_special_tokens_are_those_of_the_tokenizer(surge: vSurge) -> None:
    special = surge.eos_token_ids[0]
    for value in (True, False):
        sample = one(
            surge, STORY, max_tokens=4, allowed_token_ids=[special], skip_special_tokens=False,
            spaces_between_special_tokens=value,
        )  # fmt: skip
        assert sample.text == surge.processor.decode(
            sample.token_ids, spaces_between_special_tokens=value, clean_up_tokenization_spaces=False
        )
        assert sample.text.count("<|") == 4


def test_no_parameter_of_a_neighbour_changes_a_token(surge: vSurge) -> None:
    """Alone, among those that have four rows, in another order, without its pages for a while, and found in
    the cache.

    In float32 the demo checkpoint has no near-ties for the rounding of other batch sizes to decide.
    """
    prompts = [[7 + i, *surge.processor.encode(STORY if i % 2 else CAPITAL), 30 + i] * 3 for i in range(16)]
    params = [replace(GREEDY, max_tokens=64, **KINDS[i % len(KINDS)]) for i in range(16)]
    alone = [one(surge, prompt, p).token_ids for prompt, p in zip(prompts, params, strict=True)]
    preemptions = 0
    for turn in range(3):
        order = random.Random(turn).sample(range(16), 16)
        samples = surge.generate([prompts[i] for i in order], [params[i] for i in order]).result(
            2 * TIMEOUT_S
        )
        preemptions += sum(sample.num_preemptions for sample in samples)
        assert [sample.token_ids for sample in samples] == [alone[i] for i in order]
    assert preemptions > 0


def test_no_parameter_changes_a_token_in_a_batch_of_16(
    model: Model, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    surge = vSurge.from_model(
        model, tokenizer, max_concurrent_decodes=16, max_concurrent_prefill=16, prefill_lengths=(64,),
        max_length=112, page_size=16, num_pages=16 * 7, verbose=False,
    )  # fmt: skip
    prompts = [[7 + i, *tokenizer.encode(STORY if i % 2 else CAPITAL), 30 + i] * 2 for i in range(16)]
    params = [replace(GREEDY, max_tokens=24, **KINDS[i % len(KINDS)]) for i in range(16)]
    for part in (surge._executor, surge._executor._blueprint):
        part.decode_buckets = (2, 16)  # others would only take their time to compile
    run, sizes = surge._executor.run, list[int]()

    def noting(plan: StepPlan) -> StepOutput:
        sizes.append(len(plan.chunks))
        return run(plan)

    monkeypatch.setattr(surge._executor, "run", noting)
    with surge:
        alone = [one(surge, prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        assert set(sizes) == {1}
        together = surge.generate(prompts, params).result(2 * TIMEOUT_S)
    assert max(sizes) == 16
    assert [sample.token_ids for sample in together] == [sample.token_ids for sample in alone]
    assert [sample.finish_reason for sample in together] == [sample.finish_reason for sample in alone]
