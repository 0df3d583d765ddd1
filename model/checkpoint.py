"""Reading weights from safetensors, one tensor at a time, straight to their devices.

A checkpoint is checked as a whole before a byte of it is used: the headers of all its files, then names and
shapes against what the model needs. Then the tensors are mapped, each device's slice of it is copied there,
and they are unmapped; as many slices at a time as are no larger together than the largest tensor's: that is
all that the host holds besides what lives on the devices. A process reads the slices of its own devices only.
"""

from __future__ import annotations

import gc
import math
import os.path
from collections import deque
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from .config import COMPUTE_DTYPES, ConfigError, Qwen3Config
from .config_json import read_json
from .params import Params, TensorSpec
from .progress import progress_bar
from .quantization import FLOAT32, QuantizedMatrix, quantizer
from .quantized_specs import Quantization, parts_of, quantized_specs
from .safetensors_file import FLOATS, CheckpointError, StoredTensor, read_header
from .sharding import Layout, device_parts
from .stacked import stacked_on_devices

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def open_checkpoint(
    folder: Path, config: Qwen3Config, quantization: Quantization | None = None
) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, without its data: exactly those of a model of this shape.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        config: the model's shape.
        quantization: what its config.json says of it.

    Raises:
        CheckpointError: the files are damaged, or do not hold exactly this model.
    """
    stored = read_headers(folder)
    check_tensors(folder, stored, config, quantization)
    return stored


def load_params(
    stored: Mapping[str, StoredTensor],
    config: Qwen3Config,
    *,
    dtype: np.dtype[Any],
    layout: Layout,
    stored_as: Quantization | None = None,
    quantization: Quantization | None = None,
    progress: bool = False,
) -> Params:
    """Reads the weights of a model to their devices. If that fails, nothing is left there.

    Args:
        stored: from `open_checkpoint`.
        config: the model's shape.
        dtype: of the parameters; a tensor that is stored in another is converted.
        layout: where the tensors go.
        stored_as: how the checkpoint is quantized.
        quantization: how to quantize one that is not, each matrix as soon as it lies on its device; so the
            devices hold what comes of it and as much more as the largest tensor takes.
        progress: show a progress bar on a terminal.
    """
    specs, structure = jax.tree.flatten(quantized_specs(config, stored_as))
    made = quantization if stored_as is None else None
    shardings = [layout.sharding(*spec.axes) for spec in specs]
    dtypes = [_dtype_read(spec, stored[spec.stored_names[0]], dtype, made) for spec in specs]
    sizes = [
        _most_read(spec, sharding) * read.itemsize
        for spec, sharding, read in zip(specs, shardings, dtypes, strict=True)
    ]
    copying = _Copying(most_bytes=max(sizes))
    loaded: list[jax.Array | QuantizedMatrix] = []
    try:
        wanted = list(zip(specs, shardings, dtypes, sizes, strict=True))
        for spec, sharding, read, size in progress_bar(
            wanted, "loading weights", show=progress, unit="tensor"
        ):
            tensors = [stored[name] for name in spec.stored_names]
            if spec.parts is not None:
                loaded.append(
                    stacked_on_devices(tensors, spec.shape, read, sharding, copying.make_room, copying.add)
                )
            else:
                copying.make_room(size)
                loaded.append(to_devices(tensors[0], read, sharding))
            if made is not None and made.applies_to(spec):
                loaded[-1] = _quantized(loaded[-1], spec, made, layout)
            if spec.parts is None:
                copying.add(loaded[-1], size)
        copying.make_room(copying.most_bytes)
    except BaseException:  # an interrupt too; the traceback would keep the arrays alive
        copying.forget()
        for array in jax.tree.leaves(loaded):
            array.delete()
        raise
    return jax.tree.unflatten(structure, loaded)


def _most_read(spec: TensorSpec, sharding: jax.sharding.Sharding) -> int:
    """Numbers that the host reads for a parameter at a time: all that this process's devices hold of it, or
    of one of the matrices that it is made of."""
    if spec.parts is not None:
        return math.prod(spec.stored_shape)
    parts = device_parts(sharding, spec.shape)
    return sum(math.prod(stop - start for start, stop in part) for part in parts)


def _dtype_read(
    spec: TensorSpec, tensor: StoredTensor, dtype: np.dtype[Any], made: Quantization | None
) -> np.dtype[Any]:
    """The dtype that a tensor is brought to its device in; what is quantized there is not rounded before."""
    if spec.dtype is not None:
        return spec.dtype
    if made is not None and made.applies_to(spec):
        return tensor.dtype if tensor.dtype in COMPUTE_DTYPES else FLOAT32
    return dtype


def _quantized(array: Any, spec: TensorSpec, quantization: Quantization, layout: Layout) -> QuantizedMatrix:
    """Begins to quantize a matrix on its device, which holds the matrix no longer than that takes."""
    parts = parts_of(spec, quantization.method)
    shardings = jax.tree.map(lambda part: layout.sharding(*part.axes), parts)
    try:
        return quantizer(quantization.method, shardings, stacked=spec.parts is not None)(array)
    finally:
        array.delete()


class _Copying:
    """The tensors on their way to a device, oldest first, and the bytes that the host holds for them."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._bytes = 0
        self._arrays: deque[tuple[jax.Array | QuantizedMatrix, int]] = deque()

    def add(self, array: jax.Array | QuantizedMatrix, size: int) -> None:
        self._arrays.append((array, size))
        self._bytes += size

    def forget(self) -> None:
        """Lets go of all of them."""
        self._arrays.clear()

    def make_room(self, size: int) -> None:
        """Waits for the oldest until another `size` bytes fit."""
        if self._bytes + size <= self.most_bytes:
            return
        while self._bytes + size > self.most_bytes:
            array, done = self._arrays.popleft()
            jax.block_until_ready(array)
            self._bytes -= done
        gc.collect(0)  # only then does jax let go of the mappings; they would pile up, with their open files


def to_devices(tensor: StoredTensor, dtype: np.dtype[Any], sharding: jax.sharding.Sharding) -> jax.Array:
    """Begins to copy one tensor to its devices, to each the slice that it holds."""
    shards: list[jax.Array] = []
    for part, devices in device_parts(sharding, tensor.shape).items():
        values = tensor.read(part, dtype)
        shards += [_copied(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, shards)


def _copied(array: npt.NDArray[Any], device: Any) -> jax.Array:
    on_device = jax.device_put(array, device, may_alias=False)
    if on_device.platform() == "cpu" and on_device.unsafe_buffer_pointer() == array.ctypes.data:
        return jnp.copy(on_device)  # jax takes aligned memory as it is, whatever may_alias says
    return on_device


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, without its data.

    Raises:
        CheckpointError: a file is missing or no valid safetensors file, or the index contradicts its files.
    """
    if (folder / SINGLE).exists():  # before an index, as transformers has it
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    shard_of = _read_index(folder / INDEX)
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        if not os.path.exists(folder / shard):  # unlike Path's, also of a name that no file can have
            wanted = sorted(name for name, s in shard_of.items() if s == shard)
            raise CheckpointError(
                f"{folder / shard}: missing shard; {INDEX} expects {len(wanted)} tensors in it, among them "
                f"{wanted[0]!r}"
            )
        for name, tensor in read_header(folder / shard).items():
            if shard_of.get(name) != shard:
                place = f"expects in {shard_of[name]!r}" if name in shard_of else "does not know"
                raise CheckpointError(f"{folder / shard}: holds tensor {name!r}, which {INDEX} {place}")
            stored[name] = tensor
    for name, shard in shard_of.items():
        if name not in stored:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is missing, {INDEX} expects it there")
    return stored


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: 'weight_map' is {weight_map!r}, expected an object of tensor names and file names"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(f"{path}: tensor {name!r} is placed in {shard!r}, expected a file name")
        # by name, not resolved: in the hub's cache the files themselves are links to elsewhere
        parts = PurePosixPath(shard).parts
        if parts[:1] == ("/",) or ".." in parts or "\\" in shard:
            raise CheckpointError(
                f"{path}: tensor {name!r} is placed in {shard!r}, outside the checkpoint's folder"
            )
    return weight_map


def check_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    config: Qwen3Config,
    quantization: Quantization | None = None,
) -> None:
    """Checks that a checkpoint holds exactly the tensors of a model.

    Raises:
        CheckpointError: a tensor is missing, has another shape or a dtype that cannot be converted, or is not
            part of the model.
    """
    wanted: list[TensorSpec] = jax.tree.leaves(quantized_specs(config, quantization))
    shapes = {name: spec.stored_shape for spec in wanted for name in spec.stored_names}
    dtypes = {name: spec.dtype for spec in wanted for name in spec.stored_names}
    for name, shape in shapes.items():
        if name not in stored:
            place = folder / (SINGLE if (folder / SINGLE).exists() else INDEX)
            raise CheckpointError(
                f"{place}: tensor {name!r} is missing, config.json expects it with shape {shape}"
            )
        found = stored[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: tensor {name!r} has shape {found.shape}, config.json expects {shape}"
            )
        allowed = FLOATS if dtypes[name] in (None, FLOAT32) else (dtypes[name],)
        if found.dtype not in allowed:
            raise CheckpointError(
                f"{found.file}: tensor {name!r} has dtype {found.dtype}, config.json expects "
                f"{' or '.join(str(dtype) for dtype in allowed)}"
            )
    extra = stored.keys() - shapes.keys()
    if config.tie_word_embeddings and "lm_head.weight" in extra:  # Qwen3-0.6B for one stores it twice
        extra.remove("lm_head.weight")
        _check_tied(stored["model.embed_tokens.weight"], stored["lm_head.weight"])
    if extra:
        example = stored[min(extra)]
        raise CheckpointError(
            f"{example.file}: tensor {example.name!r} of shape {example.shape} is not part of the model that "
            f"config.json describes ({len(extra)} such tensors)"
        )


def _check_tied(embedding: StoredTensor, lm_head: StoredTensor) -> None:
    for what in ("shape", "dtype"):
        expected, found = getattr(embedding, what), getattr(lm_head, what)
        if expected != found:
            raise CheckpointError(
                f"{lm_head.file}: tensor {lm_head.name!r} has {what} {found}, expected {expected} as "
                f"{embedding.name!r} has, since config.json says tie_word_embeddings"
            )
    if not all(np.array_equal(*pair) for pair in zip(embedding.chunks(), lm_head.chunks(), strict=True)):
        raise CheckpointError(
            f"{lm_head.file}: tensor {lm_head.name!r} differs from {embedding.name!r}, expected the same "
            "numbers since config.json says tie_word_embeddings"
        )
