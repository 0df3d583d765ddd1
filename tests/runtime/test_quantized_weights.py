"""An engine whose weights are quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from vsurge import demo_model_path
from vsurge.model import Model, load_model
from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.weights import placed_like


@pytest.fixture(scope="module")
def quantized() -> Model:
    return load_model(demo_model_path(), quantization_method="a8bit")


def test_a_quantized_model_still_knows_its_text(quantized: Model) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    with vSurge.from_model(
        quantized, tokenizer, max_length=64, max_concurrent_decodes=1, prefill_lengths=(64,)
    ) as surge:
        prompt = "USER:What is the capital of France?\nASSISTANT:"
        [sample] = surge.generate(prompt, SamplingParams(temperature=0.0, max_tokens=24)).result(120.0)
        assert "The capital of France is Paris." in sample.text
        surge.update_params(jax.tree.map(np.asarray, quantized.params))
        [again] = surge.generate(prompt, SamplingParams(temperature=0.0, max_tokens=24)).result(120.0)
        assert again.token_ids == sample.token_ids


def test_weights_of_the_same_form_are_taken_and_no_others(quantized: Model) -> None:
    placed = placed_like(quantized.params, quantized.params)
    assert jax.tree.structure(placed) == jax.tree.structure(quantized.params)
    plain = load_model(demo_model_path())
    with pytest.raises(ValueError, match=r"^params: has \.layers\[0\]\.q_proj where .*q_proj\.data"):
        placed_like(plain.params, quantized.params)
    nf4 = load_model(demo_model_path(), quantization_method="nf4")
    with pytest.raises(ValueError, match=r"q_proj\.data: is uint8\[96,\s*512\], must be int8\[512,\s*192\]"):
        placed_like(nf4.params, quantized.params)
    layer: Any = quantized.params.layers[0]
    other = replace(layer, q_proj=replace(layer.q_proj, method="fp8"))
    with pytest.raises(ValueError, match=r"^params: the tree is"):
        placed_like(replace(quantized.params, layers=(other, *quantized.params.layers[1:])), quantized.params)
