"""The tensors of one safetensors file: where they lie, and how their bytes reach the host."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}
FLOATS = tuple(DTYPES[name] for name in ("BF16", "F32", "F16"))  # which may be converted into each other
CHUNK_BYTES = 1 << 24  # of a tensor that is compared or converted on the host, at a time


Part: TypeAlias = tuple[tuple[int, int], ...]  # of a tensor: where it begins and ends, of each dimension


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

    def read(self, part: Part, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A part of the tensor in some dtype; none of the rest of it is read.

        Whole rows in the tensor's own dtype are mapped from the file, and unmapped when the array goes. Of
        anything else the host holds a copy, and some of the rows at a time in their own dtype.

        Args:
            part: of each dimension where it begins and ends.
            dtype: of the result.
        """
        first, last = part[0]
        whole_rows = part[1:] == tuple((0, n) for n in self.shape[1:])
        if whole_rows and dtype == self.dtype:
            return self._rows(first, last)
        result = np.empty([stop - start for start, stop in part], dtype)
        columns = tuple(slice(*bounds) for bounds in part[1:])
        step = max(1, CHUNK_BYTES // (self.size // self.shape[0]))
        for start in range(first, last, step):
            stop = min(start + step, last)
            result[start - first : stop - first] = self._rows(start, stop)[:, *columns]
        return result

    def _rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Some of the tensor's rows, mapped."""
        row_size = self.size // self.shape[0]
        mapped = self._map(start * row_size, stop * row_size)
        return mapped.view(self.dtype).reshape(stop - start, *self.shape[1:])

    def chunks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Its bytes in order, mapped a chunk at a time."""
        for start in range(0, self.size, CHUNK_BYTES):
            yield self._map(start, min(start + CHUNK_BYTES, self.size))

    def _map(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        # np.memmap takes three times as long
        begin = self.offset + start
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            length = self.offset + stop - page
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=page)
        return np.frombuffer(mapped, np.uint8, count=stop - start, offset=begin - page)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file by name.

    Raises:
        CheckpointError: not a valid safetensors file, or a dtype that is not supported.
    """
    try:
        header, data_start = _parse_header(path)
        stored = {name: _stored_tensor(path, name, entry, data_start) for name, entry in header.items()}
        end = max((tensor.offset + tensor.size for tensor in stored.values()), default=data_start)
        if path.stat().st_size != end:
            raise CheckpointError(
                f"{path}: truncated or damaged: its header describes {end} bytes, the file has "
                f"{path.stat().st_size}"
            )
        with safe_open(path, framework="numpy"):  # the library's own checks: gaps, overlaps, sizes
            pass
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error
    return stored


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header (a JSON object after its length as a little-endian uint64), and where the data begin."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_size <= file_size - 8:
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated: expected a header of 2 to "
                f"{max(file_size - 8, 0)} bytes, found a length of {header_size}"
            )
        try:
            header = json.loads(file.read(header_size))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: not a safetensors file: its header is not valid JSON: {error}"
            ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: not a safetensors file: its header is a {type(header).__name__}, expected an object"
        )
    header.pop("__metadata__", None)
    return header, 8 + header_size


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has dtype {dtype!r}, supported are {list(DTYPES)}"
                )
            return StoredTensor(path, name, DTYPES[dtype], tuple(shape), data_start + start, end - start)
        case _:
            raise CheckpointError(
                f"{path}: tensor {name!r} is described as {entry!r}, expected dtype, shape and data_offsets"
            )
