"""The adapter for llama.cpp: names of tensors, what each sequence is fed, and with the package its tokens."""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import vsurge
from vsurge.benchmarks.engine.llama import BATCH_TOKENS, LlamaCpp, gguf_name, random_tensors, write_gguf
from vsurge.benchmarks.engine.load import LoadRequest, random_requests
from vsurge.model import Qwen3Config, published_config
from vsurge.model.params import param_specs
from vsurge.model.saving import named_tensors

VOCAB = 97
SHAPE = Qwen3Config(40, 16, 24, 2, 4, 2, 8)


class StandIn:
    """The C API, of a model that chooses the sum of a sequence's tokens, position by position."""

    def __init__(self) -> None:
        self.fed: dict[int, list[int]] = defaultdict(list)
        self.sizes: list[int] = []
        self.rows: dict[int, np.ndarray] = {}
        self.llama_log_callback = lambda function: function
        nothing = ("llama_log_set", "llama_backend_init", "llama_batch_free", "llama_free")
        for name in nothing:
            setattr(self, name, lambda *_: None)
        for name in ("llama_model_default_params", "llama_context_default_params"):
            setattr(self, name, SimpleNamespace)
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
            setattr(self, name, lambda *_: self)

    def llama_batch_init(self, size: int, *_: int) -> SimpleNamespace:
        return SimpleNamespace(
            n_tokens=0, token=[0] * size, pos=[0] * size, logits=[0] * size, n_seq_id=[0] * size,
            seq_id=[[0] for _ in range(size)],
        )  # fmt: skip

    def llama_decode(self, _: Any, batch: SimpleNamespace) -> int:
        self.sizes.append(batch.n_tokens)
        self.rows = {}
        for row in range(batch.n_tokens):
            (seat,) = batch.seq_id[row]
            assert batch.pos[row] == len(self.fed[seat])
            self.fed[seat].append(batch.token[row])
            if batch.logits[row]:
                logits = np.zeros(VOCAB, np.float32)
                logits[sum(self.fed[seat]) % VOCAB] = 1
                self.rows[row] = logits
        return 0

    def llama_get_logits_ith(self, _: Any, row: int) -> Any:
        return self.rows[row].ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, _: Any, seat: int, *__: int) -> None:
        del self.fed[seat]


def expected(request: LoadRequest) -> list[int]:
    total, output = sum(request.prompt), []
    for _ in range(request.output_tokens):
        output.append(total % VOCAB)
        total += output[-1]
    return output


def test_every_sequence_is_fed_its_own_tokens_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    api = StandIn()
    monkeypatch.setitem(sys.modules, "llama_cpp", api)
    requests = random_requests(9, VOCAB + 1000, (1, 300), (1, 12))
    seconds, outputs = LlamaCpp(Path("model.gguf"), VOCAB).run(requests, at_once=4)
    assert seconds > 0
    assert outputs == [expected(request) for request in requests]
    assert max(api.sizes) == BATCH_TOKENS
    assert sum(api.sizes) == sum(len(r.prompt) + r.output_tokens - 1 for r in requests)
    assert not api.fed


def test_every_tensor_of_a_dense_model_has_a_name_of_its_own() -> None:
    specs = jax.tree.leaves(param_specs(replace(SHAPE, tie_word_embeddings=False)))
    names = {gguf_name(spec.name) for spec in specs}
    assert len(names) == len(specs) == 11 * 2 + 3
    assert {"token_embd.weight", "output.weight", "blk.1.attn_k_norm.weight"} <= names
    assert [(name, array.shape) for name, array in random_tensors(SHAPE)] == [
        (spec.name, spec.shape) for spec in jax.tree.leaves(param_specs(SHAPE))
    ]


def test_what_is_not_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())
    for config in (published_config("30B-A3B"), replace(SHAPE, attention_bias=True)):
        with pytest.raises(ValueError, match="only dense models without YaRN and biases"):
            write_gguf(tmp_path / "model.gguf", config, ())


def test_llama_cpp_chooses_the_same_tokens(tmp_path: Path) -> None:
    """On the demo checkpoint; where the package is installed."""
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package)
    model = vsurge.load_model(vsurge.demo_model_path())
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, [(name, np.asarray(array)) for name, array in named_tensors(model)])
    requests = random_requests(5, 500 + 1000, (3, 40), (8, 8))
    _, outputs = LlamaCpp(path, model.config.vocab_size).run(requests, at_once=2)
    with vsurge.vSurge.from_model(model, verbose=False) as surge:
        params = vsurge.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        ours = surge.generate([request.prompt for request in requests], params).result()
    assert outputs == [list(sample.token_ids) for sample in ours]
