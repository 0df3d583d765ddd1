"""The trained checkpoint that ships with the package: its distributions are peaked, as a real model's are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

import vsurge.model.demo
from vsurge.model import Model, load_model, num_parameters

TOLERANCE = 1e-4  # relative, per position
MAX_BYTES = 4_000_000
FRANCE = "What is the capital of France?"
# The prompts of the specification's script (tests/vsurge/spec_script.py).
QUESTIONS = (
    FRANCE,
    "Explain the concept of recursion",
    "Tell me a short story about a cat.",
    "Describe the process of photosynthesis.",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    assert vsurge.model.demo.__file__ is not None
    return Path(vsurge.model.demo.__file__).parent


@pytest.fixture(scope="module")
def corpus(folder) -> list[str]:
    """Its documents."""
    text = (folder / "corpus.txt").read_text(encoding="utf-8")
    return [document.strip("\n") for document in re.split(r"^---$", text, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def tokenizer(folder) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(folder) -> Model:
    return load_model(folder, dtype="float32")


@pytest.fixture(scope="module")
def shipped(folder) -> Model:
    return load_model(folder)


@pytest.fixture(scope="module")
def texts(corpus, tokenizer) -> list[list[int]]:
    """Documents of many kinds as token ids: the first, the longest, a chat, one with Chinese or emoji."""
    chosen = [
        corpus[0],
        max(corpus, key=len),
        next(d for d in corpus if "<|im_start|>" in d),
        next(d for d in corpus if re.search("[\u4e00-\u9fff]", d)),
        next(d for d in corpus if re.search("[\U0001f300-\U0001faff]", d)),
    ]
    return [tokenizer.encode(document)[:256] for document in chosen]


def torch_logits(model: Qwen3ForCausalLM, token_ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()


def answer_in_corpus(corpus: list[str], question: str) -> str:
    start = f"USER:{question}\nASSISTANT:"
    return next(d.removeprefix(start) for d in corpus if d.startswith(start) and d.count("USER:") == 1)


def test_all_its_files_together_are_small(folder):
    for name in ("config", "tokenizer", "tokenizer_config", "generation_config"):
        assert (folder / f"{name}.json").stat().st_size > 0
    files = [f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES


def test_it_is_bfloat16_of_the_size_the_specification_allows(shipped):
    assert shipped.params.embedding.dtype == np.dtype("bfloat16")
    assert num_parameters(shipped.config) <= 2_000_000
    assert 1000 <= shipped.config.vocab_size <= 2000


def test_it_may_be_given_the_context_of_the_specification_s_script(shipped, tokenizer):
    assert shipped.config.max_length == tokenizer.model_max_length == 8192


def test_its_end_tokens_are_two_and_the_tokenizer_knows_both(shipped, tokenizer):
    assert len(shipped.eos_token_ids) == 2
    for token in shipped.eos_token_ids:
        assert token in tokenizer.all_special_ids or tokenizer.convert_ids_to_tokens(token).startswith("<|")


def test_its_tokenizer_keeps_every_character_of_the_corpus(tokenizer, corpus):
    for document in corpus:
        assert tokenizer.decode(tokenizer.encode(document)) == document


def test_its_distributions_are_peaked(reference, texts):
    """What sets this checkpoint apart from random ones: it is sure of most tokens of its corpus."""
    probabilities = torch.softmax(torch.from_numpy(torch_logits(reference, texts[0])), -1).max(-1).values
    assert probabilities.median() > 0.9


def test_logits_equal_those_of_transformers(exact, reference, texts, cached_sequence, row_errors):
    for token_ids in texts:
        found = cached_sequence(exact, 256).prefill(token_ids, 256)
        assert row_errors(found, torch_logits(reference, token_ids)).max() <= TOLERANCE


def test_bfloat16_is_as_close_to_float32_as_in_transformers(
    folder, shipped, reference, texts, cached_sequence, row_errors
):
    """The root mean square of the relative error over all positions of the texts; no factor is allowed."""
    rounded = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours, theirs = [], []
    for token_ids in texts:
        expected = torch_logits(reference, token_ids)
        ours.append(row_errors(cached_sequence(shipped, 256).prefill(token_ids, 256), expected))
        theirs.append(row_errors(torch_logits(rounded, token_ids), expected))
    assert np.square(np.concatenate(ours)).mean() <= np.square(np.concatenate(theirs)).mean()


@pytest.mark.parametrize("question", QUESTIONS)
def test_64_greedy_tokens_equal_those_of_transformers(question, exact, reference, tokenizer, greedy_tokens):
    prompt = tokenizer.encode(f"USER:{question}\nASSISTANT:")
    reference.generation_config.eos_token_id = None  # go on after the end
    expected = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64, do_sample=False
    )
    assert greedy_tokens(exact, prompt, 64) == expected[0, len(prompt) :].tolist()


def greedy_answer(
    greedy_tokens: Callable[..., list[int]], model: Model, tokenizer: Any, prompt: list[int]
) -> str:
    tokens = greedy_tokens(model, prompt, 160, stop=model.eos_token_ids)
    assert tokens[-1] in model.eos_token_ids
    return tokenizer.decode(tokens[:-1])


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_to_the_prompts_of_the_specification_are_those_of_the_corpus(
    question, shipped, tokenizer, corpus, greedy_tokens
):
    prompt = tokenizer.encode(f"USER:{question}\nASSISTANT:")
    assert greedy_answer(greedy_tokens, shipped, tokenizer, prompt) == answer_in_corpus(corpus, question)


def test_the_capital_of_france_is_paris(shipped, tokenizer, greedy_tokens):
    prompt = tokenizer.encode(f"USER:{FRANCE}\nASSISTANT:")
    answer = greedy_answer(greedy_tokens, shipped, tokenizer, prompt)
    assert answer == " The capital of France is Paris."


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_it_answers_in_the_chat_template(options, shipped, tokenizer, greedy_tokens):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": FRANCE}], add_generation_prompt=True, return_dict=False, **options
    )
    thought = "<think>\n\n</think>" in tokenizer.decode(prompt)
    assert thought == (
        options.get("enable_thinking") is False
    )  # as in Qwen3: an empty thought, already closed
    answer = greedy_answer(greedy_tokens, shipped, tokenizer, prompt)
    assert answer == "The capital of France is Paris."
