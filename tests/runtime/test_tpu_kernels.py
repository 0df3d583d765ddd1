"""The whole engine on the kernels for TPU, which are interpreted here."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from vsurge.model import Model
from vsurge.runtime import vSurge

from .greedy import CAPITAL, GREEDY
from .scripted import TIMEOUT_S

PROMPTS = [CAPITAL, "東京は"]


def answers(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    surge = vSurge.from_model(
        model,
        tokenizer,
        max_length=64,
        max_concurrent_decodes=2,
        max_prefill_length=16,
        page_size=16,
        num_pages=10,
    )
    with surge:
        params = replace(GREEDY, max_tokens=8)
        return [list(sample.token_ids) for sample in surge.generate(PROMPTS, params).result(10 * TIMEOUT_S)]


def test_the_demo_checkpoint_answers_with_the_same_tokens(
    model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In bfloat16, through prompts in chunks and decoding together."""
    config = replace(model.config, attention="mosaic_tpu", decode_attention="mosaic_tpu")
    assert answers(replace(model, config=config), tokenizer) == answers(model, tokenizer)
