"""The whole engine on the kernels for TPU, which are interpreted here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from vsurge.model import Model
from vsurge.runtime import vSurge

from .greedy import CAPITAL, GREEDY
from .scripted import TIMEOUT_S

pytestmark = pytest.mark.usefixtures("small_units")


def answer(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    surge = vSurge.from_model(
        model,
        tokenizer,
        max_length=64,
        max_concurrent_decodes=1,
        max_prefill_length=16,
        page_size=16,
        num_pages=10,
    )
    with surge:
        [sample] = surge.generate(CAPITAL, replace(GREEDY, max_tokens=5)).result(10 * TIMEOUT_S)
        return list(sample.token_ids)


def test_the_demo_checkpoint_answers_with_the_same_tokens(
    model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Through a prompt in chunks, and decoding."""
    config = replace(model.config, attention="mosaic_tpu", decode_attention="mosaic_tpu")
    assert answer(replace(model, config=config), tokenizer) == answer(model, tokenizer)
