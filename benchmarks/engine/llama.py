"""llama.cpp on the same requests, through the C API of the package `llama-cpp-python`.

Weights are written as a GGUF file in bfloat16, by the package `gguf`. Sequences are batched continuously:
each step has the next token of every sequence that has its prompt behind it and fills up with other prompts.
"""
# pyright: reportUnknownMemberType=false, reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from ...model import Qwen3Config
from ...model.config import BFLOAT16
from ...model.params import param_specs
from .load import LoadRequest

BATCH_TOKENS = 512  # of a step: llama.cpp's own default for what it computes at once
SEED, DEVIATION = 0, 0.02
# What llama.cpp calls the tensors of a checkpoint.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensors(config: Qwen3Config) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Weights of a shape by their names in a checkpoint: norms one, all else normal, bfloat16."""
    rng = np.random.default_rng(SEED)
    for spec in jax.tree.leaves(param_specs(config)):
        if len(spec.shape) == 1:
            yield spec.name, np.ones(spec.shape, np.float32)
        else:
            yield spec.name, (DEVIATION * rng.standard_normal(spec.shape, np.float32)).astype(BFLOAT16)


def write_gguf(path: Path, config: Qwen3Config, tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> None:
    """Writes a dense model for llama.cpp, without a tokenizer.

    Args:
        path: of the file.
        config: the model's shape.
        tensors: matrices in bfloat16, vectors in any dtype, by their names in a checkpoint.

    Raises:
        ValueError: the model has experts, stretched positions or biases, which are not written.
    """
    import gguf

    if config.experts is not None or config.yarn is not None or config.attention_bias:
        raise ValueError(f"{config}: only dense models without YaRN and biases are written for llama.cpp")
    writer: Any = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_q_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, array in tensors:
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), np.asarray(array, np.float32))
        else:
            contents = np.ascontiguousarray(array, BFLOAT16).view(np.uint8)
            writer.add_tensor(gguf_name(name), contents, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """What llama.cpp calls a checkpoint's tensor.

    Raises:
        KeyError: it has none of that name.
    """
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def llama_cpp_engine(
    config: Qwen3Config, at_once: int, longest: int, device: str
) -> Callable[[Sequence[LoadRequest]], float]:
    """llama.cpp with random bfloat16 weights, a float16 cache (its default) and greedy choice.

    Raises:
        ValueError: see `write_gguf`.
    """
    del longest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, config, random_tensors(config))
        engine = LlamaCpp(path, config.vocab_size, on_gpu=device != "cpu")
    return lambda requests: engine.run(requests, at_once)[0]


@dataclass
class _Sequence:
    """A request that has a place in the batch.

    Attributes:
        request: which.
        fed: tokens of the prompt that are in the cache.
        output: tokens that were chosen.
    """

    request: LoadRequest
    fed: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def is_decoding(self) -> bool:
        return self.fed == len(self.request.prompt)


class LlamaCpp:
    """A model of a GGUF file."""

    def __init__(self, path: Path, vocab_size: int, *, on_gpu: bool = False) -> None:
        """Loads it.

        Args:
            path: of the file, which is not needed any more once it is loaded.
            vocab_size: of the model.
            on_gpu: whether all layers go to the GPU that llama.cpp was built for.

        Raises:
            RuntimeError: llama.cpp does not take the file.
        """
        import llama_cpp

        api: Any = llama_cpp
        self._api, self._vocab_size = api, vocab_size
        self._log: Any = api.llama_log_callback(lambda *_: None)  # it has to stay alive
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = -1 if on_gpu else 0
        params.use_mmap = False
        self._model: Any = api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")

    def run(self, requests: Sequence[LoadRequest], at_once: int) -> tuple[float, list[list[int]]]:
        """Answers requests that are all there from the start, first come first served.

        Returns:
            Seconds, and the tokens of each.

        Raises:
            RuntimeError: llama.cpp gives up.
        """
        lengths = sorted(len(request.prompt) + request.output_tokens for request in requests)
        context = self._context(sum(lengths[-at_once:]), at_once)
        batch = self._api.llama_batch_init(BATCH_TOKENS, 0, 1)
        waiting, seats = deque(_Sequence(request) for request in requests), dict[int, _Sequence]()
        everything = list(waiting)
        try:
            begin = time.perf_counter()
            while waiting or seats:
                for seat in range(at_once):
                    if seat not in seats and waiting:
                        seats[seat] = waiting.popleft()
                self._step(context, batch, seats)
            seconds = time.perf_counter() - begin
        finally:
            self._api.llama_batch_free(batch)
            self._api.llama_free(context)
        return seconds, [each.output for each in everything]

    def _context(self, num_tokens: int, at_once: int) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = num_tokens, at_once, True
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {num_tokens} tokens for {at_once} sequences")
        return context

    def _step(self, context: Any, batch: Any, seats: dict[int, _Sequence]) -> None:
        """One batch; who is done leaves its seat."""
        batch.n_tokens = 0
        chosen: list[tuple[int, int]] = []  # seats, and the row of the batch that says their next token

        def add(seat: int, token: int, position: int, *, chooses: bool) -> None:
            row = batch.n_tokens
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, chooses
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, seat
            batch.n_tokens += 1
            if chooses:
                chosen.append((seat, row))

        for seat, sequence in seats.items():
            if sequence.is_decoding:
                add(seat, sequence.output[-1], sequence.fed + len(sequence.output) - 1, chooses=True)
        for seat, sequence in seats.items():
            prompt = sequence.request.prompt
            while not sequence.is_decoding and batch.n_tokens < BATCH_TOKENS:
                sequence.fed += 1
                add(seat, prompt[sequence.fed - 1], sequence.fed - 1, chooses=sequence.is_decoding)
        if status := self._api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gives {status} for {batch.n_tokens} tokens")
        for seat, row in chosen:
            logits = self._api.llama_get_logits_ith(context, row)
            token = int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
            seats[seat].output.append(token)
            if len(seats[seat].output) == seats[seat].request.output_tokens:
                self._api.llama_memory_seq_rm(self._api.llama_get_memory(context), seat, -1, -1)
                del seats[seat]
