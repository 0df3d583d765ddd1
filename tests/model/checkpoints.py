"""Checkpoints of a tiny Qwen3, good ones, and how to edit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from vsurge.model import Qwen3Config
from vsurge.model.params import param_specs

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPE = Qwen3Config(40, 16, 24, 2, 4, 2, 8)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def random_tensors(dtype: Any = jnp.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {s.name: rng.normal(size=s.shape).astype(dtype) for s in jax.tree.leaves(param_specs(SHAPE))}


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_single(folder: Path, tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    write_config(folder, **changes)
    save_file(random_tensors() if tensors is None else tensors, folder / SINGLE)
    return folder


def write_sharded(folder: Path) -> Path:
    write_config(folder)
    names = sorted(random_tensors())
    for shard, part in ((FIRST, names[:10]), (SECOND, names[10:])):
        save_file({name: random_tensors()[name] for name in part}, folder / shard)
    weight_map = {name: FIRST if name in names[:10] else SECOND for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_tensors(file: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])


def pad_header(file: Path, *, alignment: int, remainder: int = 0) -> int:
    """Pads the header until the tensors begin `remainder` after a multiple of `alignment`; where that is."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    padding = b" " * ((remainder - 8 - size) % alignment)
    header = (size + len(padding)).to_bytes(8, "little") + raw[8 : 8 + size] + padding
    file.write_bytes(header + raw[8 + size :])
    return len(header)


def assert_holds(params: Any, tensors: dict[str, np.ndarray], dtype: Any) -> None:
    for spec, array in zip(jax.tree.leaves(param_specs(SHAPE)), jax.tree.leaves(params), strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), tensors[spec.name].astype(dtype), err_msg=spec.name)
