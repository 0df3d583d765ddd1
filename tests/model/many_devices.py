"""Runs checkpoints on meshes of eight devices, and prints what there is to be asserted, as JSON.

`python -m tests.model.many_devices FOLDER…`, whose names say what they hold: a program of its own, as jax's
devices are those of a process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vsurge.kernels import KVPages, empty_kv_pages
from vsurge.model import Batch, Model, forward, load_model
from vsurge.model.config import BFLOAT16
from vsurge.model.params import param_specs
from vsurge.model.quantization import Method
from vsurge.model.safetensors_file import StoredTensor

from ..collectives import collectives
from ..devices import simulate_devices

ONE = (1, 1, 1, 1, 1)
MESHES = {
    "one": ONE,
    "tp=2": (1, 1, 1, 2, 1),
    "tp=4": (1, 1, 1, 4, 1),
    "tp=8": (1, 1, 1, 8, 1),
    "dp=2 tp=4": (2, 1, 1, 4, 1),
    "sp=4": (1, 1, 1, 1, 4),
    "fsdp=2 tp=2 sp=2": (1, 2, 1, 2, 2),
}
OF_EXPERTS = {"one": ONE, "fsdp=2 ep=2 tp=2": (1, 2, 2, 2, 1)}
ROUNDED = {"one": ONE, "tp=4": (1, 1, 1, 4, 1)}
QUANTIZED = {"one": ONE, "fsdp=2 tp=2": (1, 2, 1, 2, 1)}
# A folder's name -> meshes, and the form to quantize its weights to. "saved" is quantized already; in
# "rounded…" what devices add up is sent in bfloat16.
KINDS: dict[str, tuple[dict[str, tuple[int, ...]], Method | None]] = {
    "dense": (MESHES, None),
    "rounded": (ROUNDED, None),
    "rounded-experts": (OF_EXPERTS, None),
    "experts": (OF_EXPERTS, None),
    "experts-a8bit": (OF_EXPERTS, "a8bit"),
    "experts-nf4": (OF_EXPERTS, "nf4"),
    "experts-fp8": (OF_EXPERTS, "fp8"),
    "saved": (QUANTIZED, None),
    "a8bit": (QUANTIZED, "a8bit"),
    "nf4": (QUANTIZED, "nf4"),
    "fp8": (QUANTIZED, "fp8"),
}
PAGE_SIZE, NUM_PAGES, NUM_TOKENS = 4, 16, 32
NEW, KV_LENS = (17, 1, 6), (17, 1, 9)  # of each sequence; the last one has three tokens in the cache already


def batches() -> tuple[Batch, Batch]:
    """A step with prompts, padded, and then a token for each sequence."""
    tables = np.random.default_rng(1).permutation(NUM_PAGES)[:15].astype(np.int32).reshape(3, 5)
    starts = np.cumsum((0, *NEW)).astype(np.int32)
    lengths = np.array(KV_LENS, np.int32)
    token_ids = np.zeros(NUM_TOKENS, np.int32)
    token_ids[: starts[-1]] = np.random.default_rng(0).integers(0, 48, starts[-1])
    positions, slots = np.zeros(NUM_TOKENS, np.int32), np.full(NUM_TOKENS, -1, np.int32)
    for i, table in enumerate(tables):
        of = np.arange(KV_LENS[i] - NEW[i], KV_LENS[i], dtype=np.int32)
        positions[starts[i] : starts[i + 1]] = of
        slots[starts[i] : starts[i + 1]] = table[of // PAGE_SIZE] * PAGE_SIZE + of % PAGE_SIZE
    num_seqs = np.array([3], np.int32)
    mixed = Batch(
        *map(jnp.asarray, (token_ids, positions, slots, lengths, tables, starts, num_seqs, starts[1:] - 1))
    )
    places = tables[np.arange(3), lengths // PAGE_SIZE] * PAGE_SIZE + lengths % PAGE_SIZE
    decode = Batch(*map(jnp.asarray, (token_ids[:3], lengths, places, lengths + 1, tables)))
    return mixed, decode


def on(dims: tuple[int, ...], folder: Path, method: Method | None) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What is to be known of a mesh, and the logits of both steps."""
    read: list[tuple[str, Any]] = []
    original = StoredTensor.read

    def watched(self: StoredTensor, part: Any, dtype: Any) -> Any:
        read.append((self.name, part))
        return original(self, part, dtype)

    StoredTensor.read = watched
    model = load_model(folder, sharding_axis_dims=dims, quantization_method=method, progress=False)
    StoredTensor.read = original
    config, layout = model.config, model.layout
    if folder.name.startswith("rounded"):
        config = replace(config, all_reduce_dtype=BFLOAT16)
    empty = partial(
        empty_kv_pages, NUM_PAGES, PAGE_SIZE, config.num_kv_heads, config.head_dim, config.cache_dtype
    )
    places = layout.cache_sharding(jax.eval_shape(empty))
    kv_pages: tuple[KVPages, ...] = tuple(
        jax.jit(empty, out_shardings=places)() for _ in range(config.num_layers)
    )
    facts: dict[str, Any] = {
        "weights": shares(model),
        "cache": [list(shard.data.shape) for shard in kv_pages[0].data.addressable_shards],
        "read": [[name, list(part)] for name, part in read],
        "collectives": {},
    }
    logits: list[np.ndarray] = []
    for kind, batch in zip(("mixed", "decode"), batches(), strict=True):
        jitted = jax.jit(partial(forward, layout=layout), static_argnums=1, donate_argnums=3)
        program = jitted.lower(model.params, config, batch, kv_pages).compile()
        scores, kv_pages = program(model.params, batch, kv_pages)
        logits.append(np.asarray(scores))
        facts["collectives"][kind] = [[*key, count] for key, count in collectives(program).items()]
    return facts, logits


def shares(model: Model) -> dict[str, list[float]]:
    """Of each matrix the share that each device holds."""
    specs, leaves = jax.tree.leaves(param_specs(model.config)), jax.tree.leaves(model.params)
    if len(specs) != len(leaves):
        return {}  # quantized ones are two arrays each
    return {
        spec.name: [shard.data.size / spec.size for shard in leaf.addressable_shards]
        for spec, leaf in zip(specs, leaves, strict=True)
        if leaf.ndim >= 2
    }


def on_all(meshes: dict[str, tuple[int, ...]], folder: Path, method: Method | None) -> dict[str, Any]:
    """What is to be known of each mesh, with the largest error of a row against the first."""
    found: dict[str, Any] = {}
    expected: list[np.ndarray] = []
    for mesh, dims in meshes.items():
        facts, logits = on(dims, folder, method)
        expected = expected or logits
        facts["errors"] = [
            float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max())
            for a, b in zip(logits, expected, strict=True)
        ]
        found[mesh] = facts
    return found


def main(*folders: str) -> None:
    simulate_devices()
    found: dict[str, Any] = {}
    for folder in map(Path, folders):
        meshes, method = KINDS[folder.name]
        found[folder.name] = on_all(meshes, folder, method)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
