"""Which sampling parameters are accepted. What they do is shown in test_parameters.py."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import numpy as np
import pytest

from vsurge.runtime import SamplingParams


class Kind(enum.Enum):
    """As vLLM's RequestOutputKind."""

    CUMULATIVE = 0
    DELTA = 1


# Out of range or of a wrong type; the type checker of the tests must not get there first.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", np.int64(1)), ("presence_penalty", 0), ("presence_penalty", np.float32(0)),
        ("frequency_penalty", -0.0), ("repetition_penalty", 1), ("repetition_penalty", np.float16(1)),
        ("bad_words", []), ("bad_words", None), ("logit_bias", {}), ("output_kind", "CUMULATIVE"),
        ("output_kind", Kind.CUMULATIVE),
    ],
)  # fmt: skip
def test_a_value_that_asks_for_nothing_is_the_default(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert params == SamplingParams()
    assert hash(params) == hash(SamplingParams())
    assert type(getattr(params, name)) is type(getattr(SamplingParams(), name))


@pytest.mark.parametrize("name", ["n", "best_of", "repetition_penalty", "logprobs", "temperature", "top_k"])
@pytest.mark.parametrize("value", [True, False])
def test_a_bool_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}={value}: must "):
        SamplingParams(**{name: value})


def test_numpy_numbers_become_pythons() -> None:
    given: dict[str, Any] = {
        "temperature": np.float32(0.5), "top_p": np.float64(0.5), "min_p": np.float16(0.5),
        "top_k": np.int64(3), "max_tokens": np.int32(4), "min_tokens": np.uint8(2), "ignore_eos": np.True_,
        "truncate_prompt_tokens": np.int16(5), "stop_token_ids": np.array([7, 8]),
        "seed": np.uint64(2**64 - 1),
    }  # fmt: skip
    python = SamplingParams(
        temperature=0.5, top_p=0.5, min_p=0.5, top_k=3, max_tokens=4, min_tokens=2, seed=2**64 - 1,
        truncate_prompt_tokens=5, stop_token_ids=[7, 8], ignore_eos=True,
    )  # fmt: skip
    params = SamplingParams(**given)
    assert params == python
    for field in dataclasses.fields(params):
        value, expected = getattr(params, field.name), getattr(python, field.name)
        assert type(value) is type(expected), field.name
    assert [type(token_id) for token_id in params.stop_token_ids or ()] == [int, int]
    assert type(SamplingParams(temperature=1).temperature) is float


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, r"\[0.0, infinity\)"),
        ("temperature", float("inf"), r"\[0.0, infinity\)"),
        ("temperature", float("nan"), r"\[0.0, infinity\)"),
        ("temperature", 10**400, r"\[0.0, infinity\)"),
        ("top_p", 0.0, r"\(0.0, 1.0\]"),
        ("top_p", 1.1, r"\(0.0, 1.0\]"),
        ("min_p", -0.1, r"\[0.0, 1.0\]"),
        ("min_p", 1.5, r"\[0.0, 1.0\]"),
        ("top_k", -2, "at least -1"),
        ("max_tokens", 0, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("min_tokens", 17, "at most max_tokens=16"),
        ("seed", -1, "between 0 and 18446744073709551615"),
        ("seed", 2**64, "between 0 and 18446744073709551615"),
        ("truncate_prompt_tokens", 0, "at least 1"),
        ("stop", "", "non-empty"),
        ("stop", ["a", ""], "non-empty"),
        ("stop_token_ids", [-1], "at least 0"),
        ("n", 0, "at least 1"),
        ("best_of", 0, "at least 1"),
        ("presence_penalty", 2.1, r"\[-2.0, 2.0\]"),
        ("frequency_penalty", -2.1, r"\[-2.0, 2.0\]"),
        ("repetition_penalty", 0.0, r"\[1.1754943508222875e-38, 3.4028234663852886e\+38\]"),
        ("repetition_penalty", 1e-300, r"\[1.1754943508222875e-38"),
        ("logprobs", 21, "between 0 and 20"),
        ("logprobs", -1, "between 0 and 20"),
        ("prompt_logprobs", 21, "between 0 and 20"),
        ("bad_words", [""], "non-empty"),
    ],
)
def test_a_value_out_of_range_names_parameter_value_and_range(name: str, value: Any, allowed: str) -> None:
    written = rf"\[0\]={value[0]}" if name == "stop_token_ids" else f"={str(value)[:3].replace('[', '.')}"
    with pytest.raises(ValueError, match=rf"^{name}{written}.*{allowed}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("temperature", True), ("top_p", None), ("top_k", 1.0), ("max_tokens", "3"),
        ("max_tokens", True), ("seed", 1.5), ("stop", 5), ("stop", [5]), ("stop_token_ids", 5),
        ("stop_token_ids", ["a"]), ("ignore_eos", 1), ("detokenize", None), ("skip_special_tokens", "yes"),
        ("include_stop_str_in_output", 0), ("truncate_prompt_tokens", 2.0), ("temperature", np.True_),
        ("top_k", np.float32(3)), ("temperature", 1j), ("stop_token_ids", "12"), ("stop_token_ids", b"12"),
        ("stop_token_ids", [True]),
        ("n", "1"), ("n", 1.0), ("n", None), ("logprobs", 1.5), ("bad_words", [3]), ("logit_bias", [1, 2]),
        ("logit_bias", 3), ("allowed_token_ids", 3), ("spaces_between_special_tokens", 1),
        ("guided_decoding", "json"), ("presence_penalty", "0"),
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_names_the_parameter(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}(\[0\])?="):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"output_kind": "all"}, r"output_kind='all': must be one of \('cumulative', 'delta', "),
        ({"n": 3, "best_of": 2}, "best_of=2: must be at least n=3"),
        ({"n": 2, "temperature": 0}, "n=2: must be 1 with temperature=0"),
        ({"best_of": 2, "temperature": 0}, "best_of=2: must be 1 with temperature=0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token id=-1: must be at least 0"),
        ({"logit_bias": {3: float("nan")}}, r"logit_bias\[3\]=nan: must lie in"),
        ({"logit_bias": {3: 1e39}}, r"logit_bias\[3\]=1e\+39: must lie in \[-3.4028"),
        ({"allowed_token_ids": []}, "allowed_token_ids: is empty"),
        ({"guided_decoding": {}}, "give exactly one of"),
        ({"guided_decoding": {"regex": "a", "choice": ["b"]}}, r"\['regex', 'choice'\] is given"),
        ({"guided_decoding": {"schema": {}}}, r"schema={} is not supported, only \['json'"),
        ({"guided_decoding": {"json": "{"}}, "json='{' is no JSON"),
        ({"guided_decoding": {"json": "[]"}}, "a JSON schema is an object or a bool"),
        ({"guided_decoding": {"regex": "a", "disable_any_whitespace": True}}, "needs json or json_object"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_says_why(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_the_ends_of_the_ranges_are_in_them() -> None:
    SamplingParams(temperature=0.0, top_p=1.0, min_p=1.0, top_k=-1, seed=2**64 - 1, max_tokens=1)
    SamplingParams(temperature=0, top_p=1e-9, min_p=0, top_k=10**12, seed=0, max_tokens=None, min_tokens=99)


def test_stop_strings_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match="stop strings need detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_p) == (16, 0, 1.0, 1.0)
    assert (params.top_k, params.min_p, params.seed, params.ignore_eos) == (0, 0.0, None, False)
    assert (params.n, params.best_of, params.logprobs, params.prompt_logprobs) == (1, None, None, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.logit_bias, params.allowed_token_ids, params.guided_decoding) == (None, None, None)
    assert params.spaces_between_special_tokens
    assert params.output_kind == "cumulative"
    assert params.detokenize
    assert params.skip_special_tokens
    assert not params.include_stop_str_in_output


def test_parameters_can_be_changed_by_replace_and_compared() -> None:
    params = SamplingParams(stop="a", stop_token_ids=[3])
    assert params.stop_strings == ("a",)
    assert dataclasses.replace(params, max_tokens=5) == SamplingParams(
        stop=["a"], stop_token_ids=(3,), max_tokens=5
    )
    assert hash(params) == hash(SamplingParams(stop=("a",), stop_token_ids=[3]))
    biased = SamplingParams(logit_bias={5: 1, 3: -2.0}, guided_decoding={"json": {"type": "object"}})
    assert biased.logit_bias == ((3, -2.0), (5, 1.0))
    again = dataclasses.replace(biased, max_tokens=16)
    assert again == biased
    assert hash(again) == hash(biased)
