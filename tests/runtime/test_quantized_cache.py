"""The whole engine on a cache in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from vsurge.model import Model
from vsurge.runtime import vSurge

from .greedy import CAPITAL, GREEDY, STORY
from .scripted import TIMEOUT_S


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_the_demo_checkpoint_answers_as_it_does_on_an_exact_cache(
    dtype: str, model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = replace(model.config, kv_dtype=np.dtype(jnp.dtype(dtype)))
    surge = vSurge.from_model(
        replace(model, config=config),
        tokenizer,
        max_length=64,
        max_concurrent_decodes=2,
        prefill_lengths=(32,),
        page_size=16,
        num_pages=12,
    )
    with surge:
        samples = surge.generate([CAPITAL, STORY], replace(GREEDY, max_tokens=24)).result(10 * TIMEOUT_S)
    capital, story = (sample.text for sample in samples)
    assert isinstance(capital, str)
    assert isinstance(story, str)
    assert "Paris" in capital
    assert "cat" in story
