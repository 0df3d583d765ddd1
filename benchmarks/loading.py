"""How fast a checkpoint is loaded, beside copying the same bytes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ..model import Qwen3Config, load_model
from ..model.params import param_specs

WEIGHTS = "model.safetensors"


def write_checkpoint(config: Qwen3Config, folder: Path) -> None:
    """A checkpoint of a shape, all zeros in bfloat16, in the Hugging Face layout."""
    specs = jax.tree.leaves(param_specs(config))
    save_file({spec.name: np.zeros(spec.shape, ml_dtypes.bfloat16) for spec in specs}, folder / WEIGHTS)
    fields: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(fields))


def copy_weights(config: Qwen3Config, folder: Path) -> list[jax.Array]:
    """The bytes of that checkpoint as they lie in the file, one device array per tensor, and nothing else."""
    sizes = [2 * spec.size for spec in jax.tree.leaves(param_specs(config))]
    data = np.memmap(folder / WEIGHTS, np.uint8, "r", offset=(folder / WEIGHTS).stat().st_size - sum(sizes))
    ends = np.cumsum(sizes)
    return [
        jax.device_put(data[end - size : end], may_alias=False) for size, end in zip(sizes, ends, strict=True)
    ]


def measure_loading(config: Qwen3Config, folder: Path, *, turns: int) -> list[dict[str, float]]:
    """Seconds of loading and of copying, in turns, from the page cache; a first turn does not count."""
    write_checkpoint(config, folder)
    samples: list[dict[str, float]] = []
    for _ in range(1 + turns):
        begin = time.perf_counter()
        jax.block_until_ready(load_model(folder).params)
        loaded = time.perf_counter()
        jax.block_until_ready(copy_weights(config, folder))
        samples.append({"load_s": loaded - begin, "copy_s": time.perf_counter() - loaded})
    return samples[1:]
