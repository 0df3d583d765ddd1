"""Structured output from the demo checkpoint, which would never write any by itself."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import llguidance
import llguidance.hf
import numpy as np
import pytest

from vsurge.runtime import GuidedDecodingParams, SamplingParams, StepFailed, vSurge
from vsurge.runtime.guided import GrammarMask, Grammars
from vsurge.runtime.token_mask import MaskError

from .greedy import CAPITAL, GREEDY, STORY, one
from .scripted import TIMEOUT_S

FREE = SamplingParams(max_tokens=140, temperature=1.0)
NUM_SCHEMAS = 200


def guided(surge: vSurge, seed: int = 0, *, hot: bool = False, **asked: Any) -> str:
    temperature = 100.0 if hot else 1.0
    sample = one(surge, CAPITAL, FREE, seed=seed, temperature=temperature, guided_decoding=asked)
    assert sample.finish_reason == "stop"
    return sample.text


@pytest.mark.parametrize("seed", range(4))
def test_a_choice_is_one_of_them(surge: vSurge, seed: int) -> None:
    choices = ['red "or" blue', "green\\", "Ünïcode 北京"]
    assert guided(surge, seed, choice=choices) in choices


def test_every_choice_can_be_taken(surge: vSurge) -> None:
    assert {guided(surge, seed, choice=["a", "b"], hot=True) for seed in range(20)} == {"a", "b"}


@pytest.mark.parametrize("regex", [r"[a-c]{3}-[0-9]{2}", r"(GET|POST) /[a-z]{1,8}\.html", r"\d{4}-\d\d"])
def test_a_regex_matches_the_whole_output(surge: vSurge, regex: str) -> None:
    for seed in range(3):
        assert re.fullmatch(regex, guided(surge, seed, regex=regex))


def test_a_grammar_is_followed(surge: vSurge) -> None:
    grammar = 'start: term ("+" term)?\nterm: /[0-9]/ | "(" start ")"'
    for seed in range(3):
        text = guided(surge, seed, grammar=grammar)
        assert re.fullmatch(r"[0-9()+]+", text)
        assert isinstance(eval(text), int)


def test_a_json_object_is_one(surge: vSurge) -> None:
    # the model has no inclination to close its strings, so they are told to
    schema: dict[str, Any] = {
        "type": "object",
        "maxProperties": 2,
        "additionalProperties": {"type": "boolean"},
    }
    assert isinstance(json.loads(guided(surge, json=schema)), dict)
    sample = one(surge, CAPITAL, FREE, seed=1, max_tokens=6, guided_decoding={"json_object": True})
    assert sample.text.startswith("{")


def test_without_white_space_there_is_none(surge: vSurge) -> None:
    schema = {
        "type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3
    }  # fmt: skip
    text = guided(surge, json=json.dumps(schema), disable_any_whitespace=True)
    assert json.loads(text)
    assert not re.search(r"\s", text)


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema all of whose instances are short."""
    kinds = ["enum", "integer", "boolean", "string", "null", "const", "pattern"]
    kind = rng.choice(kinds if depth == 0 else [*kinds, "object", "object", "array", "anyOf"])
    if kind == "object":
        names = rng.sample(["id", "name", "größe", "a b", "x", "tags"], rng.randint(0, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array", "items": random_schema(rng, depth - 1),
            "minItems": least, "maxItems": least + rng.randint(0, 1),
        }  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "integer":
        least = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 500)}
    simple: dict[str, dict[str, Any]] = {
        "enum": {"enum": rng.sample(["red", 3, None, True, "ß\n", -7], 3)},
        "boolean": {"type": "boolean"},
        "string": {"type": "string", "maxLength": rng.randint(0, 6)},
        "null": {"type": "null"},
        "const": {"const": rng.choice([{"k": [1]}, "const", 12])},
        "pattern": {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^x[0-9]?$"])},
    }
    return simple[kind]


def test_random_schemas_are_kept(surge: vSurge) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]
    params = [
        replace(
            FREE, seed=i, temperature=rng.choice([0.0, 1.0, 30.0]), logprobs=rng.choice([None, 1]),
            guided_decoding=GuidedDecodingParams(json=schema, disable_any_whitespace=True),
        )
        for i, schema in enumerate(schemas)
    ]  # fmt: skip
    samples = surge.generate([STORY] * NUM_SCHEMAS, params).result(6 * TIMEOUT_S)
    for schema, sample in zip(schemas, samples, strict=True):
        assert sample.finish_reason == "stop", (schema, sample.text)
        jsonschema.validate(json.loads(sample.text), schema)
    assert len({sample.text for sample in samples}) > NUM_SCHEMAS / 3  # null and its like come often


def test_neighbours_are_not_held_to_the_grammar_and_keep_their_text(surge: vSurge) -> None:
    alone = one(surge, STORY)
    choice = replace(FREE, seed=0, guided_decoding={"choice": ["yes", "no"]})
    samples = surge.generate([STORY, CAPITAL, STORY], [GREEDY, choice, GREEDY]).result(TIMEOUT_S)
    assert samples[0].token_ids == samples[2].token_ids == alone.token_ids
    assert samples[1].text in ("yes", "no")


def test_each_completion_follows_the_grammar_by_itself(surge: vSurge) -> None:
    params = replace(FREE, seed=0, n=3, guided_decoding={"regex": "[a-z]{4}"})
    [sample] = surge.generate(CAPITAL, params).result(TIMEOUT_S)
    assert all(re.fullmatch("[a-z]{4}", text) for text in sample.text)


def test_a_choice_may_be_one_of_thousands_and_begin_like_another(surge: vSurge) -> None:
    choices = [f"item{i}" for i in range(2500)]
    assert guided(surge, hot=True, choice=choices) in choices
    assert {guided(surge, seed, hot=True, choice=["a", "ab"]) for seed in range(12)} == {"a", "ab"}


def test_a_schema_of_true_accepts_what_is_json(surge: vSurge) -> None:
    json.loads(guided(surge, json="true"))


def test_a_grammar_that_becomes_too_large_fails_its_own_request_only(surge: vSurge) -> None:
    alone, failed = one(surge, STORY), surge.metrics.num_failed
    rules = "start: " + " | ".join(f'"item{i}"' for i in range(2500))  # of which llguidance follows 2,000
    neighbour = surge.generate(STORY, GREEDY)
    with pytest.raises(
        StepFailed, match=r"guided_decoding: cannot go on after token \d+: .*2501 items"
    ) as found:
        surge.generate([CAPITAL, CAPITAL], replace(FREE, guided_decoding={"grammar": rules})).result(
            TIMEOUT_S
        )
    assert len(str(found.value)) < 1000
    assert neighbour.result(TIMEOUT_S)[0].token_ids == alone.token_ids
    assert surge.metrics.num_failed == failed + 2
    assert surge.metrics.num_pages_used == 0


def allowed_by(mask: GrammarMask) -> list[int]:
    """The tokens that may come next."""
    words = np.full(48, 0xFFFFFFFF, np.uint32)
    mask.restrict(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


@pytest.fixture
def tight(surge: vSurge, monkeypatch: pytest.MonkeyPatch) -> Callable[[], GrammarMask]:
    """Masks whose lexer gives up after a token or two; the engine's are such, too."""
    tokenizer = llguidance.hf.from_tokenizer(surge.processor, n_vocab=surge.model.config.vocab_size)
    grammar = llguidance.LLMatcher.grammar_from_regex("ab[a-z]{3,9}(x|[a-z ]{30,40})")
    limits = llguidance.LLParserLimits(step_lexer_fuel=300, step_max_items=20)

    def mask(*_: Any) -> GrammarMask:
        return GrammarMask(llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits))

    monkeypatch.setattr(Grammars, "mask", mask)
    return mask


def test_a_mask_that_cannot_be_found_out_is_no_end_of_the_text(tight: Callable[[], GrammarMask]) -> None:
    mask = tight()
    while len(allowed := allowed_by(mask)) > 1:  # it may begin with "a" or "ab"
        mask.check()
        mask.advance(allowed[0])
    assert mask.is_complete
    [end] = allowed
    with pytest.raises(MaskError, match=r"guided_decoding: cannot find out which .*: lexer error: too many"):
        mask.advance(end)
    with pytest.raises(MaskError):
        mask.check()


def test_a_grammar_that_failed_is_compiled_anew_for_the_next_request(
    surge: vSurge, tight: Callable[[], GrammarMask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of `Grammars.mask`
    compiled: list[Any] = []

    def compile_tight(*_: Any) -> Any:
        compiled.append(tight()._matcher)
        return compiled[-1]

    monkeypatch.setattr(Grammars, "_compile", compile_tight)
    grammars = Grammars(surge.processor, surge.model.config.vocab_size, [0])
    params = GuidedDecodingParams(regex="a+")
    grammars.mask(params)
    mask = grammars.mask(params)
    assert len(compiled) == 1
    while len(allowed := allowed_by(mask)) > 1:
        mask.advance(allowed[0])
    with pytest.raises(MaskError):
        mask.advance(allowed[0])
    grammars.mask(params)
    assert len(compiled) == 2


@pytest.mark.parametrize("min_tokens", [0, 20])  # with which not even the end may come
def test_a_mask_that_cannot_be_found_out_fails_its_own_request_only(
    surge: vSurge, tight: Callable[[], GrammarMask], min_tokens: int
) -> None:
    del tight
    alone = one(surge, STORY)
    neighbour = surge.generate(STORY, GREEDY)
    params = replace(FREE, seed=0, min_tokens=min_tokens, guided_decoding={"json_object": True})
    with pytest.raises(StepFailed, match="guided_decoding: cannot find out which tokens may come next"):
        surge.generate(CAPITAL, params).result(TIMEOUT_S)
    assert neighbour.result(TIMEOUT_S)[0].token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"json": {"type": "foo"}}, "json=.*Invalid type: foo"),
        ({"regex": "[a-c"}, r"regex='\[a-c'.*unclosed character class"),
        ({"grammar": "start: nothing"}, "grammar='start: nothing'"),
        ({"json": "false"}, "guided_decoding: json='false': Unsatisfiable schema"),
        ({"json": {"const": "\ud800"}}, "guided_decoding: json=.*unexpected end of hex escape"),
        ({"json": {"const": float("nan")}}, "guided_decoding: json=.* is no JSON schema: Out of range"),
        ({"json": '{"a":' * 3000 + "{}" + "}" * 3000}, "guided_decoding: json=.* recursion"),
        ({"regex": "\ud800"}, "guided_decoding: regex=.*surrogates not allowed"),
    ],
)
def test_what_is_wrong_is_refused_at_the_door(surge: vSurge, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        surge.generate(CAPITAL, replace(FREE, guided_decoding=asked))


def test_without_llguidance_the_extra_is_named(surge: vSurge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'vsurge\[guided\]'"):
        surge.generate(CAPITAL, replace(FREE, guided_decoding={"regex": "a"}))
