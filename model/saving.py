"""Writing a model as a checkpoint in the Hugging Face layout, one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .checkpoint import INDEX, SINGLE
from .config_json import config_to_json
from .loading import CHECKPOINT_FILES, Model
from .params import TensorSpec, param_specs
from .quantization import Method, QuantizedMatrix
from .quantization_json import quantization_to_json
from .quantized_specs import Quantization, parts_of
from .safetensors_file import DTYPES

MAX_FILE_BYTES = 5 * 10**9  # of tensors in one file, as transformers has it


def save_model(model: Model, folder: str | Path) -> Path:
    """Writes a model, quantized or not, so that `load_model` reads the same bits.

    The folder gets config.json, the weights in safetensors (several files and an index from 5 GB on), and the
    tokenizer and generation defaults of the folder that the model was loaded from. How the model is computed
    (`compute_dtype`, the cache's dtype and the like) is not part of a checkpoint. fp8 is written as the
    published FP8 checkpoints are, the other forms with `quant_method` "vsurge": see docs/quantization.md.

    Args:
        model: on this process's devices.
        folder: is made if need be.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds a checkpoint.
        TypeError: no model, or no folder.
        ValueError: some of the weights are another process's, or are quantized in more than one form.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model={model!r}: must be a Model, from load_model or random_model")
    if not isinstance(folder, str | PathLike):
        raise TypeError(f"folder={folder!r}: must be the path of a folder")
    folder = Path(folder).expanduser()
    if any((folder / name).exists() for name in ("config.json", SINGLE, INDEX)):
        raise FileExistsError(f"{folder}: holds a checkpoint already; give another folder")
    tensors = list(named_tensors(model))
    for name, array in tensors:
        if isinstance(array, jax.Array | _Unstacked) and not array.is_fully_addressable:
            raise ValueError(f"{name}: lies on devices of other processes; save it where one process has all")
    config = config_to_json(model.config, np.dtype(model.params.embedding.dtype))
    quantization = quantization_of(model)
    if quantization is not None:
        config["quantization_config"] = quantization_to_json(quantization)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, tensors)
    if model.source is not None:
        _copy_others(model.source, folder)
    # last, so that what was interrupted is not taken for a checkpoint
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def named_tensors(model: Model) -> Iterator[tuple[str, Any]]:
    """The arrays of a model and what they are called in a checkpoint."""
    for spec, leaf in _specs_and_leaves(model):
        if isinstance(leaf, QuantizedMatrix):
            parts: Any = parts_of(spec, leaf.method)
            yield from _stored(parts.data, leaf.data)
            yield from _stored(parts.scales, leaf.scales)
        else:
            yield from _stored(spec, leaf)


def _stored(spec: TensorSpec, array: Any) -> Iterator[tuple[str, Any]]:
    if spec.parts is None:
        yield spec.name, array
        return
    for number, name in enumerate(spec.parts):
        yield name, _Unstacked(array, number)


@dataclass(frozen=True)
class _Unstacked:
    """One of the matrices that a parameter is made of, as it is stored; copied when it is written."""

    stack: Any
    number: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.stack.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[:0:-1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_fully_addressable(self) -> bool:
        return not isinstance(self.stack, jax.Array) or self.stack.is_fully_addressable

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.stack[self.number].T, dtype, copy=copy)


def quantization_of(model: Model) -> Quantization | None:
    """How a model's weights are quantized; None if none is.

    Raises:
        ValueError: in more than one form.
    """
    pairs = _specs_and_leaves(model)
    methods: set[Method] = {leaf.method for _, leaf in pairs if isinstance(leaf, QuantizedMatrix)}
    if not methods:
        return None
    if len(methods) > 1:
        raise ValueError(f"params: are quantized in several forms, {sorted(methods)}")
    whole = Quantization(methods.pop())
    skipped = [
        spec.name.removesuffix(".weight")
        for spec, leaf in pairs
        if whole.applies_to(spec) and not isinstance(leaf, QuantizedMatrix)
    ]
    return Quantization(whole.method, tuple(skipped))


def _specs_and_leaves(model: Model) -> list[tuple[TensorSpec, Any]]:
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    return list(zip(jax.tree.leaves(param_specs(model.config)), leaves, strict=True))


def _write_weights(folder: Path, tensors: list[tuple[str, Any]]) -> None:
    files: list[list[tuple[str, Any]]] = [[]]
    size = 0
    for name, array in tensors:
        if files[-1] and size + array.nbytes > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append((name, array))
        size += array.nbytes
    if len(files) == 1:
        write_safetensors(folder / SINGLE, files[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / file, part)
        weight_map |= {name: file for name, _ in part}
    index = {"metadata": {"total_size": sum(a.nbytes for _, a in tensors)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: list[tuple[str, Any]]) -> None:
    """One file of tensors. The host holds one at a time; safetensors' own function wants them all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, array in tensors:
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": names[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, array in tensors:
            file.write(np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data)


def _copy_others(source: Path, folder: Path) -> None:
    """Copies what belongs to a checkpoint besides its configuration and weights."""
    weights = {"config.json", INDEX}
    for pattern in CHECKPOINT_FILES:
        for file in source.glob(pattern):
            if file.suffix != ".safetensors" and file.name not in weights and file.is_file():
                shutil.copyfile(file, folder / file.name)
