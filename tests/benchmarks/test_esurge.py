"""The adapter for EasyDeL: which tokens are whose, what is refused, and with the package its tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

import vsurge
from vsurge.benchmarks.engine import peers
from vsurge.benchmarks.engine.esurge import ESurge, random_easydel_model, write_tokenizer
from vsurge.benchmarks.engine.load import RESERVED, LoadRequest, random_requests
from vsurge.model import Model, Qwen3Config, published_config, random_model
from vsurge.model.config import FLOAT32
from vsurge.model.saving import named_tensors

VOCAB = 97
SHAPE = Qwen3Config(512, 64, 96, 2, 4, 2, 128, max_position_embeddings=512, tie_word_embeddings=False)


class StandIn:
    """The engine, which answers a prompt with its first token over and over, the last request first."""

    started: list[StandIn]
    missing = 0

    def __init__(self, _: Any, folder: str, **options: Any) -> None:
        self.options, self.is_running, self.max_model_len = options, True, options["max_model_len"]
        self._worker_manager = SimpleNamespace(shutdown=lambda: None)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.started.append(self)

    def generate(self, prompts: list[str], params: Any, names: list[str], **_: Any) -> list[SimpleNamespace]:
        assert (params.temperature, params.ignore_eos) == (0, True)
        answers = list[SimpleNamespace]()
        for prompt, name in zip(prompts, names, strict=True):
            mine = self.options["sampling_params_callback"](SimpleNamespace(), {"request_id": name})
            tokens = self._tokenizer.encode(prompt)[:1] * (mine.max_tokens - self.missing)
            answers.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tokens)]))
        return answers[::-1]

    def terminate(self) -> None:
        self.is_running = False


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ESurge]:
    """The adapter on the stand-in, for requests of 8 tokens."""
    params = SimpleNamespace(SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "easydel.inference.esurge", SimpleNamespace(eSurge=StandIn))
    monkeypatch.setitem(sys.modules, "easydel.inference.sampling_params", params)
    monkeypatch.setattr(StandIn, "started", [], raising=False)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB), dtype=FLOAT32)
    engine = ESurge(model, 2, max_length=8)
    yield engine
    engine.close()
    assert not any(started.is_running for started in StandIn.started)


def test_every_request_has_its_own_length_and_gets_its_own_tokens(engine: ESurge) -> None:
    seconds, outputs = engine.run([LoadRequest([3, 1], 4), LoadRequest([96], 1), LoadRequest([0, 5, 6], 5)])
    assert seconds > 0
    assert outputs == [[3] * 4, [96], [0] * 5]


def test_a_longer_request_has_the_engine_made_anew(engine: ESurge) -> None:
    assert engine.run([LoadRequest([7], 7)])[1] == [[7] * 7]
    assert engine.run([LoadRequest([7], 8)])[1] == [[7] * 8]
    started = [(made.max_model_len, made.is_running) for made in StandIn.started]
    assert started == [(8, False), (9, True)]


def test_a_missing_token_is_an_error(engine: ESurge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "missing", 1)
    with pytest.raises(RuntimeError, match="eSurge gave 3 tokens of 4 to request 0"):
        engine.run([LoadRequest([3, 1], 4)])


def test_texts_of_numbers_are_the_tokens(tmp_path: Path) -> None:
    write_tokenizer(str(tmp_path), VOCAB)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("5 96 0 10") == [5, 96, 0, 10]
    assert tokenizer.decode([5, 96, 0, 10]) == "5 96 0 10"
    assert tokenizer.eos_token_id is None


def test_a_model_with_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="only dense models are built for EasyDeL"):
        random_easydel_model(published_config("30B-A3B"))


def test_why_it_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda package: None if package == "easydel" else package)
    assert peers.why_not("EasyDeL", "cpu") == "easydel not installed"
    monkeypatch.setattr(peers, "find_spec", lambda package: package)
    assert [peers.why_not("EasyDeL", platform) for platform in ("cpu", "gpu", "tpu")] == [None] * 3


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """EasyDeL mixes dtypes and ranks, in threads too, and sets environment variables when it is imported."""
    environment = dict(os.environ)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    os.environ.clear()
    os.environ.update(environment)


def with_weights_of(model: Model) -> Any:
    """EasyDeL's model of the same shape, with the same weights."""
    theirs = random_easydel_model(model.config, FLOAT32)
    from flax import nnx  # pyright: ignore[reportMissingImports]

    tensors = {name: np.asarray(array) for name, array in named_tensors(model)}
    for path, variable in nnx.to_flat_state(nnx.state(theirs)):
        array = tensors.pop(".".join(map(str, path[:-1])) + ".weight", None)
        if array is not None:
            variable[...] = jnp.asarray(array.T if path[-1] == "kernel" else array)
    assert not tensors
    return theirs


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.filterwarnings("ignore")
def test_easydel_chooses_the_same_tokens() -> None:
    """In float32, but where two are as likely: it rounds more than vSurge. Where the package is installed."""
    pytest.importorskip("easydel")
    model = random_model(SHAPE, seed=0, dtype="float32")
    requests = random_requests(6, SHAPE.vocab_size + RESERVED, (3, 40), (4, 24))
    engine = ESurge(with_weights_of(model), 2, max_length=64)
    try:
        _, outputs = engine.run(requests)
    finally:
        engine.close()
    params = [
        vsurge.SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True, logprobs=4)
        for request in requests
    ]
    with vsurge.vSurge.from_model(
        model, max_concurrent_decodes=2, prefill_lengths=(64,), max_length=64, verbose=False
    ) as surge:
        samples = surge.generate([request.prompt for request in requests], params).result()
    assert [len(output) for output in outputs] == [request.output_tokens for request in requests]
    num_same = 0
    for output, sample in zip(outputs, samples, strict=True):
        assert sample.logprobs is not None
        for theirs, ours, likeliest in zip(output, sample.token_ids, sample.logprobs, strict=True):
            if theirs != ours:  # what follows is another text
                assert likeliest[ours].logprob - likeliest[theirs].logprob < 1e-3
                break
            num_same += 1
    assert num_same > 0.75 * sum(map(len, outputs))
