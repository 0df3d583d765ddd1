"""generation_config.json."""

from __future__ import annotations

import json
import logging
import math

import pytest
from transformers import GenerationConfig

from vsurge.model import ConfigError
from vsurge.model.generation_defaults import generation_defaults_from_json
from vsurge.runtime import SamplingParams

QWEN3 = {  # as published with Qwen3-8B
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def test_the_published_file_gives_two_end_tokens_and_its_sampling():
    defaults = generation_defaults_from_json(QWEN3)
    assert defaults.eos_token_ids == (151645, 151643)
    assert dict(defaults.sampling) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


def test_without_sampling_the_likeliest_token_is_taken():
    defaults = generation_defaults_from_json(QWEN3 | {"do_sample": False, "max_new_tokens": 9})
    assert dict(defaults.sampling) == {"temperature": 0.0, "max_tokens": 9}


def test_what_has_no_parameter_is_named_in_one_warning(caplog):
    with caplog.at_level(logging.WARNING, "vsurge.model"):
        defaults = generation_defaults_from_json({"repetition_penalty": 1.05}, source="x.json")
        assert dict(defaults.sampling) == {"repetition_penalty": 1.05}
        assert caplog.text == ""
        defaults = generation_defaults_from_json(
            QWEN3 | {"num_beams": 4, "no_repeat_ngram_size": 3}, source="x.json"
        )
    assert defaults == generation_defaults_from_json(QWEN3)
    (record,) = caplog.records
    assert record.message.startswith("x.json: not supported yet")
    assert record.message.endswith("num_beams=4, no_repeat_ngram_size=3")


def test_what_the_installed_transformers_writes_is_read_without_a_warning(tmp_path, caplog):
    GenerationConfig(do_sample=True, top_k=7, eos_token_id=[1, 2], pad_token_id=2).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "generation_config.json").read_text())
    with caplog.at_level(logging.WARNING, "vsurge.model"):
        defaults = generation_defaults_from_json(raw)
    assert (defaults.eos_token_ids, dict(defaults.sampling)["top_k"]) == ((1, 2), 7)
    assert caplog.text == ""


def test_a_field_without_effect_is_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "vsurge.model"):
        generation_defaults_from_json(QWEN3 | {"no_repeat_ngram_size": 3}, source="x.json")
    assert "x.json" in caplog.text
    assert "no_repeat_ngram_size=3" in caplog.text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"temperature": "hot"}, "x.json: temperature='hot': must be a number"),
        ({"top_k": 2.5}, "x.json: top_k=2.5: must be an integer"),
        ({"top_p": True}, "x.json: top_p=True"),
        ({"eos_token_id": ["a"]}, "x.json: eos_token_id"),
        ({"do_sample": 0}, "x.json: do_sample=0: must be true or false"),
        ({"temperature": -0.1}, r"x.json: temperature=-0.1: must be a number in \[0.0, infinity\)"),
        ({"top_p": 0.0}, r"x.json: top_p=0.0: must be a number in \(0.0, 1.0\]"),
        ({"top_k": -2}, "x.json: top_k=-2: must be an integer, at least -1"),
        ({"repetition_penalty": 0}, r"x.json: repetition_penalty=0: must be a number in \(0.0, infinity\)"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_named(raw, message):
    with pytest.raises(ConfigError, match=message):
        generation_defaults_from_json(raw, source="x.json")


NUMBERS = (
    -2, -1, -1e-9, 0, 0.0, 1e-9, 0.5, 1, 1.0, 1 + 1e-9, 2, 10**12, 10**400, math.inf, -math.inf, math.nan,
)  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize(
    ("field", "parameter"),
    [
        *((name, name) for name in ("temperature", "top_k", "top_p", "min_p")),
        ("max_new_tokens", "max_tokens"),
    ],
)
def test_what_the_file_may_ask_for_is_what_a_request_may(field, parameter, value):
    def accepted(build):
        try:
            build()
        except (ValueError, TypeError):
            return False
        return True

    by_the_file = accepted(lambda: generation_defaults_from_json({field: value}))
    assert by_the_file == accepted(lambda: SamplingParams(**{parameter: value}))
