"""From a folder, a hub id or a published shape to a model ready to run."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from .checkpoint import load_params, open_checkpoint
from .config import ConfigError, Qwen3Config, parse_dtype, published_config
from .config_json import config_from_json, read_json, stored_dtype
from .generation_defaults import GenerationDefaults, generation_defaults_from_json
from .params import Params
from .quantization import Method, parse_method
from .quantization_json import quantization_from_json
from .quantized_specs import Quantization, check_split, quantized_specs
from .random_weights import random_params
from .safetensors_file import StoredTensor
from .sharding import AXIS_NAMES, TRIVIAL_DIMS, Layout, PartitionAxis, layout_of, make_mesh

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.json")


@dataclass(frozen=True)
class Model:
    """A model ready to run.

    Attributes:
        config: its shape, and how to compute it.
        params: its weights, on their devices.
        mesh: those devices.
        partition_axis: how weights and cache are split over the mesh.
        generation_defaults: what generation_config.json asks for.
        source: the folder it was read from, where its tokenizer lies too; None for random weights.
    """

    config: Qwen3Config
    params: Params
    mesh: Mesh
    partition_axis: PartitionAxis
    generation_defaults: GenerationDefaults
    source: Path | None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: the configuration's and the generation configuration's."""
        return tuple(dict.fromkeys(self.generation_defaults.eos_token_ids + self.config.eos_token_ids))

    @property
    def layout(self) -> Layout:
        """What lies where on the mesh.

        Raises:
            ValueError: see `layout_of`.
        """
        return layout_of(self.config, self.mesh, self.partition_axis)


def load_model(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    sharding_axis_dims: Sequence[int] = TRIVIAL_DIMS,
    axis_names: Sequence[str] = AXIS_NAMES,
    partition_axis: PartitionAxis | None = None,
    quantization_method: Method | None = None,
    progress: bool = True,
) -> Model:
    """Loads a Qwen3 checkpoint.

    Args:
        path_or_hub_id: a local folder in the Hugging Face layout, or an id like "Qwen/Qwen3-0.6B", which is
            downloaded once to huggingface_hub's cache (HF_HUB_OFFLINE=1 uses the cache alone).
        revision: branch, tag or commit of a hub id.
        dtype: bfloat16 or float32, of the parameters; None for the dtype that config.json names (or, if it
            names none, the embedding's). Tensors stored in another dtype are converted. A float16 checkpoint
            has to be asked for in float32, which is exact, or bfloat16, which rounds.
        compute_dtype: bfloat16 or float32, of the operands of matrix products; None for the parameters'.
        sharding_axis_dims, axis_names: see `make_mesh`.
        partition_axis: which axis of the mesh splits what; None for the defaults.
        quantization_method: "a8bit", "nf4" or "fp8", of the projections of attention and MLP (see
            `quantization`), which become it one by one while they are read; None to leave them as they are.
            A checkpoint that is quantized is loaded as it is.
        progress: show a progress bar on stderr while weights are read, if stderr is a terminal.

    Raises:
        ConfigError: a configuration that is not supported.
        CheckpointError: files that do not hold the model that config.json describes.
        FileNotFoundError: no such folder, and not a hub id.
        ValueError, TypeError: no path or hub id, a revision of a local folder, a mesh that cannot be or that
            the model cannot be split over, no partition axis, no quantization method or another one than the
            checkpoint's.
    """
    asked = _asked_quantization(quantization_method)
    mesh = make_mesh(sharding_axis_dims, axis_names)
    partition_axis = _checked(partition_axis)
    folder = find_checkpoint(path_or_hub_id, revision=revision)
    config = read_config(folder)
    layout = layout_of(config, mesh, partition_axis)
    generation_defaults = read_generation_defaults(folder)
    _check_ids(config, generation_defaults, folder)
    stored_as = read_quantization(folder)
    quantization = chosen_quantization(stored_as, asked, folder)
    check_split(quantized_specs(config, quantization), layout)  # known before the files are read
    stored = open_checkpoint(folder, config, stored_as)
    param_dtype = default_dtype(folder, config, stored) if dtype is None else parse_dtype(dtype, "dtype")
    config = _computing_in(config, compute_dtype, param_dtype)
    params = load_params(
        stored,
        config,
        dtype=param_dtype,
        layout=layout,
        stored_as=stored_as,
        quantization=quantization,
        progress=progress,
    )
    return Model(config, params, mesh, partition_axis, generation_defaults, folder)


def default_dtype(
    folder: Path, config: Qwen3Config, stored: Mapping[str, StoredTensor] | None = None
) -> np.dtype[Any]:
    """The dtype that `load_model` gives a checkpoint's parameters where none is asked for.

    Args:
        folder: the checkpoint's.
        config: the shape that its config.json describes.
        stored: its tensors, from `open_checkpoint`; None to open it if config.json names no dtype.

    Raises:
        ConfigError: it is neither bfloat16 nor float32.
        CheckpointError: see `open_checkpoint`.
    """
    source = str(folder / "config.json")
    name = stored_dtype(read_json(folder / "config.json"), source=source)
    if name is None:
        if stored is None:
            stored = open_checkpoint(folder, config, read_quantization(folder))
        name = stored["model.embed_tokens.weight"].dtype.name
    try:
        return parse_dtype(name, f"{source}: dtype")
    except ConfigError as error:
        raise ConfigError(f"{error}; ask for one of them with dtype=") from error


def _checked(partition_axis: PartitionAxis | None) -> PartitionAxis:
    """The mapping, or the default one for None."""
    if partition_axis is not None and not isinstance(partition_axis, PartitionAxis):
        raise TypeError(f"partition_axis={partition_axis!r}: must be a PartitionAxis or None")
    return partition_axis or PartitionAxis()


def _computing_in(
    config: Qwen3Config, compute_dtype: DTypeLike | None, param_dtype: np.dtype[Any]
) -> Qwen3Config:
    dtype = param_dtype if compute_dtype is None else parse_dtype(compute_dtype, "compute_dtype")
    return dataclasses.replace(config, dtype=dtype)


def find_checkpoint(path_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloading it first if it is a hub id.

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be had.
        ValueError: a revision of a local folder.
        TypeError: neither a path nor a hub id, or no name of a revision.
    """
    if not isinstance(path_or_hub_id, str | PathLike):
        raise TypeError(
            f"path_or_hub_id={path_or_hub_id!r}: must be a folder, or a hub id like 'Qwen/Qwen3-0.6B'"
        )
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"revision={revision!r}: must be a branch, tag or commit, or None")
    if path_or_hub_id == "":  # as a path it would be the current folder
        raise FileNotFoundError("'': must be a folder, or a hub id like 'Qwen/Qwen3-0.6B'")
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {folder} is a local folder, which has no revisions")
        return folder
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id like 'Qwen/Qwen3-0.6B'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(CHECKPOINT_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and not to be had from the hub (revision {revision or 'main'}): {error}"
        ) from error


def read_config(folder: Path) -> Qwen3Config:
    """The configuration in a checkpoint's folder.

    Raises:
        ConfigError: there is none, or it is not supported.
    """
    return config_from_json(read_json(folder / "config.json"), source=str(folder / "config.json"))


def read_quantization(folder: Path) -> Quantization | None:
    """How the checkpoint in a folder is quantized; None if it is not.

    Raises:
        ConfigError: in a way that is not supported.
    """
    path = folder / "config.json"
    return quantization_from_json(read_json(path), source=str(path))


def _check_ids(config: Qwen3Config, defaults: GenerationDefaults, folder: Path) -> None:
    """Refuses ends of a sequence that are no tokens, which it would then never come to."""
    files = {"config.json": config.eos_token_ids, "generation_config.json": defaults.eos_token_ids}
    for file, ids in files.items():
        for token_id in ids:
            if token_id >= config.vocab_size:
                raise ConfigError(
                    f"{folder / file}: eos_token_id={token_id}: the vocabulary has tokens 0 to "
                    f"{config.vocab_size - 1}"
                )


def _asked_quantization(method: Any) -> Quantization | None:
    return None if method is None else Quantization(parse_method(method, "quantization_method"))


def chosen_quantization(
    stored_as: Quantization | None, asked: Quantization | None, folder: Path
) -> Quantization | None:
    """How a model is quantized, from how its checkpoint is and how it was asked for.

    Raises:
        ValueError: the two contradict each other.
    """
    if stored_as is not None and asked is not None and stored_as.method != asked.method:
        raise ValueError(
            f"quantization_method={asked.method!r}: {folder} is quantized already, as {stored_as.method!r}; "
            "leave the option out, or load the checkpoint that it was made of"
        )
    return asked if stored_as is None else stored_as


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """The generation defaults in a checkpoint's folder; none if it has no such file."""
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    return generation_defaults_from_json(read_json(path), source=str(path))


def random_model(
    name_or_config: str | Qwen3Config,
    *,
    seed: int,
    dtype: DTypeLike = jnp.bfloat16,
    compute_dtype: DTypeLike | None = None,
    sharding_axis_dims: Sequence[int] = TRIVIAL_DIMS,
    axis_names: Sequence[str] = AXIS_NAMES,
    partition_axis: PartitionAxis | None = None,
    quantization_method: Method | None = None,
) -> Model:
    """A model of a published shape (or any configuration) with random weights, made on the device.

    Matrices are uniform with standard deviation 0.02, norms are one, biases zero.

    Args:
        name_or_config: "Qwen/Qwen3-0.6B" or just "0.6B", or a configuration.
        seed: of the weights, at least 0.
        dtype, compute_dtype, sharding_axis_dims, axis_names, partition_axis, quantization_method: as in
            `load_model`.

    Raises:
        ConfigError: no published shape of that name, a dtype that is not supported, or a shape that cannot be
            quantized so.
        ValueError, TypeError: a seed that is no integer of at least 0, another argument that cannot be.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed={seed!r}: must be an integer")
    if seed < 0:
        raise ValueError(f"seed={seed}: must be at least 0")
    config = published_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if not isinstance(config, Qwen3Config):
        raise TypeError(f"name_or_config={config!r}: must be the name of a published model or a Qwen3Config")
    param_dtype = parse_dtype(dtype, "dtype")
    quantization = _asked_quantization(quantization_method)
    config = _computing_in(config, compute_dtype, param_dtype)
    mesh = make_mesh(sharding_axis_dims, axis_names)
    partition_axis = _checked(partition_axis)
    layout = layout_of(config, mesh, partition_axis)
    check_split(quantized_specs(config, quantization), layout)
    params = random_params(config, seed=seed, dtype=param_dtype, layout=layout, quantization=quantization)
    return Model(config, params, mesh, partition_axis, GenerationDefaults(), None)


__all__ = ["ConfigError", "Model", "find_checkpoint", "load_model", "random_model", "read_config"]
