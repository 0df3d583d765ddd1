"""Other engines on the same requests: an adapter each, used where the engine is installed."""
# pyright: reportUnknownMemberType=false, reportMissingImports=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...model import Qwen3Config
from ...model.config import BFLOAT16
from ...model.config_json import config_to_json
from ..workload import Sizes
from .esurge import esurge_engine
from .llama import llama_cpp_engine
from .load import LoadRequest

VLLM_PAGE = 128  # tokens in a page of its cache on a CPU

Run = Callable[[Sequence[LoadRequest]], float]  # seconds for all requests
# From the model's shape, sequences that are decoded together, tokens of the longest request with its output,
# and torch's device.
Adapter = Callable[[Qwen3Config, int, int, str], Run]


def transformers_engine(config: Qwen3Config, at_once: int, longest: int, device: str) -> Run:
    """transformers' `generate` with its default cache, in bfloat16 and greedy.

    Batches are made in the order of arrival. One is padded to its longest prompt and goes on until its
    longest answer is there; tokens beyond what a request asked for do not count.
    """
    del longest
    import torch
    from transformers import Qwen3Config as TheirConfig
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = TheirConfig.from_dict(config_to_json(config, BFLOAT16))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = Qwen3ForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(before)

    def run(requests: Sequence[LoadRequest]) -> float:
        begin = time.perf_counter()
        for first in range(0, len(requests), at_once):
            batch = requests[first : first + at_once]
            longest = max(len(request.prompt) for request in batch)
            missing = [longest - len(request.prompt) for request in batch]
            ids = [[0] * n + request.prompt for n, request in zip(missing, batch, strict=True)]
            mask = [[0] * n + [1] * (longest - n) for n in missing]
            new = max(request.output_tokens for request in batch)
            with torch.inference_mode():
                model.generate(
                    torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
                    min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0,
                )  # fmt: skip
        return time.perf_counter() - begin

    return run


def vllm_engine(config: Qwen3Config, at_once: int, longest: int, device: str) -> Run:
    """vLLM's `LLM.generate` with random weights ("dummy"), in bfloat16 and greedy; no prompt is found again.

    On a CPU its cache has what the requests need, and its threads all cores (else one is set aside).
    """
    options = dict[str, Any]()
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        pages = at_once * (-(-longest // VLLM_PAGE) + 1)
        options["kv_cache_memory_bytes"] = pages * VLLM_PAGE * Sizes.in_bfloat16(config).token
    from vllm import LLM, SamplingParams

    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "config.json").write_text(json.dumps(config_to_json(config, BFLOAT16)))
    llm: Any = LLM(
        folder.name, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=at_once,
        max_model_len=longest, enable_prefix_caching=False, disable_log_stats=True, **options,
    )  # fmt: skip

    def run(requests: Sequence[LoadRequest]) -> float:
        params = [
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=request.output_tokens, detokenize=False)
            for request in requests
        ]
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": request.prompt} for request in requests], params)
        seconds = time.perf_counter() - begin
        assert folder.name  # it has to outlive the engine
        return seconds

    return run


# Packages that an adapter needs, and the adapter.
PEERS: dict[str, tuple[tuple[str, ...], Adapter]] = {
    "transformers": (("torch",), transformers_engine),
    "vLLM": (("vllm",), vllm_engine),
    "llama.cpp": (("llama_cpp", "gguf"), llama_cpp_engine),
    "EasyDeL": (("easydel", "torch", "PIL"), esurge_engine),  # the two others it imports and does not ask for
}


def why_not(name: str, platform: str) -> str | None:
    """Why a peer cannot be measured beside an engine on "cpu", "gpu" or "tpu"; None if it can."""
    if platform == "tpu" and name != "EasyDeL":  # which is in jax as well
        return "is not run on a TPU here"
    missing = [package for package in PEERS[name][0] if not find_spec(package)]
    return f"{' and '.join(missing)} not installed" if missing else None
