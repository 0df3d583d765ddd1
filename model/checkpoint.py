"""Reading weights from safetensors, one tensor at a time, straight to their device.

A file is checked as a whole before a byte of it is used: its header by the safetensors library, then names,
shapes and dtypes against what the model needs. Then each tensor is mapped, copied to its device and unmapped,
so that the host never holds more than one tensor besides what lives on the devices.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from .config import Qwen3Config, read_json
from .params import Params, TensorSpec, param_specs
from .progress import progress_bar
from .sharding import PartitionAxis, named_sharding

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"BF16": np.dtype(jnp.bfloat16), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
COMPARE_CHUNK = 1 << 24  # bytes compared at a time


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names file, tensor, what was expected and found."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `size` bytes at `offset` of `file`."""

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    size: int

    def map(self) -> npt.NDArray[Any]:
        """The tensor, mapped from the file; unmapped when the array goes."""
        raw = np.memmap(self.file, np.uint8, "r", offset=self.offset, shape=(self.size,))
        return raw.view(self.dtype).reshape(self.shape)


def load_params(
    folder: Path,
    config: Qwen3Config,
    *,
    dtype: np.dtype[Any] | None,
    mesh: Mesh,
    partition_axis: PartitionAxis,
    progress: bool = False,
) -> Params:
    """Reads the weights of a model.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        config: the model's shape, which the tensors must fit exactly.
        dtype: of the parameters; None keeps each tensor's own.
        mesh, partition_axis: where the tensors go.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: the files do not hold exactly this model. Nothing is left on the devices.
    """
    stored = read_headers(folder)
    specs = param_specs(config)
    check_tensors(folder, stored, specs, tied=config.tie_word_embeddings)
    leaves, structure = jax.tree.flatten(specs)
    loaded = [
        to_device(stored[spec.name], dtype, named_sharding(mesh, spec.axes, partition_axis))
        for spec in progress_bar(leaves, "loading weights", show=progress, unit="tensor")
    ]
    return jax.tree.unflatten(structure, loaded)


def to_device(
    tensor: StoredTensor, dtype: np.dtype[Any] | None, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Copies one tensor to its device; the file is unmapped again on return."""
    array = jax.device_put(tensor.map(), sharding, may_alias=False)
    if dtype is not None and dtype != tensor.dtype:
        array = array.astype(dtype)
    return jax.block_until_ready(array)


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, without its data.

    Raises:
        CheckpointError: a file is missing or no valid safetensors file, or the index contradicts its files.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        return read_header(folder / SINGLE)
    shard_of = _read_index(folder / INDEX)
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).exists():
            wanted = sorted(name for name, s in shard_of.items() if s == shard)
            raise CheckpointError(f"{folder / shard}: missing shard, {INDEX} expects {len(wanted)} tensors in it, "
                                  f"{wanted[0]!r} for one")  # fmt: skip
        for name, tensor in read_header(folder / shard).items():
            if shard_of.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: holds {name!r}, which {INDEX} places in {shard_of.get(name)!r}"
                )
            stored[name] = tensor
    for name, shard in shard_of.items():
        if name not in stored:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is missing, {INDEX} places it there")
    return stored


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' is {weight_map!r}, expected tensor names and file names")
    for name, shard in weight_map.items():
        # by name, not resolved: in the hub's cache the files themselves are links to elsewhere
        parts = PurePosixPath(shard).parts if isinstance(shard, str) else ()
        if not parts or parts[0] == "/" or ".." in parts or "\\" in shard:
            raise CheckpointError(
                f"{path}: tensor {name!r} is placed in {shard!r}, outside the checkpoint's folder"
            )
    return weight_map


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file by name.

    Raises:
        CheckpointError: not a valid safetensors file, or a dtype that is not supported.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks that header and data fit the file
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file (truncated or damaged?): {error}"
        ) from error
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    stored: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}, supported are {list(DTYPES)}"
            )
        start, end = entry["data_offsets"]
        stored[name] = StoredTensor(
            path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + header_size + start, end - start
        )
    return stored


def check_tensors(folder: Path, stored: dict[str, StoredTensor], specs: Params, *, tied: bool) -> None:
    """Checks that a checkpoint holds exactly the tensors of a model.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not part of the model.
    """
    wanted: list[TensorSpec] = jax.tree.leaves(specs)
    for spec in wanted:
        if spec.name not in stored:
            raise CheckpointError(f"{folder}: tensor {spec.name!r} of shape {spec.shape} is missing")
        found = stored[spec.name]
        if found.shape != spec.shape:
            raise CheckpointError(
                f"{found.file}: tensor {spec.name!r} has shape {found.shape}, config.json says {spec.shape}"
            )
    extra = stored.keys() - {spec.name for spec in wanted}
    if tied and "lm_head.weight" in extra:  # Qwen3-0.6B for one stores its tied matrix twice
        extra.remove("lm_head.weight")
        _check_tied(stored["model.embed_tokens.weight"], stored["lm_head.weight"])
    if extra:
        example = stored[min(extra)]
        raise CheckpointError(
            f"{example.file}: tensor {example.name!r} of shape {example.shape} is not part of the model that "
            f"config.json describes ({len(extra)} such tensors)"
        )


def _check_tied(embedding: StoredTensor, lm_head: StoredTensor) -> None:
    same = (embedding.dtype, embedding.shape) == (lm_head.dtype, lm_head.shape)
    if same:
        ours, theirs = (t.map().reshape(-1).view(np.uint8) for t in (embedding, lm_head))
        same = all(
            np.array_equal(ours[i : i + COMPARE_CHUNK], theirs[i : i + COMPARE_CHUNK])
            for i in range(0, ours.size, COMPARE_CHUNK)
        )
    if not same:
        raise CheckpointError(
            f"{lm_head.file}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', but config.json "
            "says tie_word_embeddings"
        )
