"""EasyDeL's engine, eSurge, on the same requests, of the package `easydel` (0.3.0).

It takes text, and a tokenizer that its own processes load: here one whose tokens are words, their numbers.
Sequences are batched continuously, with its defaults but for prefixes, which are not found again.
"""
# pyright: reportUnknownMemberType=false, reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ...model import Qwen3Config
from ...model.config import BFLOAT16
from ...model.config_json import config_to_json
from .load import LoadRequest

SEED = 0


def random_easydel_model(config: Qwen3Config, dtype: np.dtype[Any] = BFLOAT16) -> Any:
    """EasyDeL's Qwen3 with the weights that it begins with itself.

    Args:
        config: the model's shape.
        dtype: of weights, cache and what is computed.

    Raises:
        ValueError: the model has experts.
    """
    if config.experts is not None:
        raise ValueError(f"{config}: only dense models are built for EasyDeL")
    os.environ.setdefault("ENABLE_DISTRIBUTED_INIT", "0")  # on import, when jax is running already
    os.environ.setdefault("LOGGING_LEVEL_ED", "WARNING")
    from easydel.modules.qwen3 import Qwen3Config as TheirConfig
    from easydel.modules.qwen3 import Qwen3ForCausalLM
    from flax import nnx

    shape = TheirConfig(
        **config_to_json(config, dtype),
        # Else it would have the layers from the 28th on look back 4,096 tokens only.
        layer_types=["full_attention"] * config.num_layers,
        sliding_window=None,
        attn_mechanism=_attention(config),
        attn_dtype=dtype,
        kvdtype=dtype,
    )
    return Qwen3ForCausalLM(shape, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(SEED))


def _attention(config: Qwen3Config) -> str:
    """What eSurge takes itself, but on a CPU for heads of 64: there its kernel does not fit their cache."""
    platform = jax.default_backend()
    if platform == "gpu":
        return "unified_attention"
    if platform == "cpu" and config.head_dim == 64:
        return "ragged_page_attention_v2"
    return "ragged_page_attention_v3"


def esurge_engine(
    config: Qwen3Config, at_once: int, longest: int, device: str
) -> Callable[[Sequence[LoadRequest]], float]:
    """eSurge with random bfloat16 weights, a cache of the same type and greedy choice.

    Raises:
        ValueError: see `random_easydel_model`.
    """
    del device  # jax's own
    engine = ESurge(random_easydel_model(config), at_once, longest)
    atexit.register(engine.close)
    return lambda requests: engine.run(requests)[0]


class ESurge:
    """A model of EasyDeL's, and the engine that was made for it."""

    def __init__(self, model: Any, at_once: int, max_length: int) -> None:
        """Compiles what it needs.

        Args:
            model: of `random_easydel_model`.
            at_once: sequences that are decoded together.
            max_length: of a prompt and its output; a longer request has all compiled anew.
        """
        self._model, self._at_once = model, at_once
        self._folder = tempfile.TemporaryDirectory()
        write_tokenizer(self._folder.name, model.config.vocab_size)
        self._output_tokens = dict[str, int]()
        self._start(max_length)

    def _start(self, max_length: int) -> None:
        from easydel.inference.esurge import eSurge

        self._engine: Any = eSurge(
            self._model,
            self._folder.name,
            dtype=self._model.dtype,
            max_model_len=max_length,
            max_num_seqs=self._at_once,
            reserve_tokens=0,
            enable_prefix_caching=False,
            page_size=256 if jax.default_backend() == "gpu" else 128,  # what it recommends, and its default
            sampling_params_callback=self._with_length,
            tool_parser="",  # none: text is not looked through for calls of tools and thoughts
            reasoning_parser="",
            silent_mode=True,
        )

    def _with_length(self, params: Any, request: dict[str, Any]) -> Any:
        """The parameters of one request, where `generate` takes the same for all."""
        params.max_tokens = self._output_tokens[request["request_id"]]
        return params

    def run(self, requests: Sequence[LoadRequest]) -> tuple[float, list[list[int]]]:
        """Answers requests that are all there from the start.

        Returns:
            Seconds, and the tokens of each.

        Raises:
            RuntimeError: a request did not get as many tokens as it asked for.
        """
        from easydel.inference.sampling_params import SamplingParams

        longest = max(len(request.prompt) + request.output_tokens for request in requests)
        if longest > self._engine.max_model_len:
            self._stop()
            self._start(longest)
        self._output_tokens = {str(i): request.output_tokens for i, request in enumerate(requests)}
        prompts = [" ".join(map(str, request.prompt)) for request in requests]
        params = SamplingParams(temperature=0, ignore_eos=True)
        begin = time.perf_counter()
        answers = self._engine.generate(prompts, params, list(self._output_tokens), use_tqdm=False)
        seconds = time.perf_counter() - begin
        tokens = {answer.request_id: list(answer.outputs[0].token_ids) for answer in answers}
        for name, count in self._output_tokens.items():
            if len(tokens[name]) != count:
                raise RuntimeError(f"eSurge gave {len(tokens[name])} tokens of {count} to request {name}")
        return seconds, [tokens[name] for name in self._output_tokens]

    def _stop(self) -> None:
        self._engine.terminate()
        self._engine._worker_manager.shutdown()  # its tokenizers' processes, which would outlive this one
        del self._engine

    def close(self) -> None:
        """Ends its thread and processes."""
        self._stop()
        self._folder.cleanup()


def write_tokenizer(folder: str, vocab_size: int) -> None:
    """Writes a tokenizer for texts of numbers: each is a token, and there is no end token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
